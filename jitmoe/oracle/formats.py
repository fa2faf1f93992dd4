"""What quantised base weights stand for, in plain torch: bfloat16(code * scale), the product as float32."""

import torch
from torch import Tensor

from jitmoe.formats import SQUARE, Packing

E2M1 = torch.tensor(
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0], device="cpu"
)
"""The codes of mxfp4 (OCP Microscaling Formats 1.0)."""


def dequantize(packing: Packing, values: Tensor, scales: Tensor, out: int, in_: int) -> Tensor:
    """bfloat16 [*, out, in] of values and scales as :class:`~jitmoe.experts.quantized.Quantized` has them."""
    return (codes_of(packing, values, in_) * scales_of(packing, scales, out, in_)).bfloat16()


def codes_of(packing: Packing, values: Tensor, in_: int) -> Tensor:
    """float32 [*, out, in] that the values stand for before they are scaled."""
    name = packing.format.name
    if name == "int4_group":
        nibbles = (values[..., None] >> torch.arange(0, 32, 4, device="cpu")) & 0xF
        return nibbles.flatten(-2)[..., :in_].float() - 8
    if name == "mxfp4":
        nibbles = torch.stack([values & 0xF, values >> 4], -1).flatten(-3)
        return E2M1[nibbles[..., :in_].long()]
    return values.float()


def scales_of(packing: Packing, scales: Tensor, out: int, in_: int) -> Tensor:
    """float32 scales, to be broadcast to [*, out, in]."""
    sharing = packing.format.sharing
    if sharing == "square":
        rows = scales.repeat_interleave(SQUARE, -2)[..., :out, :]
        return rows.repeat_interleave(SQUARE, -1)[..., :in_]
    if sharing == "group":
        if packing.scale == "e8m0":
            scales = torch.where(scales == 0xFF, torch.nan, torch.exp2(scales.double() - 127)).float()
        return scales.float().repeat_interleave(packing.group, -1)[..., :in_]
    return scales.float().reshape(
        *scales.shape[: scales.dim() - (1 if packing.format.name == "int8_row" else 2)], out, 1
    )
