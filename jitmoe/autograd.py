"""The experts as one differentiable torch function."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.autograd.function import once_differentiable

from jitmoe import experts
from jitmoe.config import MoEConfig
from jitmoe.plan import Shape
from jitmoe.route import Route

LORA_NAMES = ("gate_lora_a", "gate_lora_b", "up_lora_a", "up_lora_b", "down_lora_a", "down_lora_b")


@dataclass(frozen=True)
class CallContext:
    """What one call needs beside its differentiable inputs."""

    config: MoEConfig
    shape: Shape
    route: Route
    packed: dict[str, torch.Tensor]
    saves: bool

    def expert_call(self, weights: torch.Tensor, tokens: int) -> experts.ExpertCall:
        """Sizes and routing of the call; [S] routing weights in the order of the rows."""
        by_slot: npt.NDArray[np.float32] = weights.detach().float().contiguous().numpy().reshape(-1)
        return experts.ExpertCall(
            shape=self.shape,
            route=self.route,
            row_weight=by_slot[self.route.row_slot],
            tokens=tokens,
            rank=self.config.lora_rank,
            scale=self.config.lora_scale,
            threads=torch.get_num_threads(),
        )


class MoEFunction(torch.autograd.Function):
    """x [T, H], routing weights [T, K] and six LoRA tensors -> out [T, H].

    Saves its inputs, and gate and up before the activation in bfloat16 (4 I bytes a row) unless
    ``config.recompute``; everything is kept per call, so any order of backwards is right.
    """

    @staticmethod
    def forward(ctx: Any, context: CallContext, x: torch.Tensor, weights: torch.Tensor, *lora: torch.Tensor) -> torch.Tensor:
        """Run the experts; see the class."""
        tokens, hidden = x.shape
        out = torch.empty(tokens, hidden, dtype=x.dtype)
        operand = x.to(torch.bfloat16)
        saved: tuple[torch.Tensor, ...] = ()
        if context.saves and not context.config.recompute:
            rows = context.route.row_token.size
            saved = tuple(torch.empty(rows, context.shape.intermediate, dtype=torch.bfloat16) for _ in range(2))
        tensors = _inputs(context, operand, lora) | _result(out) | dict(zip(("saved_gate", "saved_up"), saved))
        experts.forward(context.expert_call(weights, tokens), _addresses(tensors))
        ctx.context = context
        ctx.save_for_backward(x, weights, *lora, *saved)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x, of the routing weights and of the LoRA tensors that want one."""
        context: CallContext = ctx.context
        count = len(LORA_NAMES) if context.config.lora_rank else 0
        x, weights, *rest = ctx.saved_tensors
        lora, saved = rest[:count], rest[count:]
        operand, out_operand = (t.to(torch.bfloat16).contiguous() for t in (x, out_grad))
        x_grad = torch.empty_like(x) if ctx.needs_input_grad[1] else None
        weights_grad = torch.zeros(weights.shape, dtype=torch.float32)
        lora_grads = [torch.zeros(p.shape, dtype=torch.float32) for p in lora] if any(ctx.needs_input_grad[3:]) else []
        tensors = (
            _inputs(context, operand, lora)
            | ({} if x_grad is None else _result(x_grad))
            | {f"{name}_grad": grad for name, grad in zip(LORA_NAMES, lora_grads)}
            | dict(zip(("saved_gate", "saved_up"), saved))
            | {"out_grad": out_operand, "weights_grad": weights_grad}
        )
        experts.backward(context.expert_call(weights, x.shape[0]), _addresses(tensors))
        wanted = ctx.needs_input_grad[3:]
        return (
            None,
            x_grad,
            weights_grad.to(weights.dtype) if ctx.needs_input_grad[2] else None,
            *(g.to(p.dtype) if w else None for g, p, w in zip(lora_grads or [weights] * count, lora, wanted)),
        )


def _inputs(context: CallContext, operand: torch.Tensor, lora: Any) -> dict[str, torch.Tensor]:
    packed = {f"{name}_weights": tensor for name, tensor in context.packed.items()}
    return {"x": operand, **packed, **dict(zip(LORA_NAMES, lora))}


def _result(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"result_float" if tensor.dtype == torch.float32 else "result": tensor}


def _addresses(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in tensors.items()}
