"""The one table of weight formats: how frozen base weights are shipped, and how many bytes they take when packed.

In every format a weight is ``bfloat16(code * scale)``: the product as float32, rounded to nearest even. The layer has
the bits of the bfloat16 layer on these weights.
"""

import math
from dataclasses import dataclass
from typing import Literal

WeightFormat = Literal["bfloat16", "fp8_block", "fp8_row", "int4_group", "mxfp4", "int8_row"]
"""Formats of the base weights; mirrors ``Format`` in shape.hpp."""

ScaleDtype = Literal["none", "float32", "bfloat16", "float16", "e8m0"]
"""What scales are; mirrors ``Scale`` in shape.hpp. ``none`` for bfloat16 weights alone."""

GROUP_SIZES = (32, 64, 128)
"""Inputs that may share a scale in ``int4_group``."""

BLOCK = 32
"""Rows and columns of a packed block; sizes are padded to it."""

SQUARE = 128
"""Rows and columns that share a scale in ``fp8_block``."""

LINE = 64
"""Bytes: packed weights of an expert take whole cache lines."""

ITEM_BYTES = {"bfloat16": 2, "float8_e4m3fn": 1, "int32": 4, "uint8": 1, "int8": 1}
"""Bytes of an item of the values as shipped."""

SCALE_BYTES: dict[ScaleDtype, int] = {"none": 0, "float32": 4, "bfloat16": 2, "float16": 2, "e8m0": 1}


@dataclass(frozen=True)
class Format:
    """One weight format.

    Attributes:
        name: as in ``enum class Format`` of shape.hpp.
        value_dtype: torch's name of the dtype of the values as shipped.
        bits: of one value.
        scales: dtypes that scales may have, the usual one first.
        sharing: the weights that share a scale: 128 x 128 of them, those of an output (a row), or a group of inputs.
    """

    name: WeightFormat
    value_dtype: str
    bits: int
    scales: tuple[ScaleDtype, ...]
    sharing: Literal["nothing", "square", "row", "group"]


@dataclass(frozen=True)
class Packing:
    """A format with all that decides where a weight lies, and how many bytes it takes.

    Attributes:
        format: the row of :data:`FORMATS`.
        group: inputs that share a scale where groups share one, else 0.
        scale: dtype of the scales.
    """

    format: Format
    group: int
    scale: ScaleDtype

    @property
    def quantized(self) -> bool:
        """Whether there are scales."""
        return self.scale != "none"

    def value_shape(self, out: int, in_: int) -> tuple[int, ...]:
        """Shape of the values of one matrix [out, in] as shipped."""
        if self.format.name == "int4_group":
            return out, _ceil_div(in_, 8)
        return (out, _ceil_div(in_, 32), 16) if self.format.name == "mxfp4" else (out, in_)

    @property
    def granule(self) -> int:
        """Columns of I of which parts take multiples: strips of packed weights, and never half of what shares a scale.

        A format whose scales belong to rows keeps strips: parts of down share their scales.
        """
        shared = {"square": SQUARE, "group": self.group}.get(self.format.sharing, BLOCK)
        return max(shared, BLOCK)

    def value_bytes(self, out: int, in_: int) -> int:
        """Bytes of the values of one matrix [out, in] as shipped."""
        return math.prod(self.value_shape(out, in_)) * ITEM_BYTES[self.format.value_dtype]

    def scale_shape(self, out: int, in_: int) -> tuple[int, ...]:
        """Shape of the scales of one matrix [out, in] as shipped."""
        if self.format.sharing == "square":
            return _ceil_div(out, SQUARE), _ceil_div(in_, SQUARE)
        if self.format.sharing == "group":
            return out, _ceil_div(in_, self.group)
        return (out, 1) if self.format.name == "fp8_row" else (out,)

    def packed_bytes(self, out: int, in_: int) -> int:
        """Bytes of one packed matrix [out, in]; mirrors ``Layout::items`` in weights/layout.hpp."""
        rows, columns = _round_up(out, BLOCK), _round_up(in_, BLOCK)
        codes = rows * columns * self.format.bits // 8
        if not self.quantized:
            return codes
        _, *groups = self.scale_shape(out, in_)
        scale_rows = _ceil_div(out, SQUARE) if self.format.sharing == "square" else rows
        return _round_up(codes + scale_rows * math.prod(groups) * SCALE_BYTES[self.scale], LINE)


FORMATS: dict[WeightFormat, Format] = {
    found.name: found
    for found in (
        Format("bfloat16", "bfloat16", 16, ("none",), "nothing"),
        Format("fp8_block", "float8_e4m3fn", 8, ("float32",), "square"),
        Format("fp8_row", "float8_e4m3fn", 8, ("float32", "bfloat16"), "row"),
        Format("int4_group", "int32", 4, ("bfloat16", "float16", "float32"), "group"),
        Format("mxfp4", "uint8", 4, ("e8m0",), "group"),
        Format("int8_row", "int8", 8, ("float32",), "row"),
    )
}


BFLOAT16 = Packing(FORMATS["bfloat16"], 0, "none")


def packing_of(name: WeightFormat, group_size: int, scale: ScaleDtype | None = None) -> Packing:
    """The packing of a format; ``group_size`` counts for int4_group alone, ``scale`` is the usual one by default."""
    found = FORMATS[name]
    group = {"int4_group": group_size, "mxfp4": 32}.get(name, 0)
    return Packing(found, group, scale or found.scales[0])


def _ceil_div(value: int, step: int) -> int:
    return -(-value // step)


def _round_up(value: int, step: int) -> int:
    return _ceil_div(value, step) * step
