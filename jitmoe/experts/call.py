"""One call of the experts: routed rows in, token sums out. Plans scratch, fills the call, runs the kernel."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from jitmoe.experts.workspace import arenas
from jitmoe.host import tokens
from jitmoe.host.route import Route
from jitmoe.inspect.checked import checking
from jitmoe.jit.kernels import SCRATCH, Kernels, load
from jitmoe.plan.scratch import (
    BACKWARD_STEPS,
    FORWARD_STEPS,
    CallSize,
    ScratchPlan,
    plan_backward,
    plan_forward,
    row_bytes,
    thread_strides,
)
from jitmoe.plan.shapes import Groups, Shape, plan_groups

Run = Callable[[Kernels, dict[str, int | float], ScratchPlan], None]
"""Carries out a planned call: the kernels, the fields of their ``Call``, and what lies where in the scratch."""


@dataclass(frozen=True)
class ExpertCall:
    """What forward and backward of one call share.

    Attributes:
        shape: the kernel instance.
        route: rows sorted by expert.
        row_weight: [S] float32 routing weight of each row.
        tokens: T.
        rank: LoRA rank.
        scale: LoRA scale s.
        threads: threads to use.
    """

    shape: Shape
    route: Route
    row_weight: npt.NDArray[np.float32]
    tokens: int
    rank: int
    scale: float
    threads: int

    def size(self, groups: Groups) -> CallSize:
        """Extents of the scratch of this call, cut into ``groups``."""
        return CallSize(
            self.tokens, groups.rows, groups.blocks, groups.segment_rows, self.rank, usable_threads(self.threads)
        )


def forward(call: ExpertCall, addresses: Mapping[str, int], run: Run | None = None) -> None:
    """Forward of the experts.

    Args:
        call: routing and sizes.
        addresses: of the tensors by their name in ``Call``; ``result`` where out is bfloat16, ``result_float``
            where it is float32; ``saved_gate`` and ``saved_up`` where backward will want them.
        run: instead of just running the kernel.
    """
    groups = _groups(call, training=False)
    size = call.size(groups)
    plan = plan_forward(call.shape, size)
    strides = thread_strides(call.shape, size, strips=2)
    with arenas.lease(plan.nbytes) as base, checking(call.shape, plan, base, FORWARD_STEPS) as checks:
        fields = _fields(call, groups, plan, base) | strides | dict(addresses) | checks
        (run or _run_forward)(load(call.shape), fields, plan)


def backward(call: ExpertCall, addresses: Mapping[str, int], run: Run | None = None) -> None:
    """Backward of the experts; arguments as for :func:`forward`.

    The gradient of the routing weights is zero before the call; those of LoRA are left alone for experts without rows.
    """
    groups = _groups(call, training=True)
    size = call.size(groups)
    wants_x = not addresses.keys().isdisjoint({"result", "result_float"})
    plan = plan_backward(call.shape, size, x_grad=wants_x, recompute="saved_gate" not in addresses)
    strides = thread_strides(call.shape, size, strips=4)
    with arenas.lease(plan.nbytes) as base, checking(call.shape, plan, base, BACKWARD_STEPS) as checks:
        fields = _fields(call, groups, plan, base) | strides | dict(addresses) | checks
        (run or _run_backward)(load(call.shape), fields, plan)


def _run_forward(kernels: Kernels, fields: dict[str, int | float], _: ScratchPlan) -> None:
    kernels.forward(fields)


def _run_backward(kernels: Kernels, fields: dict[str, int | float], _: ScratchPlan) -> None:
    kernels.backward(fields)


def _groups(call: ExpertCall, training: bool) -> Groups:
    route = call.route
    return plan_groups(route.active, route.offsets, call.shape.m_step, row_bytes(call.shape, training))


def _fields(call: ExpertCall, groups: Groups, plan: ScratchPlan, base: int) -> dict[str, int | float]:
    scratch = {name: base + offset for name, offset in plan.offsets().items()}
    assert scratch.keys() <= set(SCRATCH)
    return {
        **scratch,
        "row_token": call.route.row_token.ctypes.data,
        "row_slot": call.route.row_slot.ctypes.data,
        "row_weight": call.row_weight.ctypes.data,
        "segments": groups.segments.ctypes.data,
        "group_segments": groups.bounds.ctypes.data,
        "groups": len(groups.bounds) - 1,
        "tokens": call.tokens,
        "rows": call.route.row_token.size,
        "rank": call.rank,
        "threads": usable_threads(call.threads),
        "scale": call.scale,
        "gather_rows": tokens.gather_rows_address(),
        "sum_rows": tokens.sum_rows_address(),
    }


class _Fork:
    """Whether this process is a forked child: its parent's OpenMP threads do not exist here."""

    happened = False


def _forked() -> None:
    _Fork.happened = True


os.register_at_fork(after_in_child=_forked)


def usable_threads(threads: int) -> int:
    """``threads``, or 1 in a forked child, where a second OpenMP thread would wait for ever."""
    return 1 if _Fork.happened else threads
