"""Census of a matrix: how many values are not finite, where the first one is, and the range of the rest."""

import math
from dataclasses import dataclass

import numpy as np
from numba import njit

from jitmoe.errors import InputError, InputTypeError


@dataclass(frozen=True)
class Scan:
    """What :func:`scan` found.

    Attributes:
        nan: number of NaNs.
        inf: number of infinities of either sign.
        zero: number of zeros of either sign.
        first: (row, column) of the first value in row-major order that is not finite, or None.
        minimum: smallest finite value; NaN if there is none.
        maximum: largest finite value; NaN if there is none.
        absmean: mean magnitude of the finite values, summed in float64; NaN if there is none.
    """

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
    """Count and locate what is not finite in ``values``, and measure the rest.

    All but ``absmean`` come from the bits alone: a flush-to-zero mode that some library left on changes nothing.

    Args:
        values: 2-D, any strides; float32, float64, or uint16 holding bfloat16 bits.

    Raises:
        InputTypeError: for any other dtype.
        InputError: if ``values`` is not 2-D.
    """
    if values.dtype not in _FORMATS:
        raise InputTypeError(f"values must be float32, float64 or uint16 (bfloat16 bits), got {values.dtype}")
    if values.ndim != 2:
        raise InputError(f"values must be 2-D, got shape {values.shape}")
    form = _FORMATS[values.dtype]
    floats = None if values.dtype == np.uint16 else values
    nan, inf, zero, first, low, high, total = _scan(values.view(form.integer), floats, form.magnitude, form.infinity)
    finite = values.size - nan - inf
    return Scan(
        nan=nan,
        inf=inf,
        zero=zero,
        first=divmod(first, values.shape[1]) if first >= 0 else None,
        minimum=_value(low, values.dtype) if finite else math.nan,
        maximum=_value(high, values.dtype) if finite else math.nan,
        absmean=total / finite if finite else math.nan,
    )


def _value(key: int, dtype: np.dtype) -> float:
    """The number whose sort key (see ``_scan``) is ``key``."""
    magnitude = key if key >= 0 else ~key
    if dtype == np.uint16:
        value = float(np.int32(magnitude << 16).view(np.float32))
    else:
        value = float(_FORMATS[dtype].integer(magnitude).view(dtype))
    return value if key >= 0 else -value


@njit(cache=True, nogil=True)
def _scan(
    bits: np.ndarray, floats: np.ndarray | None, magnitude_mask: int, infinity: int
) -> tuple[int, int, int, int, int, int, float]:
    """Counts of NaN, infinity, zero; first non-finite index or -1; least and greatest sort key; sum of magnitudes.

    The sort key of a number is an integer that orders as the numbers do: the magnitude's bits, complemented
    under a minus sign. ``floats`` is the same matrix as numbers, None if ``bits`` are bfloat16's.
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
