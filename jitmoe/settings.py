"""The one table of environment variables, and the only module that reads the environment."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jitmoe.errors import SettingError


@dataclass(frozen=True)
class Setting:
    """One environment variable: ``kind`` parses ``variable``; ``default`` stands for an unset or empty one."""

    variable: str
    kind: Callable[[str], Any]
    default: Any
    meaning: str


def path(text: str) -> Path:
    """A path in which ``~`` and ``$NAME`` stand for what they stand for in a shell."""
    expanded = os.path.expandvars(os.path.expanduser(text))
    if "$" in expanded or expanded.startswith("~"):
        raise ValueError("it names a user or a variable that does not exist")
    return Path(expanded)


SETTINGS: dict[str, Setting] = {
    "isa": Setting("JITMOE_ISA", str, None, "overrides config.isa of every layer"),
    "emulate": Setting(
        "JITMOE_EMULATE", str, None, "1: execute AMX and AVX512-BF16 in software; or the path of another emulator"
    ),
    "checked": Setting("JITMOE_CHECKED", int, 0, "1: kernels that hold each call to the plan of its scratch; slower"),
    "cache_dir": Setting("JITMOE_CACHE_DIR", path, None, "where compiled kernels are kept"),
    "compile_timeout": Setting("JITMOE_COMPILE_TIMEOUT", float, 120.0, "seconds one compiler run may take"),
    "cxx": Setting("JITMOE_CXX", str, None, "the C++ compiler, before $CXX, g++ and clang++"),
    "system_cxx": Setting("CXX", str, None, "the C++ compiler, after $JITMOE_CXX"),
    "omp_threads": Setting("OMP_NUM_THREADS", str, None, "threads of the OpenMP pool; `jitmoe doctor` shows it"),
    "omp_proc_bind": Setting("OMP_PROC_BIND", str, None, "binds OpenMP threads to CPUs; jitmoe does so by itself"),
    "gomp_affinity": Setting("GOMP_CPU_AFFINITY", str, None, "likewise"),
    "trace": Setting("JITMOE_TRACE", int, 0, "1: trace every call until a value is not finite, and log the report"),
    "search_path": Setting("PATH", str, os.defpath, "where compilers are searched"),
}


def get(name: str) -> Any:
    """Value of the setting ``name`` of :data:`SETTINGS`, read at each call so that users can change it.

    Raises:
        SettingError: the variable holds text that its type does not accept.
    """
    setting = SETTINGS[name]
    text = os.environ.get(setting.variable, "")
    if not text:
        return setting.default
    try:
        return setting.kind(text)
    except ValueError as error:
        raise SettingError(
            f"{setting.variable}={text!r} is not a valid {setting.kind.__name__} ({setting.meaning}): {error}"
        ) from error
