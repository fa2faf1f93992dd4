"""What this machine can execute, and which instruction set a layer therefore uses."""

import logging
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import llvmlite.binding

from jitmoe import settings
from jitmoe.errors import IsaError
from jitmoe.isa import EMULATED_FEATURES, ISAS

log = logging.getLogger(__name__)

Check = Callable[[], str | None]
"""Makes something usable in this process; returns what failed, or None."""

CHECKS: dict[str, Check] = {}
"""What must succeed beyond CPUID before an instruction set is used, by its name, and "emulator" for the emulator.
Filled by :mod:`jitmoe.jit.kernels`, which may load libraries; each is cheap to repeat."""


@dataclass(frozen=True)
class Cpu:
    """The processor: its model name and the features that it and the operating system offer."""

    model: str
    features: frozenset[str]


@dataclass(frozen=True)
class Capability:
    """Whether the kernels of ``isa`` can run here; ``reason`` says why not, or what was checked.

    ``emulated``: some of their instructions are executed by the emulator.
    """

    isa: str
    usable: bool
    reason: str
    emulated: bool = False


@cache
def detect() -> Cpu:
    """The processor this process runs on.

    LLVM reads CPUID and XCR0: a vector feature whose registers the operating system does not save is
    not in the list.
    """
    found = llvmlite.binding.get_host_cpu_features()
    return Cpu(_model_name(), frozenset(name for name, present in found.items() if present))


def _model_name() -> str:
    """Name from /proc/cpuinfo; the architecture where there is no such file or line."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def capabilities(cpu: Cpu | None = None) -> tuple[Capability, ...]:
    """One :class:`Capability` for each known instruction set, best first."""
    return tuple(_capability(isa, cpu or detect()) for isa in ISAS)


def _capability(isa: str, cpu: Cpu) -> Capability:
    missing = missing_features(isa, cpu)
    fault = f"the CPU or the operating system does not offer {', '.join(missing)}" if missing else _failed_check(isa)
    if fault is None:
        return Capability(isa, True, f"needs {', '.join(ISAS[isa].features) or 'no special features'}")
    emulation = settings.get("emulate") or "0"
    could_be_emulated = ISAS[isa].emulated_features and set(missing) <= EMULATED_FEATURES
    if emulation == "0" or not could_be_emulated:
        return Capability(isa, False, fault)
    broken = _failed_check("emulator")
    if broken is not None:
        return Capability(isa, False, f"{fault}, and {broken}")
    return Capability(isa, True, f"emulated (JITMOE_EMULATE={emulation}): {fault}", emulated=True)


def _failed_check(name: str) -> str | None:
    return CHECKS[name]() if name in CHECKS else None


def describe(isa: str) -> str:
    """``isa``, with the word "emulated" where it is."""
    return f"{isa} (emulated)" if _capability(isa, detect()).emulated else isa


def missing_features(isa: str, cpu: Cpu) -> tuple[str, ...]:
    """Features that the kernels of ``isa`` need and ``cpu`` does not offer."""
    return tuple(name for name in ISAS[isa].features if name not in cpu.features)


def resolve_isa(requested: str) -> str:
    """The concrete instruction set for ``requested``, which is "auto" or a name.

    "auto" takes the best set that this machine can execute and that has kernels.

    Raises:
        IsaError: if ``requested`` is a set that cannot run here; the message names the failed check.
    """
    found = {capability.isa: capability for capability in capabilities()}
    if requested == "auto":
        chosen = next(isa for isa in ISAS if found[isa].usable)
        _report_fallback(chosen)
        return chosen
    if requested not in found:
        raise IsaError(f"unknown instruction set {requested!r}; known are auto, {', '.join(found)}")
    if not found[requested].usable:
        usable = ", ".join(isa for isa in found if found[isa].usable)
        raise IsaError(f"isa={requested!r} cannot be used: {found[requested].reason}. Usable here: auto, {usable}")
    return requested


@cache
def _report_fallback(chosen: str) -> None:
    """Say once why the best set that the CPU has is not the one in use."""
    best = next(capability for capability in capabilities() if not missing_features(capability.isa, detect()))
    if best.isa != chosen:
        log.info("using %s: %s cannot be used (%s)", chosen, best.isa, best.reason)
