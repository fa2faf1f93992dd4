"""The scales of quantised base weights, looked at by a trace."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from jitmoe.formats import SCALE_BYTES, SQUARE, Packing
from jitmoe.jit.kernels import Kernels

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class BadScales:
    """Scales of one matrix, of which some are not finite.

    Attributes:
        bad: [rows, columns] bool, True where a scale is not finite.
        rows: of weights that share a scale.
        columns: of weights that share a scale.
    """

    bad: npt.NDArray[np.bool_]
    rows: int
    columns: int

    def of(self, row: int, column: int) -> tuple[int, int] | None:
        """Row and column of the scale of a weight, if that scale is not finite."""
        place = row // self.rows, column // self.columns
        return place if self.bad[place] else None


def read_scales(kernels: Kernels, packing: Packing, packed: int, out: int, in_: int) -> Floats:
    """The scales [rows, columns] of the packed matrix at the address ``packed``, as float32."""
    shape = packing.scale_shape(out, in_)
    values = np.empty(packing.value_bytes(out, in_), np.uint8)
    scales = np.empty((shape[0], int(np.prod(shape[1:])), SCALE_BYTES[packing.scale]), np.uint8)
    kernels.unpack(packed, values.ctypes.data, 1, out, in_, 1, scales.ctypes.data)
    flat = scales.reshape(shape[0], -1)
    if packing.scale == "e8m0":
        return np.where(flat == 0xFF, np.nan, np.exp2(flat.astype(np.float64) - 127)).astype(np.float32)
    if packing.scale == "bfloat16":
        return (flat.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return flat.view(np.float16 if packing.scale == "float16" else np.float32).astype(np.float32)


def bad_scales(packing: Packing, scales: Floats, in_: int) -> BadScales | None:
    """The scales of a matrix with ``in_`` columns, where any is not finite."""
    bad = ~np.isfinite(scales)
    if not bad.any():
        return None
    sharing = packing.format.sharing
    columns = SQUARE if sharing == "square" else packing.group if sharing == "group" else in_
    return BadScales(bad, SQUARE if sharing == "square" else 1, columns)
