"""The layer in plain torch: what it computes, said once and slowly.

The reference documents the arithmetic. It computes in the dtype of ``x``: on float64 inputs it is the oracle of every
test, on bfloat16 inputs the plain PyTorch layer whose error bounds our own.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from jitmoe.config import MoEConfig


class LoraTensors(NamedTuple):
    """The six trainable tensors, under the names that the layer's parameters carry.

    ``lora_a`` is [E, r, in] and ``lora_b`` [E, out, r]: E experts, rank r; in and out are H and I, of down I and H.
    """

    gate_lora_a: Tensor
    gate_lora_b: Tensor
    up_lora_a: Tensor
    up_lora_b: Tensor
    down_lora_a: Tensor
    down_lora_b: Tensor


@dataclass(frozen=True)
class Activation:
    """What makes a of gate and up; the fields of :class:`~jitmoe.config.MoEConfig` with the same meaning."""

    name: str = MoEConfig.activation
    alpha: float = MoEConfig.activation_alpha
    limit: float = MoEConfig.activation_limit

    @classmethod
    def of(cls, config: MoEConfig) -> "Activation":
        """That of a layer."""
        return cls(config.activation, config.activation_alpha, config.activation_limit)

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        """a [S, I] of gate and up [S, I], in their dtype."""
        if self.name == "silu":
            return silu(gate) * up
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        if self.name == "silu_clamped":
            return silu(gate) * up
        assert self.name == "gpt_oss", self.name
        return gate * torch.sigmoid(self.alpha * gate) * (up + 1)


SILU = Activation()


class Biases(NamedTuple):
    """Biases of the projections: gate and up [E, I], down [E, H]; of one expert without the first axis."""

    gate: Tensor
    up: Tensor
    down: Tensor


class ExpertSteps(NamedTuple):
    """What one expert computes: gate and up [S, I] before the activation, and out [S, H] without routing weights."""

    gate: Tensor
    up: Tensor
    out: Tensor


def moe_reference(
    x: Tensor,
    topk_ids: Tensor,
    weights: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    lora: LoraTensors | None = None,
    scale: float = 1.0,
    activation: Activation = SILU,
    biases: Biases | None = None,
) -> Tensor:
    """Weighted sum over each token's experts of ``down(activation(gate(x), up(x)))``.

    Args:
        x: [T, H] tokens. Every other floating tensor must have the dtype of ``x``; ``weights`` is cast to it.
        topk_ids: [T, K] integer expert of each slot. A slot with an id outside [0, E) adds nothing; an expert that a
            token names twice counts twice.
        weights: [T, K] routing weights.
        gate_proj: [E, I, H] base weights of gate.
        up_proj: [E, I, H] base weights of up.
        down_proj: [E, H, I] base weights of down.
        lora: the adapters of all three projections, or None for a layer without.
        scale: s = alpha / r (or alpha / sqrt(r)), the factor of every adapter.
        activation: silu(gate) * up, or another.
        biases: of the projections, or None for a layer without.

    Returns:
        [T, H] in the dtype of ``x``, differentiable in every floating tensor.
    """
    # Backward of unbind stacks the experts' gradients once; that of indexing would add E padded copies.
    projections = zip(gate_proj.unbind(0), up_proj.unbind(0), down_proj.unbind(0), strict=True)
    adapters = list(zip(*(tensor.unbind(0) for tensor in lora), strict=True)) if lora else None
    weights = weights.to(x.dtype)
    out = torch.zeros_like(x)
    for expert, (gate, up, down) in enumerate(projections):
        pairs = LoraTensors(*adapters[expert]) if adapters else None
        tokens, slots = torch.where(topk_ids == expert)
        bias = Biases(*(tensor[expert].to(x.dtype) for tensor in biases)) if biases else None
        result = expert_reference(x[tokens], gate, up, down, pairs, scale, activation, bias).out
        out.index_add_(0, tokens, result * weights[tokens, slots, None])
    return out


def expert_reference(
    rows: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    lora: LoraTensors | None,
    scale: float,
    activation: Activation = SILU,
    biases: Biases | None = None,
) -> ExpertSteps:
    """One expert on ``rows`` [S, H]: matrices as in :func:`moe_reference`, without their first axis."""
    gate_bias, up_bias, down_bias = biases or (None, None, None)
    gate = _lin(rows, gate_proj, gate_bias, lora and lora[0:2], scale)
    up = _lin(rows, up_proj, up_bias, lora and lora[2:4], scale)
    return ExpertSteps(gate, up, _lin(activation(gate, up), down_proj, down_bias, lora and lora[4:6], scale))


def _lin(rows: Tensor, weight: Tensor, bias: Tensor | None, adapter: tuple[Tensor, ...] | None, scale: float) -> Tensor:
    """The design's ``lin``: v Wᵀ + b + s (v Aᵀ) Bᵀ, with ``adapter`` = (A, B)."""
    result = linear(rows, weight, bias)
    if adapter is None:
        return result
    lora_a, lora_b = adapter
    return result + linear(linear(rows, lora_a), lora_b) * scale
