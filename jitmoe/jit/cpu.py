"""The processor: its name and what it offers."""

import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import llvmlite.binding

from jitmoe.isa import ISAS


@dataclass(frozen=True)
class Cpu:
    """The processor: its model name and the features that it and the operating system offer."""

    model: str
    features: frozenset[str]


@cache
def detect() -> Cpu:
    """The processor this process runs on.

    LLVM reads CPUID and XCR0, so a vector feature is missing where the operating system does not save its registers.
    """
    found = llvmlite.binding.get_host_cpu_features()
    return Cpu(_model_name(), frozenset(name for name, present in found.items() if present))


def known_features() -> tuple[str, ...]:
    """Names of all features that LLVM knows of this architecture, offered or not."""
    return tuple(llvmlite.binding.get_host_cpu_features())


def _model_name() -> str:
    """Name from /proc/cpuinfo; the architecture where there is no such file or line."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def missing_features(isa: str, cpu: Cpu) -> tuple[str, ...]:
    """Features that the kernels of ``isa`` need and ``cpu`` does not offer."""
    return tuple(name for name in ISAS[isa].features if name not in cpu.features)
