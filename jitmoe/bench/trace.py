"""What a call of the layer really runs: which kernels, with how much scratch, and how long each step takes."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from jitmoe.errors import BenchError
from jitmoe.jit.kernels import STEPS, Kernels, load
from jitmoe.plan.shapes import Shape

ROUTE, PLAN = "route", "plan"
KERNEL_FORWARD, KERNEL_BACKWARD = "kernel forward", "kernel backward"

SEAMS = (
    ("jitmoe.experts.layer", "route", ROUTE),
    ("jitmoe.experts.layer", "plan_kernels", PLAN),
    ("jitmoe.experts.call", "plan_groups", PLAN),
    ("jitmoe.experts.call", "plan_forward", PLAN),
    ("jitmoe.experts.call", "plan_backward", PLAN),
)
"""Module, function in it, and the step that its time belongs to."""


@dataclass
class Trace:
    """Seconds by step, kernels that ran, and the largest scratch that was planned.

    With ``timed`` the kernels run as timed instances: ``step_seconds`` are thread seconds by
    :data:`jitmoe.jit.kernels.STEPS`.
    """

    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    shapes: list[Shape] = field(default_factory=list)
    scratch: int = 0
    timed: bool = False
    step_seconds: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(len(STEPS)))

    def kernel_isa(self) -> str:
        """The instruction set of the kernels that ran.

        Raises:
            BenchError: if none ran, or those of several.
        """
        isas = {shape.isa for shape in self.shapes}
        if len(isas) != 1:
            raise BenchError(f"the call ran kernels of {sorted(isas) or 'no instruction set'}, expected exactly one")
        return isas.pop()


@contextmanager
def watch(timed: bool = False) -> Iterator[Trace]:
    """Note what the layer calls inside the block; the functions between its steps are replaced meanwhile.

    Not for timing whole calls: the notes themselves take some microseconds.
    """
    trace = Trace(timed=timed)
    watched: dict[tuple[str, str], Callable[..., Any]] = {("jitmoe.experts.call", "load"): _watched_load(trace, load)}
    for module, name, step in SEAMS:
        watched[module, name] = _timed(trace, step, getattr(import_module(module), name))
    with ExitStack() as stack:
        for (module, name), function in watched.items():
            stack.enter_context(_replaced(import_module(module), name, function))
        yield trace


@contextmanager
def _replaced(module: ModuleType, name: str, function: Callable[..., Any]) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, function)
    try:
        yield
    finally:
        setattr(module, name, original)


def _timed(trace: Trace, step: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **keywords: Any) -> Any:
        start = time.perf_counter()
        result = function(*arguments, **keywords)
        trace.seconds[step] += time.perf_counter() - start
        # A memory plan is the only planned thing that has a size.
        trace.scratch = max(trace.scratch, getattr(result, "nbytes", 0))
        return result

    return call


class _WatchedKernels:
    """Kernels that note how long they run; forward and backward are all that a call uses."""

    def __init__(self, trace: Trace, kernels: Kernels) -> None:
        self.forward = _timed(trace, KERNEL_FORWARD, _with_clocks(trace, kernels.forward))
        self.backward = _timed(trace, KERNEL_BACKWARD, _with_clocks(trace, kernels.backward))


def _with_clocks(trace: Trace, run: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    return lambda fields: run(fields | {"step_seconds": trace.step_seconds.ctypes.data})


def _watched_load(trace: Trace, load: Callable[[Shape], Kernels]) -> Callable[[Shape], _WatchedKernels]:
    def call(shape: Shape) -> _WatchedKernels:
        trace.shapes.append(shape)
        return _WatchedKernels(trace, load(replace(shape, watch="time" if trace.timed else "nothing")))

    return call
