"""The seam for those who look: a call runs its kernels inside what an observer puts around them.

This wing knows nothing of tracing, checking, capturing and timing. Who wants to look stands above it and comes in by
:func:`observing`; what the environment asks for, and the methods of a layer, come through :data:`watchers`, which the
package hands over once.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

if TYPE_CHECKING:  # the package imports this module, and stays quick to import
    import numpy as np
    import numpy.typing as npt
    from torch import nn

    from jitmoe.host.route import Route
    from jitmoe.jit.abi import Record
    from jitmoe.jit.kernels import Kernels
    from jitmoe.plan.placement import ScratchPlan
    from jitmoe.plan.shapes import Shape, Watch

PassName = Literal["forward", "backward"]


@dataclass(frozen=True, eq=False)
class Launch:
    """One pass of a call, planned, with its arena at hand: what the kernels are about to run, or have run.

    Attributes:
        pass_name: "forward" or "backward".
        shape: of the kernels; with what they watch.
        kernels: that run.
        record: the ``Call`` that they get; a watcher adds fields before, and reads results after.
        plan: of the scratch.
        arena: address of the scratch.
        route: rows sorted by expert.
        row_weight: [S] float32 routing weight of each row.
        top_k: K.
    """

    pass_name: PassName
    shape: "Shape"
    kernels: "Kernels"
    record: "Record"
    plan: "ScratchPlan"
    arena: int
    route: "Route"
    row_weight: "npt.NDArray[np.float32]"
    top_k: int


class Observer:
    """Sees every call of every layer in the process. To be derived from.

    Attributes:
        watch: variant of the kernels to load, see ``Watch`` in shape.hpp.
        threads: of the kernels; None for those of the call. Results do not depend on it.
    """

    watch: "Watch" = "nothing"
    threads: int | None = None

    def check(self, parts: int) -> None:
        """Refuse, before a pass begins, a layer in so many parts. Parts come one after the other, a pass each."""

    def planning(self) -> None:
        """A pass begins: nothing is planned yet."""

    def around(self, launch: Launch) -> AbstractContextManager[None]:
        """The kernels run inside this context; what its end raises is raised by the call."""
        return nullcontext()


class Watchers(Protocol):
    """What the package offers for looking inside, without this wing knowing how."""

    def observer(self) -> Observer | None:
        """Who the environment wants to see the next call."""

    def capture(self, layer: "nn.Module", path: Path, when: str) -> None:
        """See :meth:`~jitmoe.experts.layer.MoELayer.capture`."""


class _Seam:
    """Who looks: the last one that came in, or the one that the environment asks for."""

    watchers: Watchers | None = None
    inside: ClassVar[list[Observer]] = []


def hand_over(watchers: Watchers) -> None:
    """Tell this wing who offers to look; for the package alone."""
    _Seam.watchers = watchers


def watchers() -> Watchers:
    """Those handed over."""
    assert _Seam.watchers is not None, "the package hands its watchers over when it is imported"
    return _Seam.watchers


def current() -> Observer | None:
    """Who sees the next call."""
    return _Seam.inside[-1] if _Seam.inside else watchers().observer()


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Let ``observer`` see every call, in all threads of the process, until the block ends."""
    _Seam.inside.append(observer)
    try:
        yield
    finally:
        # The last such entry: blocks of two threads may end in any order.
        last = max(i for i, other in enumerate(_Seam.inside) if other is observer)
        del _Seam.inside[last]
