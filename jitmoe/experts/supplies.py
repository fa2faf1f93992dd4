"""What a call takes from its surroundings, in one place: tests put their own in for a while."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from jitmoe import numa
from jitmoe.experts.workspace import PAGE, Arenas, Blocks, arenas, blocks
from jitmoe.host import tokens
from jitmoe.jit.kernels import Kernels, load
from jitmoe.plan.groups import GROUP_BYTES, Extents
from jitmoe.plan.placement import ScratchPlan
from jitmoe.plan.scratch import plan_backward, plan_forward
from jitmoe.plan.shapes import Shape
from jitmoe.topology import Node, usable_nodes


def _empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu")


def _zeros(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device="cpu")


@dataclass(frozen=True)
class Supplies:
    """The surroundings of a call.

    Attributes:
        arenas: scratch.
        blocks: memory of large tensors.
        block_bytes: bytes from which on a tensor is a large one.
        empty: a tensor of a shape and dtype with any contents, where it is no large one.
        zeros: likewise with zeros.
        load: from a shape to its kernels.
        plan_forward: from a shape and extents to the scratch of forward.
        plan_backward: likewise of backward; with whether x wants a gradient and whether gate and up are recomputed.
        group_bytes: panels of one group.
        gather_rows: address of the callback that gathers rows.
        sum_rows: address of the callback that adds rows to tokens.
        nodes: NUMA nodes that parts may be computed on.
        prefer: lets memory come from a node, see :func:`jitmoe.numa.prefer`.
        nodes_of: where memory lies, see :func:`jitmoe.numa.nodes_of`.
    """

    arenas: Arenas = arenas
    blocks: Blocks = blocks
    block_bytes: int = PAGE
    empty: Callable[[Sequence[int], torch.dtype], torch.Tensor] = _empty
    zeros: Callable[[Sequence[int], torch.dtype], torch.Tensor] = _zeros
    load: Callable[[Shape], Kernels] = load
    plan_forward: Callable[[Shape, Extents], ScratchPlan] = plan_forward
    plan_backward: Callable[[Shape, Extents, bool, bool], ScratchPlan] = plan_backward
    group_bytes: int = GROUP_BYTES
    gather_rows: Callable[[], int] = tokens.gather_rows_address
    sum_rows: Callable[[], int] = tokens.sum_rows_address
    nodes: Callable[[], tuple[Node, ...]] = usable_nodes
    prefer: Callable[[int, int, int], str | None] = numa.prefer
    nodes_of: Callable[[int, int], dict[int, int] | str] = numa.nodes_of


class _Present:
    supplies = Supplies()


def supplies() -> Supplies:
    """Those of the next call."""
    return _Present.supplies


@contextmanager
def supplied(**changes: object) -> Iterator[Supplies]:
    """Calls in this process take ``changes`` (fields of :class:`Supplies`) until the block ends."""
    before = _Present.supplies
    _Present.supplies = replace(before, **changes)  # type: ignore[arg-type]
    try:
        yield _Present.supplies
    finally:
        _Present.supplies = before


def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A contiguous tensor of any contents; large ones reuse the memory of those of former calls."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < supplies().block_bytes:
        return supplies().empty(shape, dtype)
    memory = torch.from_numpy(supplies().blocks.take(nbytes))
    # Detached, it is no view: torch refuses writes in place, as in ``y += shared``, to one that a Function returned.
    return memory.view(dtype).view(*shape).detach()
