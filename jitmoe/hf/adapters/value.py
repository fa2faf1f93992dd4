"""The LoRA of a model's experts, in no project's layout: every reader makes it, every writer takes it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from jitmoe.errors import AdapterError


@dataclass(frozen=True, eq=False)
class Pair:
    """LoRA of one projection in all experts of a layer: ``delta W_e = scale * b[e] @ a[e]``.

    Attributes:
        a: [E, r, in].
        b: [E, out, r].
        scale: alpha / r, or alpha / sqrt(r) with rsLoRA.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    @property
    def rank(self) -> int:
        """The rank r."""
        return self.a.shape[1]


@dataclass(frozen=True, eq=False)
class LayerAdapter:
    """LoRA of the experts of one layer.

    Attributes:
        prefix: path of the experts in the file, such as ``base_model.model.model.layers.0.mlp.experts``.
        gate: a [E, r, H], b [E, I, r].
        up: likewise; ``up.a`` may be ``gate.a``.
        down: a [E, r, I], b [E, H, r].

    Raises:
        AdapterError: the shapes belong to no experts, or the dtypes differ.
    """

    prefix: str
    gate: Pair
    up: Pair
    down: Pair

    def __post_init__(self) -> None:
        for name, pair in self.pairs():
            if pair.a.dim() != 3 or pair.b.dim() != 3 or pair.a.shape[1] != pair.b.shape[2] or not pair.rank:
                raise AdapterError(
                    f"{self.prefix}: A of {name} is {list(pair.a.shape)} and B {list(pair.b.shape)}, expected "
                    "[experts, rank, in] and [experts, out, rank]"
                )
        experts = {f"{name}: {len(pair.a)} and {len(pair.b)}" for name, pair in self.pairs()}
        if len({len(tensor) for tensor in self.tensors()}) > 1:
            raise AdapterError(
                f"{self.prefix}: the numbers of experts in A and B differ ({', '.join(sorted(experts))})"
            )
        hidden = {self.gate.a.shape[2], self.up.a.shape[2], self.down.b.shape[1]}
        intermediate = {self.gate.b.shape[1], self.up.b.shape[1], self.down.a.shape[2]}
        if len(hidden) > 1 or len(intermediate) > 1:
            raise AdapterError(
                f"{self.prefix}: gate, up and down belong to different layers: hidden sizes {sorted(hidden)}, "
                f"intermediate sizes {sorted(intermediate)}"
            )
        dtypes = {tensor.dtype for tensor in self.tensors()}
        if len(dtypes) > 1 or not next(iter(dtypes)).is_floating_point:
            raise AdapterError(f"{self.prefix}: dtypes {sorted(map(str, dtypes))}, expected one floating point type")

    def pairs(self) -> Iterator[tuple[str, Pair]]:
        """Name and LoRA of each projection."""
        return iter((("gate", self.gate), ("up", self.up), ("down", self.down)))

    def tensors(self) -> Iterator[torch.Tensor]:
        """A and B of each projection."""
        for _, pair in self.pairs():
            yield from (pair.a, pair.b)

    @property
    def shares_a(self) -> bool:
        """Whether gate and up have the same A, bit for bit, and the same scale."""
        return self.gate.scale == self.up.scale and same_bits(self.gate.a, self.up.a)


@dataclass(frozen=True, eq=False)
class ExpertAdapter:
    """An adapter of a model's experts.

    Attributes:
        layers: in the order of the file's keys.
        rslora: whether alpha is written as rsLoRA has it; the scales do not depend on it.
        others: tensors that belong to no routed expert, under their names in the file.
        config: the ``adapter_config.json`` that came with the file, or nothing. Ranks and alphas of ``others`` are
            those that it says.
    """

    layers: tuple[LayerAdapter, ...]
    rslora: bool = False
    others: Mapping[str, torch.Tensor] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are equal bit for bit, NaN included."""
    if one is other:
        return True
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
