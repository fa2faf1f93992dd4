"""Quantised base weights as they are shipped: values and their scales."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jitmoe.errors import InputError, InputTypeError
from jitmoe.experts.inputs import check_plain
from jitmoe.formats import Packing, ScaleDtype

SCALE_DTYPES: dict[ScaleDtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "e8m0": torch.uint8,
}


@dataclass(frozen=True, eq=False)
class Quantized:
    """Values and scales of one matrix [out, in] of an expert, or with a first axis E of all of them.

    Where a size is no multiple of what it is divided by, the last word, group or square is in part.

    ==========  ==========================================  ====================================================
    format      values                                      scales, which values are multiplied by
    ==========  ==========================================  ====================================================
    fp8_block   float8_e4m3fn [out, in]                     float32 [out / 128, in / 128]
    fp8_row     float8_e4m3fn [out, in]                     float32 or bfloat16 [out, 1]
    int4_group  int32 [out, in / 8]: value + 8 in nibbles   bfloat16, float16 or float32 [out, in / group]
                from the lowest on
    mxfp4       uint8 [out, in / 32, 16]: the low nibble    uint8 [out, in / 32]: exponent + 127
                is the even input
    int8_row    int8 [out, in]                              float32 [out]
    ==========  ==========================================  ====================================================
    """

    values: Tensor
    scales: Tensor

    def __getitem__(self, expert: int) -> "Quantized":
        """Those of one expert, of stacked ones."""
        return Quantized(self.values[expert], self.scales[expert])


ExpertSource = (
    Tensor | Quantized | Sequence[Tensor] | Sequence[Quantized] | Callable[[int], Tensor] | Callable[[int], Quantized]
)
"""Where the matrices [out, in] of the experts come from: one stacked tensor [E, out, in], a sequence of E matrices, or
a function from the expert's number to its matrix, which is called once per expert and whose result is let go before
the next call. In a quantised format each of these is :class:`Quantized` in place of a tensor."""


def flat(base: Mapping[str, Tensor | Quantized]) -> dict[str, Tensor]:
    """Base weights as tensors alone: the scales of ``gate_proj`` are ``gate_proj_scale``."""
    tensors: dict[str, Tensor] = {}
    for name, matrix in base.items():
        if isinstance(matrix, Quantized):
            tensors |= {name: matrix.values, f"{name}_scale": matrix.scales}
        else:
            tensors[name] = matrix
    return tensors


def with_scales(tensors: Mapping[str, Any], name: str, scale_name: str, packing: Packing) -> Tensor | Quantized:
    """The inverse of :func:`flat` for one base weight.

    Raises:
        InputError: the format has scales, and they are missing.
    """
    values: Tensor = tensors[name]
    if not packing.quantized:
        return values
    if scale_name not in tensors:
        raise InputError(f"{name} has no scales: {scale_name} is missing, and weight_format is {packing.format.name}")
    return Quantized(values, tensors[scale_name])


def check_base(
    name: str, matrix: object, lead: tuple[int, ...], out: int, in_: int, packing: Packing
) -> tuple[Tensor, Tensor | None]:
    """Values and scales of a base weight [*lead, out, in], found right.

    Raises:
        InputTypeError: not what the format is shipped as, or another dtype.
        InputError: another shape, or no dense CPU tensor.
    """
    if not packing.quantized:
        if isinstance(matrix, Quantized):
            raise InputTypeError(f"{name} is Quantized, and the config's weight_format is bfloat16: set weight_format")
        return _check(name, matrix, torch.bfloat16, (*lead, out, in_), ""), None
    form = packing.format
    if not isinstance(matrix, Quantized):
        got = f"{matrix.dtype} tensor" if isinstance(matrix, Tensor) else type(matrix).__name__
        raise InputTypeError(f"{name} must be jitmoe.Quantized(values, scales) of {form.name}, got a {got}")
    values, scales = getattr(torch, form.value_dtype), SCALE_DTYPES[packing.scale]
    hint = f"; scale_dtype in the config may be {' or '.join(form.scales)}" if len(form.scales) > 1 else ""
    return (
        _check(f"values of {name}", matrix.values, values, (*lead, *packing.value_shape(out, in_)), ""),
        _check(f"scales of {name}", matrix.scales, scales, (*lead, *packing.scale_shape(out, in_)), hint),
    )


def _check(name: str, tensor: object, dtype: torch.dtype, shape: tuple[int, ...], hint: str) -> Tensor:
    check_plain(name, tensor)
    assert isinstance(tensor, Tensor)
    if tensor.dtype != dtype:
        hint = hint or (f"; {_advice(tensor.dtype)}" if dtype == torch.bfloat16 else "")
        raise InputTypeError(f"{name} must be {str(dtype).removeprefix('torch.')}, got {tensor.dtype}{hint}")
    if tuple(tensor.shape) != shape:
        raise InputError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.device.type != "cpu" or tensor.layout != torch.strided:
        raise InputError(f"{name} must be a dense CPU tensor, got device {tensor.device}, layout {tensor.layout}")
    return tensor.detach()


def _advice(dtype: torch.dtype) -> str:
    if dtype in (torch.float16, torch.float32, torch.float64):
        return "convert it with .to(torch.bfloat16)"
    return (
        "its values are numbers of a quantised format, which mean nothing without their scales: name the format in "
        "weight_format and pass jitmoe.Quantized(values, scales), or dequantise them (values times scales, in float32)"
    )
