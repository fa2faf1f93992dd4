"""The experts as one differentiable torch function."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.autograd.function import once_differentiable

from jitmoe import experts, tracing
from jitmoe.config import MoEConfig
from jitmoe.errors import WeightsChangedError
from jitmoe.memory import saved_shape
from jitmoe.pack import version_of
from jitmoe.plan import Shape
from jitmoe.route import Route

SAVED_NAMES = ("saved_gate", "saved_up")
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

    def expert_call(self, weights: torch.Tensor, tokens: int) -> experts.ExpertCall:
        """Sizes and routing of the call; [S] routing weights in the order of the rows."""
        by_slot: npt.NDArray[np.float32] = weights.detach().float().resolve_neg().contiguous().numpy().reshape(-1)
        return experts.ExpertCall(
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

    Saves its inputs, and gate and up before the activation in bfloat16 (4 I bytes a row) unless
    ``config.recompute``; everything is kept per call, so any order of backwards is right.
    """

    @staticmethod
    @_memory_errors()
    def forward(
        ctx: Any, context: CallContext, x: torch.Tensor, weights: torch.Tensor, *lora: torch.Tensor
    ) -> torch.Tensor:
        """Run the experts; see the class."""
        tokens, hidden = x.shape
        out = torch.empty(tokens, hidden, dtype=x.dtype, device=x.device)
        operand = x.to(torch.bfloat16)
        saved: tuple[torch.Tensor, ...] = ()
        if context.saves and not context.config.recompute:
            rows = context.route.row_token.size
            extent = saved_shape(context.shape.intermediate, rows)
            saved = tuple(torch.empty(*extent, dtype=torch.bfloat16, device=x.device) for _ in range(2))
        tensors = _inputs(context, operand, lora) | _result(out) | dict(zip(SAVED_NAMES, saved, strict=False))
        tracing.forward(context.expert_call(weights, tokens), _addresses(tensors))
        ctx.context = context
        ctx.save_for_backward(x, weights, *lora, *saved)
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
        lora, saved = rest[:count], rest[count:]
        operand, out_operand = (t.to(torch.bfloat16).contiguous().resolve_neg() for t in (x, out_grad))
        x_grad = torch.empty_like(x) if ctx.needs_input_grad[1] else None
        weights_grad = torch.zeros_like(weights, dtype=torch.float32, memory_format=torch.contiguous_format)
        wanted = ctx.needs_input_grad[3:]
        lora_grads = [torch.zeros_like(p, dtype=torch.float32) for p in lora] if any(wanted) else []
        tensors = (
            _inputs(context, operand, lora)
            | ({} if x_grad is None else _result(x_grad))
            | {f"{name}_grad": grad for name, grad in zip(LORA_NAMES, lora_grads, strict=False)}
            | dict(zip(SAVED_NAMES, saved, strict=False))
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


def _inputs(context: CallContext, operand: torch.Tensor, lora: Any) -> dict[str, torch.Tensor]:
    packed = {f"{name}_weights": tensor for name, tensor in context.packed.items()}
    return {"x": operand, **packed, **dict(zip(LORA_NAMES, lora, strict=False))}


def _result(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"result_float" if tensor.dtype == torch.float32 else "result": tensor}


def _addresses(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in tensors.items()}
