"""Which instruction sets this machine can execute, and which one a layer therefore uses."""

import logging
from dataclasses import dataclass
from functools import cache

from jitmoe import settings
from jitmoe.errors import IsaError
from jitmoe.isa import EMULATED_FEATURES, ISAS
from jitmoe.jit import cpu as cpus
from jitmoe.jit import programs
from jitmoe.jit.cpu import Cpu, missing_features

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Capability:
    """Whether the kernels of an instruction set can run here.

    Attributes:
        isa: name of the set.
        usable: the kernels can run.
        reason: why they cannot, or which features they need.
        emulated: the emulator executes some of their instructions.
    """

    isa: str
    usable: bool
    reason: str
    emulated: bool = False


def capabilities(cpu: Cpu | None = None) -> tuple[Capability, ...]:
    """One :class:`Capability` for each known instruction set, best first."""
    return tuple(_capability(isa, cpu or cpus.detect()) for isa in ISAS)


def _capability(isa: str, cpu: Cpu) -> Capability:
    missing = missing_features(isa, cpu)
    fault = f"the CPU or the operating system does not offer {', '.join(missing)}" if missing else _failed_check(isa)
    if fault is None:
        return Capability(isa, True, f"needs {', '.join(ISAS[isa].features) or 'no special features'}")
    emulation = settings.get("emulate") or "0"
    could_be_emulated = ISAS[isa].emulated_features and set(missing) <= EMULATED_FEATURES
    if emulation == "0" or not could_be_emulated:
        return Capability(isa, False, fault)
    broken = programs.install_emulator(emulation)
    if broken is not None:
        return Capability(isa, False, f"{fault}, and {broken}")
    return Capability(isa, True, f"emulated (JITMOE_EMULATE={emulation}): {fault}", emulated=True)


def describe(isa: str) -> str:
    """``isa``, with the word "emulated" where it is."""
    return f"{isa} (emulated)" if _capability(isa, cpus.detect()).emulated else isa


def _failed_check(isa: str) -> str | None:
    """What failed of the checks beyond CPUID, or None. A check keeps its result, so asking again is cheap."""
    return programs.check_tiles(isa) if ISAS[isa].tiles else None


def resolve_isa(requested: str) -> str:
    """The concrete instruction set for ``requested``, which is "auto" or a name.

    "auto" takes the best set that this machine can execute.

    Raises:
        IsaError: ``requested`` is unknown or cannot run here; the message names the failed check.
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
    """Say once why the best set that the CPU has is not used."""
    best = next(capability for capability in capabilities() if not missing_features(capability.isa, cpus.detect()))
    if best.isa != chosen:
        log.info("using %s: %s cannot be used (%s)", chosen, best.isa, best.reason)
