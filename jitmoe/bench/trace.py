"""Notes what a call of the layer really runs: which kernels, with how much scratch, and for how long."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from jitmoe.errors import BenchError
from jitmoe.experts.observer import Launch, Observer, observing
from jitmoe.jit.abi import PHASES
from jitmoe.plan.shapes import Shape

PLAN = "plan"
KERNEL_FORWARD, KERNEL_BACKWARD = "kernel forward", "kernel backward"


@dataclass
class Trace(Observer):
    """Notes on calls.

    Attributes:
        timed: the kernels run as timed instances.
        seconds: by part of a call: planning, and the kernels of each pass.
        shapes: kernels that ran.
        scratch: bytes of the largest scratch that was planned.
        phase_seconds: [len(PHASES)] float64 thread seconds by phase; zero unless ``timed``.
    """

    timed: bool = False
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    shapes: list[Shape] = field(default_factory=list)
    scratch: int = 0
    phase_seconds: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(len(PHASES)))

    def __post_init__(self) -> None:
        self.watch = "time" if self.timed else "nothing"
        self._planning = 0.0

    def planning(self) -> None:
        """Note when a pass begins."""
        self._planning = time.perf_counter()

    @contextmanager
    def around(self, launch: Launch) -> Iterator[None]:
        """Note one pass."""
        self.shapes.append(replace(launch.shape, watch="nothing"))
        self.scratch = max(self.scratch, launch.plan.nbytes)
        launch.record["phase_seconds"] = self.phase_seconds.ctypes.data
        start = time.perf_counter()
        yield
        end = time.perf_counter()
        self.seconds[PLAN] += start - self._planning
        self.seconds[KERNEL_FORWARD if launch.pass_name == "forward" else KERNEL_BACKWARD] += end - start

    def kernel_isa(self) -> str:
        """The instruction set of the kernels that ran.

        Raises:
            BenchError: no kernel ran, or kernels of several sets.
        """
        isas = {shape.isa for shape in self.shapes}
        if len(isas) != 1:
            raise BenchError(f"the call ran kernels of {sorted(isas) or 'no instruction set'}, expected exactly one")
        return isas.pop()


@contextmanager
def watch(timed: bool = False) -> Iterator[Trace]:
    """Note what layers run inside the block. A note takes some microseconds, so do not time whole calls here."""
    trace = Trace(timed)
    with observing(trace):
        yield trace
