"""The experts as one differentiable torch function."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.autograd.function import once_differentiable

from jitmoe.config import MoEConfig
from jitmoe.errors import WeightsChangedError
from jitmoe.experts import call
from jitmoe.experts.pack import version_of
from jitmoe.experts.workspace import PAGE, blocks
from jitmoe.host.route import Route
from jitmoe.inspect import tracing
from jitmoe.plan.scratch import Saved, saved_tensors
from jitmoe.plan.shapes import Shape

LORA_NAMES = ("gate_lora_a", "gate_lora_b", "up_lora_a", "up_lora_b", "down_lora_a", "down_lora_b")


@dataclass(frozen=True)
class CallContext:
    """What one call needs beside its differentiable inputs; ``versions`` are those of ``packed`` in forward."""

    config: MoEConfig
    shape: Shape
    route: Route
    packed: dict[str, torch.Tensor]
    versions: tuple[int, ...]
    saves: bool

    def saved_tensors(self) -> tuple[Saved, ...]:
        """What forward leaves for backward beside its inputs."""
        if not self.saves or self.config.recompute:
            return ()
        return saved_tensors(self.config.intermediate_size, self.route.row_token.size, self.config.lora_rank)

    def expert_call(self, weights: torch.Tensor, tokens: int) -> call.ExpertCall:
        """Sizes and routing of the call; [S] routing weights in the order of the rows."""
        by_slot: npt.NDArray[np.float32] = weights.detach().float().resolve_neg().contiguous().numpy().reshape(-1)
        return call.ExpertCall(
            shape=self.shape,
            route=self.route,
            row_weight=by_slot[self.route.row_slot],
            tokens=tokens,
            rank=self.config.lora_rank,
            scale=self.config.lora_scale,
            threads=torch.get_num_threads(),
        )


def versions_of(packed: dict[str, torch.Tensor]) -> tuple[int, ...]:
    """How often each of the packed weights has been written to."""
    return tuple(map(version_of, packed.values()))


@contextmanager
def _memory_errors() -> Iterator[None]:
    """Where the system has no memory left, torch's allocator says RuntimeError and everything else MemoryError."""
    try:
        yield
    except RuntimeError as error:
        if "allocate memory" in str(error):
            raise MemoryError(str(error)) from error
        raise


class MoEFunction(torch.autograd.Function):
    """x [T, H], routing weights [T, K] and six LoRA tensors -> out [T, H].

    Saves its inputs and, unless ``config.recompute``, gate and up before the activation in bfloat16 and the three
    low-rank products in float32 (4 I + 12 r bytes a row); everything is kept per call, so any order of backwards is
    right.
    """

    @staticmethod
    @_memory_errors()
    def forward(
        ctx: Any, context: CallContext, x: torch.Tensor, weights: torch.Tensor, *lora: torch.Tensor
    ) -> torch.Tensor:
        """Run the experts; see the class."""
        tokens, hidden = x.shape
        out = empty((tokens, hidden), x.dtype)
        operand = x.to(torch.bfloat16)
        saved = {s.name: empty(s.shape, getattr(torch, s.dtype)) for s in context.saved_tensors()}
        tensors = _inputs(context, operand, lora) | _result(out) | saved
        tracing.forward(context.expert_call(weights, tokens), _addresses(tensors))
        ctx.context = context
        ctx.save_for_backward(x, weights, *lora, *saved.values())
        return out

    @staticmethod
    @once_differentiable
    @_memory_errors()
    def backward(ctx: Any, out_grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x, of the routing weights and of the LoRA tensors that want one."""
        context: CallContext = ctx.context
        count = len(LORA_NAMES) if context.config.lora_rank else 0
        x, weights, *rest = ctx.saved_tensors
        if versions_of(context.packed) != context.versions:
            raise WeightsChangedError(
                "base weights were loaded or written between forward and backward: run forward again"
            )
        lora = rest[:count]
        saved = {s.name: tensor for s, tensor in zip(context.saved_tensors(), rest[count:], strict=True)}
        operand, out_operand = (t.to(torch.bfloat16).contiguous().resolve_neg() for t in (x, out_grad))
        x_grad = empty(x.shape, x.dtype) if ctx.needs_input_grad[1] else None
        weights_grad = torch.zeros_like(weights, dtype=torch.float32, memory_format=torch.contiguous_format)
        wanted = ctx.needs_input_grad[3:]
        lora_grads = _lora_gradients(context, lora) if any(wanted) else []
        tensors = (
            _inputs(context, operand, lora)
            | ({} if x_grad is None else _result(x_grad))
            | {f"{name}_grad": grad for name, grad in zip(LORA_NAMES, lora_grads, strict=False)}
            | saved
            | {"out_grad": out_operand, "weights_grad": weights_grad}
        )
        tracing.backward(context.expert_call(weights, x.shape[0]), _addresses(tensors))
        results = [g.to(p.dtype) if w else None for g, p, w in zip(lora_grads, lora, wanted, strict=False)]
        return (
            None,
            x_grad,
            weights_grad.to(weights.dtype) if ctx.needs_input_grad[2] else None,
            *(results or [None] * count),
        )


def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A contiguous tensor of any contents; large ones reuse the memory of those of former calls."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < PAGE:
        return torch.empty(shape, dtype=dtype, device="cpu")
    memory = torch.from_numpy(blocks.take(nbytes))
    # Detached, it is no view: torch refuses writes in place, as in ``y += shared``, to one that a Function returned.
    return memory.view(dtype).view(shape).detach()


def _lora_gradients(context: CallContext, lora: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Float32 gradients for the kernel, which writes those of experts with rows: zero for the others."""
    if 2 * context.route.active.size < context.config.num_experts:
        # Fresh pages are zero, and most of them will not be touched.
        return [torch.zeros_like(p, dtype=torch.float32) for p in lora]
    grads = [empty(p.shape, torch.float32) for p in lora]
    for begin, end in context.route.absent(context.config.num_experts):
        for grad in grads:
            grad[begin:end].zero_()
    return grads


def _inputs(context: CallContext, operand: torch.Tensor, lora: Any) -> dict[str, torch.Tensor]:
    packed = {f"{name}_weights": tensor for name, tensor in context.packed.items()}
    return {"x": operand, **packed, **dict(zip(LORA_NAMES, lora, strict=False))}


def _result(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"result_float" if tensor.dtype == torch.float32 else "result": tensor}


def _addresses(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in tensors.items()}
