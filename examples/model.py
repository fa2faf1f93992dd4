"""A small decoder language model with Mixture-of-Experts layers, in plain torch.

The experts of a block are a module called as ``experts(x, topk_ids, weights)``: the plain ones below while the base is
trained, and a :class:`jitmoe.MoELayer` (or the plain ones again, to compare) while adapters are.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jitmoe.oracle.reference import LoraTensors, moe_reference

BASE_NAMES = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model; its words are bytes."""

    layers: int = 2
    hidden: int = 128
    heads: int = 4
    experts: int = 16
    intermediate: int = 64
    top_k: int = 2
    context: int = 128
    vocabulary: int = 256


class PlainExperts(nn.Module):
    """The experts as a loop of torch operations, in the dtype of ``base``.

    Args:
        base: the tensors named by ``BASE_NAMES``.
        adapter: LoRA tensors by name, trained as float32 parameters and cast for each call; empty for none.
        scale: factor of the adapters.
    """

    def __init__(self, base: Mapping[str, Tensor], adapter: Mapping[str, Tensor], scale: float) -> None:
        super().__init__()
        for name, tensor in (base | adapter).items():
            self.register_parameter(name, nn.Parameter(tensor))
        self.has_adapter, self.scale = bool(adapter), scale

    def forward(self, x: Tensor, topk_ids: Tensor, weights: Tensor) -> Tensor:
        """Result [T, hidden] for rows ``x`` [T, hidden] in the dtype of the base."""
        base = (self.get_parameter(name) for name in BASE_NAMES)
        lora = None
        if self.has_adapter:
            lora = LoraTensors(*(self.get_parameter(name).to(x.dtype) for name in LoraTensors._fields))
        return moe_reference(x, topk_ids, weights, *base, lora=lora, scale=self.scale)


def new_experts(config: ModelConfig) -> PlainExperts:
    """Untrained float32 experts without adapters."""
    shape = (config.experts, config.intermediate, config.hidden)
    gate, up = (torch.randn(shape) * config.hidden**-0.5 for _ in range(2))
    down = torch.randn(shape).transpose(1, 2).contiguous() * config.intermediate**-0.5
    return PlainExperts({"gate_proj": gate, "up_proj": up, "down_proj": down}, {}, scale=0.0)


def rotate(x: Tensor) -> Tensor:
    """Rotary position embedding of [..., time, features]."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2])[:, None] * 10_000.0 ** (-torch.arange(half) / half)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos()], dim=-1)


class Block(nn.Module):
    """Causal attention, then the experts that the router chooses, each on a normalised copy and added."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.top_k = config.heads, config.top_k
        self.attention_norm, self.expert_norm = nn.RMSNorm(config.hidden), nn.RMSNorm(config.hidden)
        self.queries_keys_values = nn.Linear(config.hidden, 3 * config.hidden, bias=False)
        self.attention_out = nn.Linear(config.hidden, config.hidden, bias=False)
        self.router = nn.Linear(config.hidden, config.experts, bias=False)
        self.experts: nn.Module = new_experts(config)
        self.expert_dtype = torch.float32

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states [batch, time, hidden] after this block."""
        hidden = hidden + self._attend(self.attention_norm(hidden))
        return hidden + self._mix(self.expert_norm(hidden))

    def _attend(self, x: Tensor) -> Tensor:
        heads = self.queries_keys_values(x).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(-3, -2)
        queries, keys, values = heads
        mixed = F.scaled_dot_product_attention(rotate(queries), rotate(keys), values, is_causal=True)
        return self.attention_out(mixed.transpose(-3, -2).flatten(-2))

    def _mix(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        logits, topk_ids = self.router(rows).topk(self.top_k, dim=-1)
        out = self.experts(rows.to(self.expert_dtype), topk_ids, logits.softmax(-1))
        return out.to(x.dtype).view_as(x)


class DecoderLM(nn.Module):
    """Embedding, blocks and head; the parameters of the experts are ``blocks.<n>.experts.*``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocabulary, config.hidden)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden)
        self.head = nn.Linear(config.hidden, config.vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Next-byte logits [batch, time, vocabulary] for bytes [batch, time]."""
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.norm(hidden))

    def loss(self, windows: Tensor) -> Tensor:
        """Mean negative log-likelihood, in nats per byte, of windows [batch, time + 1] of text."""
        logits = self(windows[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())

    def replace_experts(self, make: Callable[[int, nn.Module], nn.Module], dtype: torch.dtype) -> None:
        """Freeze everything, then put ``make(layer, old experts)``, called with rows in ``dtype``, into each block."""
        self.requires_grad_(False)
        for layer, block in enumerate(self.blocks):
            block.experts = make(layer, block.experts)
            block.expert_dtype = dtype
