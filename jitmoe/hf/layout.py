"""How an experts module keeps its weights: fused, transposed or interleaved, and back to gate, up and down."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from jitmoe.config import MoEConfig
from jitmoe.experts.quantized import Quantized
from jitmoe.formats import BFLOAT16, Packing
from jitmoe.jit import kernels
from jitmoe.jit.capability import resolve_isa
from jitmoe.plan.shapes import plan_kernels

WeightName = Literal["gate_up_proj", "down_proj"]

PARTS: dict[WeightName, tuple[str, ...]] = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}
"""Parameters of an experts module, and the projections that each one holds."""


@dataclass(frozen=True)
class Layout:
    """Sizes of an experts module, and where its matrices have what.

    Attributes:
        experts: E.
        hidden: H.
        intermediate: I.
        transposed: matrices are [in, out], as in gpt-oss, instead of [out, in].
        interleaved: outputs of gate and up take turns, instead of all of gate and then all of up.
    """

    experts: int
    hidden: int
    intermediate: int
    transposed: bool = False
    interleaved: bool = False

    def extent(self, part: str) -> tuple[int, int]:
        """(out, in) of "gate", "up" or "down"."""
        return (self.hidden, self.intermediate) if part == "down" else (self.intermediate, self.hidden)

    def matrix_shape(self, parts: tuple[str, ...]) -> tuple[int, int]:
        """Of one expert's matrix that holds these projections."""
        out, in_ = self.extent(parts[0])
        out *= len(parts)
        return (in_, out) if self.transposed else (out, in_)

    def split(self, matrix: Tensor, parts: tuple[str, ...]) -> list[Tensor]:
        """Matrices [..., out, in] of ``parts`` in one of :meth:`matrix_shape`, as views."""
        rows = matrix.mT if self.transposed else matrix
        if len(parts) == 1:
            return [rows]
        if self.interleaved:
            return [rows[..., start :: len(parts), :] for start in range(len(parts))]
        return list(rows.chunk(len(parts), dim=-2))

    def split_any(self, matrix: Tensor | Quantized, parts: tuple[str, ...]) -> Sequence[Tensor | Quantized]:
        """:meth:`split`, also of quantised matrices: always [out, in], and a part's rows have their own scales."""
        if not isinstance(matrix, Quantized):
            return self.split(matrix, parts)
        halves = (self._outputs(tensor, len(parts)) for tensor in (matrix.values, matrix.scales))
        return [Quantized(values, scales) for values, scales in zip(*halves, strict=True)]

    def _outputs(self, tensor: Tensor, parts: int) -> Sequence[Tensor]:
        """Rows of each part of [out, ...]."""
        if self.interleaved:
            return [tensor[start::parts] for start in range(parts)]
        return tensor.chunk(parts)

    def join(self, matrices: list[Tensor]) -> Tensor:
        """The inverse of :meth:`split`, contiguous."""
        rows = matrices[0]
        if len(matrices) > 1:
            rows = torch.stack(matrices, dim=-2).flatten(-3, -2) if self.interleaved else torch.cat(matrices, dim=-2)
        return (rows.mT if self.transposed else rows).contiguous()

    def split_vector(self, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Gate's and up's biases [E, I] in one [E, 2 I]."""
        if self.interleaved:
            return bias[..., 0::2], bias[..., 1::2]
        gate, up = bias.chunk(2, dim=-1)
        return gate, up

    def fused_b(self, b: Tensor) -> Tensor:
        """B [E, 2 I, r] of gate and up as a view [E, 2, I, r]."""
        experts, _, rank = b.shape
        if self.interleaved:
            return b.view(experts, self.intermediate, 2, rank).transpose(1, 2)
        return b.view(experts, 2, self.intermediate, rank)

    def packing_kernels(self, packing: Packing = BFLOAT16) -> kernels.Kernels:
        """An instance that packs and unpacks matrices of these sizes in this format."""
        return _packing_kernels(self.experts, self.hidden, self.intermediate, packing)


@lru_cache(maxsize=64)
def _packing_kernels(experts: int, hidden: int, intermediate: int, packing: Packing) -> kernels.Kernels:
    config = MoEConfig(experts, hidden, intermediate, top_k=1, lora_rank=0, **options_of(packing))
    return kernels.load(plan_kernels(config, resolve_isa(config.requested_isa)).shapes[-1])


def options_of(packing: Packing) -> dict[str, Any]:
    """The fields of :class:`~jitmoe.config.MoEConfig` that say this packing."""
    if not packing.quantized:
        return {}
    group = packing.group if packing.format.name == "int4_group" else 32
    return {"weight_format": packing.format.name, "group_size": group, "scale_dtype": packing.scale}
