"""What belongs to a part of the intermediate dimension: pieces of base weights, of biases and of LoRA."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jitmoe.experts.quantized import Quantized
from jitmoe.experts.supplies import supplies
from jitmoe.formats import SQUARE, Packing
from jitmoe.plan.parts import Part
from jitmoe.plan.projections import Projection


@dataclass(frozen=True)
class _Cut:
    """The axis of a tensor along which it is cut, counted from the last, and weights that share an entry there."""

    axis: int
    unit: int

    def narrow(self, tensor: Tensor, part: Part) -> Tensor:
        """The view of a part; the last entry may stand for weights in part."""
        first, end = part.first // self.unit, -(-part.end // self.unit)
        return tensor.narrow(self.axis, first, end - first)


def piece(matrix: Sequence[Tensor], packing: Packing, axis: int, part: Part) -> list[Tensor]:
    """Values and scales, if any, of a part of one matrix [out, in] or of stacked ones, as views.

    Args:
        matrix: values and, in a quantised format, scales, as shipped.
        packing: of the matrix.
        axis: of [out, in] that is I; see :attr:`~jitmoe.plan.projections.Projection.cut_axis`.
        part: the columns of I.
    """
    cuts = (_value_cut(packing, axis), _scale_cut(packing, axis))
    return [t if cut is None else cut.narrow(t, part) for t, cut in zip(matrix, cuts, strict=False)]


def join(pieces: Sequence[Tensor | Quantized], packing: Packing, axis: int) -> Tensor | Quantized:
    """The inverse of :func:`piece` for all parts."""
    if len(pieces) == 1:
        return pieces[0]
    values = [found.values if isinstance(found, Quantized) else found for found in pieces]
    joined = torch.cat(values, _value_cut(packing, axis).axis)
    scales = [found.scales for found in pieces if isinstance(found, Quantized)]
    if not scales:
        return joined
    cut = _scale_cut(packing, axis)
    return Quantized(joined, scales[0] if cut is None else torch.cat(scales, cut.axis))


def base_of(base: Sequence[Tensor], part: Part, count: int) -> list[Tensor]:
    """Packed gate, up and down of one of ``count`` parts, and its biases, if any.

    Down's bias is that of the first part; the others add zeros.

    Args:
        base: packed gate, up and down of one part after the other, then the biases of gate, up [E, I] and down [E, H].
        part: the part.
        count: parts.
    """
    packed, biases = list(base[3 * part.index : 3 * part.index + 3]), base[3 * count :]
    if not biases or part.is_whole:
        return [*packed, *biases]
    gate, up, down = biases
    rows = [bias[:, part.first : part.end].contiguous() for bias in (gate, up)]
    return [*packed, *rows, down if part.index == 0 else supplies().zeros(down.shape, down.dtype)]


def lora_of(six: Sequence[Tensor], part: Part) -> Sequence[Tensor]:
    """Views of A and B of gate, up and down, or of their gradients: of what has an axis I, the part's columns."""
    if not six or part.is_whole:
        return six
    gate_a, gate_b, up_a, up_b, down_a, down_b = six
    columns = slice(part.first, part.end)
    return [gate_a, gate_b[:, columns], up_a, up_b[:, columns], down_a[:, :, columns], down_b]


def extent_of(projection: Projection, part: Part) -> tuple[int, int]:
    """out and in of a projection in a part."""
    columns = part.end - part.first
    return (projection.out, columns) if projection.cut_axis else (columns, projection.in_)


def _value_cut(packing: Packing, axis: int) -> _Cut:
    """Of the values, whose last axes are out and in, or out, groups and 16 bytes."""
    row = -3 if packing.format.name == "mxfp4" else -2
    unit = {"int4_group": 8, "mxfp4": 32}.get(packing.format.name, 1)
    return _Cut(row + 1, unit) if axis else _Cut(row, 1)


def _scale_cut(packing: Packing, axis: int) -> _Cut | None:
    """Of the scales; None where all inputs of an output share one."""
    sharing = packing.format.sharing
    if sharing == "square":
        return _Cut(axis - 2, SQUARE)
    if sharing == "group":
        return _Cut(-1, packing.group) if axis else _Cut(-2, 1)
    row = -2 if packing.format.name == "fp8_row" else -1
    return None if axis else _Cut(row, 1)
