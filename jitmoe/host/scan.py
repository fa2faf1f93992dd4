"""Census of a matrix, whole or piece by piece: values that are not finite, and the range of the others."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import carray  # type: ignore[attr-defined]

from jitmoe.errors import InputError, InputTypeError
from jitmoe.host.compiled import jit
from jitmoe.host.tokens import compile_callback
from jitmoe.process import compiled_call


@dataclass(frozen=True)
class Scan:
    """What :func:`scan` found.

    Attributes:
        size: number of values.
        nan: number of NaNs.
        inf: number of infinities of either sign.
        zero: number of zeros of either sign.
        first: (row, column) of the first value in row-major order that is not finite, or None.
        minimum: smallest finite value; NaN if there is none.
        maximum: largest finite value; NaN if there is none.
        absmean: mean magnitude of the finite values, summed in float64; NaN if there is none.
    """

    size: int
    nan: int
    inf: int
    zero: int
    first: tuple[int, int] | None
    minimum: float
    maximum: float
    absmean: float


@dataclass(frozen=True)
class _Format:
    """A binary floating-point format seen as sign and magnitude: its integer type and two bit patterns."""

    integer: type[np.signedinteger]
    magnitude: int
    infinity: int


_FORMATS = {
    np.dtype(np.uint16): _Format(np.int16, 0x7FFF, 0x7F80),
    np.dtype(np.float32): _Format(np.int32, 0x7FFF_FFFF, 0x7F80_0000),
    np.dtype(np.float64): _Format(np.int64, 0x7FFF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000),
}


def scan(values: np.ndarray) -> Scan:
    """Count and locate the values that are not finite, and measure the others.

    All figures but ``absmean`` come from the bits alone, whatever flush-to-zero mode a library left on.

    Args:
        values: 2-D, any strides; float32, float64, or uint16 holding bfloat16 bits.

    Raises:
        InputTypeError: ``values`` has another dtype.
        InputError: ``values`` is not 2-D.
    """
    if values.dtype not in _FORMATS:
        raise InputTypeError(f"values must be float32, float64 or uint16 (bfloat16 bits), got {values.dtype}")
    if values.ndim != 2:
        raise InputError(f"values must be 2-D, got shape {values.shape}")
    form = _FORMATS[values.dtype]
    floats = None if values.dtype == np.uint16 else values
    with compiled_call():
        found = _scan(values.view(form.integer), floats, form.magnitude, form.infinity)
    nan, inf, zero, first, low, high, total = found
    finite = values.size - nan - inf
    return Scan(
        size=values.size,
        nan=nan,
        inf=inf,
        zero=zero,
        first=divmod(first, values.shape[1]) if first >= 0 else None,
        minimum=_value(low, values.dtype) if finite else math.nan,
        maximum=_value(high, values.dtype) if finite else math.nan,
        absmean=total / finite if finite else math.nan,
    )


RECORD = ("size", "nan", "inf", "zero", "row", "column", "minimum", "maximum", "magnitude")
"""Fields of a record, float64 each: a census that grows piece by piece. ``magnitude`` sums those of finite values."""


def empty_records(*extent: int) -> npt.NDArray[np.float64]:
    """Records [*extent, len(RECORD)] float64 of tensors of which nothing was seen yet."""
    records = np.zeros((*extent, len(RECORD)))
    records[..., RECORD.index("row")] = -1
    records[..., RECORD.index("minimum")] = math.inf
    records[..., RECORD.index("maximum")] = -math.inf
    return records


def read_record(record: npt.NDArray[np.float64]) -> Scan:
    """The census in ``record``, one [len(RECORD)] of :func:`empty_records`."""
    size, nan, inf, zero, row, column = (int(value) for value in record[:6])
    low, high, total = record[6:].tolist()
    finite = size - nan - inf
    return Scan(
        size=size,
        nan=nan,
        inf=inf,
        zero=zero,
        first=(row, column) if row >= 0 else None,
        minimum=low if finite else math.nan,
        maximum=high if finite else math.nan,
        absmean=total / finite if finite else math.nan,
    )


def observe_address() -> int:
    """Address of a C function that adds a piece of a float32 tensor to its record.

    ``void (double* record, const float* values, int64_t row, int64_t rows, int64_t column, int64_t columns,
    int64_t row_stride, int64_t column_stride)``: the piece of rows x columns values begins at (row, column) of the
    tensor. Strides are in elements, and one of them is 1. Only one thread at a time may add to a record.
    """
    return int(compile_callback(_observe_at, _OBSERVE).address)


def _value(key: int, dtype: np.dtype) -> float:
    """The number whose sort key (see ``_scan``) is ``key``."""
    magnitude = key if key >= 0 else ~key
    if dtype == np.uint16:
        value = float(np.int32(magnitude << 16).view(np.float32))
    else:
        value = float(_FORMATS[dtype].integer(magnitude).view(dtype))
    return value if key >= 0 else -value


@jit()
def _scan(
    bits: np.ndarray, floats: np.ndarray | None, magnitude_mask: int, infinity: int
) -> tuple[int, int, int, int, int, int, float]:
    """Counts of NaN, infinity, zero; first non-finite index or -1; least and greatest sort key; sum of magnitudes.

    The sort key of a number is an integer in the order of the numbers: the bits of the magnitude, complemented under a
    minus sign. ``floats`` is the same matrix as numbers, or None where ``bits`` are those of bfloat16.
    """
    nan = inf = zero = 0
    first = -1
    low = magnitude_mask
    high = ~magnitude_mask
    total = 0.0
    rows, columns = bits.shape
    for row in range(rows):
        for column in range(columns):
            pattern = int(bits[row, column])
            magnitude = pattern & magnitude_mask
            if magnitude >= infinity:
                if first < 0:
                    first = row * columns + column
                if magnitude > infinity:
                    nan += 1
                else:
                    inf += 1
                continue
            key = magnitude if pattern >= 0 else ~magnitude
            if key < low:
                low = key
            if key > high:
                high = key
            zero += magnitude == 0
            if floats is None:
                total += float(np.int32(magnitude << 16).view(np.float32))
            else:
                total += abs(float(floats[row, column]))
    return nan, inf, zero, first, low, high, total


_OBSERVE = "void(CPointer(float64), voidptr, int64, int64, int64, int64, int64, int64)"


def _observe_at(
    record: Any, values: Any, row: int, rows: int, column: int, columns: int, row_stride: int, column_stride: int
) -> None:
    # carray makes contiguous arrays only: take whole strides, and cut them to the piece.
    if column_stride == 1:
        floats = carray(values, (rows, row_stride), np.float32)[:, :columns]
        bits = carray(values, (rows, row_stride), np.int32)[:, :columns]
    else:
        floats = carray(values, (columns, column_stride), np.float32)[:, :rows].T
        bits = carray(values, (columns, column_stride), np.int32)[:, :rows].T
    _add_piece(carray(record, 9), bits, floats, row, column)


@jit()
def _add_piece(record: np.ndarray, bits: np.ndarray, floats: np.ndarray, row: int, column: int) -> None:
    """Add the piece that begins at (row, column) of its tensor to ``record``."""
    nan, inf, zero, first, low, high, total = _scan(bits, floats, 0x7FFF_FFFF, 0x7F80_0000)
    record[0] += bits.size
    record[1] += nan
    record[2] += inf
    record[3] += zero
    if first >= 0:
        first_row = row + first // bits.shape[1]
        first_column = column + first % bits.shape[1]
        if record[4] < 0 or (first_row, first_column) < (record[4], record[5]):
            record[4] = first_row
            record[5] = first_column
    if nan + inf < bits.size:
        record[6] = min(record[6], _float_of(low))
        record[7] = max(record[7], _float_of(high))
    record[8] += total


@jit()
def _float_of(key: int) -> float:
    """The float32 number whose sort key is ``key``; ``_value`` for compiled code."""
    if key >= 0:
        return float(np.int32(key).view(np.float32))
    return -float(np.int32(~key).view(np.float32))
