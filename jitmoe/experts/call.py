"""One call of a part of the experts: plans its scratch, fills the record of the kernels, and runs them."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from torch import Tensor

from jitmoe.config import MoEConfig
from jitmoe.experts import observer
from jitmoe.experts.observer import Launch, PassName
from jitmoe.experts.supplies import supplies
from jitmoe.host.route import Route, route
from jitmoe.jit import abi
from jitmoe.plan.groups import Groups, plan_groups
from jitmoe.plan.scratch import row_bytes
from jitmoe.plan.shapes import Shape, plan_kernels
from jitmoe.process import usable_threads


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a part, routed; the one record of it.

    Attributes:
        shape: the kernel instance.
        route: rows sorted by expert.
        tokens: T.
        top_k: K.
        num_experts: E.
        rank: LoRA rank.
        scale: LoRA scale s.
        alpha: of the activation.
        limit: of the activation.
    """

    shape: Shape
    route: Route
    tokens: int
    top_k: int
    num_experts: int
    rank: int
    scale: float
    alpha: float
    limit: float

    @property
    def rows(self) -> int:
        """S, slots that are kept."""
        return self.route.row_token.size


def new_calls(config: MoEConfig, isa: str, topk_ids: Tensor, lora: Sequence[Tensor], scale: float) -> tuple[Call, ...]:
    """Route ``topk_ids`` [T, K] once and choose a kernel of ``isa`` for each part: one call a part.

    Raises:
        InputError: an expert id outside [0, E), without ``config.allow_skip``.
    """
    lora_dtype = str(lora[0].dtype).removeprefix("torch.") if lora else None
    routed = route(topk_ids.contiguous().numpy(), config.num_experts, config.allow_skip)
    return tuple(
        Call(
            shape=kernel_plan.select(routed.row_token.size, routed.active.size),
            route=routed,
            tokens=topk_ids.shape[0],
            top_k=config.top_k,
            num_experts=config.num_experts,
            rank=config.lora_rank,
            scale=scale,
            alpha=config.activation_alpha,
            limit=config.activation_limit,
        )
        for kernel_plan in plan_kernels(config, isa, lora_dtype).by_part
    )


def row_weights(call: Call, weights: Tensor) -> npt.NDArray[np.float32]:
    """[S] routing weights in the order of the rows, of ``weights`` [T, K]."""
    by_slot = weights.detach().float().contiguous().numpy().reshape(-1)
    by_row: npt.NDArray[np.float32] = by_slot[call.route.row_slot]
    return by_row


def run(
    pass_name: PassName,
    call: Call,
    row_weight: npt.NDArray[np.float32],
    tensors: Mapping[str, int],
    threads: int,
    node: int | None = None,
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
        node: NUMA node that they stay on, if they do.

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
    with supplies().arenas.lease(plan.nbytes, node) as arena:
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
