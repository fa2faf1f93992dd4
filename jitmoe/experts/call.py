"""One call of the experts: plans its scratch, fills the record of the kernels, and runs them."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from jitmoe.experts import observer
from jitmoe.experts.observer import Launch, PassName
from jitmoe.experts.supplies import supplies
from jitmoe.host.route import Route
from jitmoe.jit import abi
from jitmoe.plan.groups import Groups, plan_groups
from jitmoe.plan.scratch import Saved, row_bytes, saved_tensors
from jitmoe.plan.shapes import Shape
from jitmoe.process import usable_threads


@dataclass(frozen=True, eq=False)
class Call:
    """What forward and backward of one call share; the one record of it.

    Attributes:
        shape: the kernel instance.
        route: rows sorted by expert.
        tokens: T.
        top_k: K.
        num_experts: E.
        rank: LoRA rank.
        scale: LoRA scale s.
        saves: whether forward saves gate, up and the low-rank products for backward.
        alpha: of the activation.
        limit: of the activation.
        biases: float32 [E, out], contiguous, by name as in the layer; none for a layer without.
        base: packed weights by name of the projection. Any object that the layer holds them in.
        versions: those of ``base`` in forward.
    """

    shape: Shape
    route: Route
    tokens: int
    top_k: int
    num_experts: int
    rank: int
    scale: float
    saves: bool
    alpha: float
    limit: float
    biases: Mapping[str, Any]
    base: Mapping[str, Any]
    versions: tuple[int, ...]

    @property
    def rows(self) -> int:
        """S, slots that are kept."""
        return self.route.row_token.size

    def saved(self) -> tuple[Saved, ...]:
        """What forward leaves for backward beside its inputs."""
        return saved_tensors(self.shape.intermediate, self.rows, self.rank) if self.saves else ()


def run(
    pass_name: PassName, call: Call, row_weight: npt.NDArray[np.float32], tensors: Mapping[str, int], threads: int
) -> None:
    """Run one pass on the kernels.

    Args:
        pass_name: "forward" or "backward".
        call: routing and sizes.
        row_weight: [S] float32 routing weight of each row.
        tensors: addresses and strides under the names of :data:`jitmoe.jit.abi.FIELDS`. ``result`` where out, or the
            gradient of x, is bfloat16, ``result_float`` where it is float32; ``gate.saved`` and so on where forward
            saves, or has saved. The gradient of the routing weights is zero before backward; those of LoRA are left
            alone for experts without rows.
        threads: to use; results do not depend on it.

    Raises:
        KernelError: a name that the kernels do not know.
        PlanError: two live buffers of scratch would share addresses.
        MemoryError: there is no memory for the scratch.
    """
    watcher = observer.current()
    shape = call.shape
    if watcher is not None:
        watcher.planning()
        shape = replace(shape, watch=watcher.watch)
        threads = watcher.threads or threads
    threads = usable_threads(threads)
    training = pass_name == "backward"
    groups = plan_groups(
        call.route.active, call.route.offsets, shape.m_step, row_bytes(shape, training), supplies().group_bytes
    )
    extents = groups.extents(call.tokens, call.rank, threads)
    if training:
        wants_x = not tensors.keys().isdisjoint({"result", "result_float"})
        plan = supplies().plan_backward(shape, extents, wants_x, "gate.saved" not in tensors)
    else:
        plan = supplies().plan_forward(shape, extents)
    kernels = supplies().load(shape)
    with supplies().arenas.lease(plan.nbytes) as arena:
        record = abi.record({**plan.fields(arena), **_routing(call, groups, row_weight, threads), **tensors})
        launch = Launch(pass_name, shape, kernels, record, plan, arena, call.route, row_weight, call.top_k)
        with nullcontext() if watcher is None else watcher.around(launch):
            kernels.run(pass_name, record)


def _routing(call: Call, groups: Groups, row_weight: npt.NDArray[np.float32], threads: int) -> dict[str, int | float]:
    """The fields of the routing and the numbers of the call. The arrays stay with ``call`` and ``groups``."""
    return {
        "row_token": call.route.row_token.ctypes.data,
        "row_slot": call.route.row_slot.ctypes.data,
        "row_weight": row_weight.ctypes.data,
        "segments": groups.segments.ctypes.data,
        "group_segments": groups.bounds.ctypes.data,
        "groups": len(groups.bounds) - 1,
        "tokens": call.tokens,
        "rows": call.rows,
        "rank": call.rank,
        "threads": threads,
        "scale": call.scale,
        "alpha": call.alpha,
        "limit": call.limit,
        "gather_rows": supplies().gather_rows(),
        "sum_rows": supplies().sum_rows(),
    }
