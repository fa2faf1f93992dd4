"""What the SDM says of each emulated instruction, in plain NumPy; shares nothing with the emulator.

Numbers are carried as their bits: uint16 for bfloat16, uint32 for float32. All arithmetic rounds to
nearest even, takes denormals as zero and gives zero for them.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.generic]

TILES, ROWS, ROW_BYTES = 8, 16, 64
QUIET = np.uint32(0x00400000)
INDEFINITE = np.uint32(0xFFC00000)


class RefusedError(Exception):
    """What hardware answers with the exception named in the message."""


def is_nan(bits: Array) -> npt.NDArray[np.bool_]:
    """Where float32 ``bits`` are NaN."""
    return (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)


def flush(bits: Array) -> Array:
    """Denormal float32 ``bits`` as zero of the same sign."""
    return np.where(bits & np.uint32(0x7F800000), bits, bits & np.uint32(0x80000000)).astype(np.uint32)


def widen(halves: Array) -> Array:
    """float32 bits of bfloat16 ``halves``."""
    return halves.astype(np.uint32) << np.uint32(16)


def fma(a: Array, b: Array, c: Array) -> Array:
    """``a * b + c`` with one rounding, on float32 bits; NaN becomes the indefinite.

    The product must fit float64: bfloat16 times bfloat16, or anything times one. The sum is rounded to
    odd there (its last bit says whether anything was lost), so that the rounding to float32 is right.
    """
    with np.errstate(invalid="ignore"):  # signalling NaN
        x, y, z = (flush(np.asarray(v, np.uint32)).view(np.float32).astype(np.float64) for v in (a, b, c))
    with np.errstate(all="ignore"):
        product = x * y
        total = product + z
        back = total - product
        lost = (product - (total - back)) + (z - back)
        even = total.view(np.int64) & 1 == 0
        adjust = np.isfinite(total) & (lost != 0) & even
        away = np.signbit(lost) == np.signbit(total)
        odd = np.where(adjust, total.view(np.int64) + np.where(away, 1, -1), total.view(np.int64)).view(np.float64)
        return round_to_float32(odd)


def round_to_float32(values: npt.NDArray[np.float64]) -> Array:
    """Bits of float64 ``values`` in float32; below the smallest normal number *after* rounding it is zero."""
    with np.errstate(all="ignore"):
        small = np.abs(values) < 2.0**-100
        # Away from float32's denormals, whose coarser spacing would round differently.
        scaled = np.where(small, values * 2.0**120, values).astype(np.float32)
        tiny = small & (np.abs(scaled) < np.float32(2.0**-6))
        rounded = np.where(small, scaled * np.float32(2.0**-120), scaled)
    bits = np.where(tiny, np.copysign(np.float32(0), scaled), rounded).astype(np.float32).view(np.uint32)
    return np.where(is_nan(bits), INDEFINITE, bits).astype(np.uint32)


def add(a: Array, b: Array) -> Array:
    """Sum of float32 bits."""
    return fma(a, np.full_like(a, 0x3F800000), b)


def pairs(lanes: Array) -> tuple[Array, Array]:
    """Even and odd bfloat16 of 32-bit ``lanes``, as float32 bits."""
    halves = np.ascontiguousarray(lanes).view(np.uint16)
    return widen(halves[..., 0::2]), widen(halves[..., 1::2])


def tdpbf16ps(c: Array, a: Array, b: Array) -> Array:
    """c [M, N] + a [M, K] b [K, N], lanes of 32 bits: float32 and pairs of bfloat16."""
    even_a, odd_a = pairs(a)
    even_b, odd_b = pairs(b)
    even = odd = np.zeros_like(c)
    for k in range(a.shape[1]):
        even = fma(even_a[:, k, None], even_b[None, k, :], even)
        odd = fma(odd_a[:, k, None], odd_b[None, k, :], odd)
    return add(c, add(even, odd))


def tdp_bytes(c: Array, a: Array, b: Array, signed_a: bool, signed_b: bool) -> Array:
    """The same for lanes of four bytes and 32-bit sums that wrap."""
    wide_a = np.ascontiguousarray(a).view(np.int8 if signed_a else np.uint8).astype(np.int64)
    wide_b = np.ascontiguousarray(b).view(np.int8 if signed_b else np.uint8).astype(np.int64)
    left = wide_a.reshape(a.shape[0], -1)
    right = wide_b.reshape(b.shape[0], -1, 4).transpose(0, 2, 1).reshape(left.shape[1], -1)
    return ((left @ right + c.astype(np.int64)) & 0xFFFFFFFF).astype(np.uint32)


SIGNS = {
    "tdpbssd": (True, True),
    "tdpbsud": (True, False),
    "tdpbusd": (False, True),
    "tdpbuud": (False, False),
}


@dataclass
class Tiles:
    """Tile state of one thread; ``config`` is the 64 bytes of LDTILECFG, or None in the initial state."""

    config: Array | None = None
    data: Array = field(default_factory=lambda: np.zeros((TILES, ROWS, ROW_BYTES), np.uint8))

    def ldtilecfg(self, config: Array) -> None:
        """Load a configuration and clear the tiles."""
        rows, row_bytes = config[48:56].astype(int), config[16:32].view(np.uint16).astype(int)
        if config[0] > 1:
            raise RefusedError("#GP")
        if config[0] == 0:
            return self.tilerelease()
        if config[2:16].any() or config[32:48].any() or config[56:].any():
            raise RefusedError("#GP")
        if (rows > ROWS).any() or (row_bytes > ROW_BYTES).any() or ((rows == 0) != (row_bytes == 0)).any():
            raise RefusedError("#GP")
        self.config = config.copy()
        self.data[:] = 0

    def sttilecfg(self) -> Array:
        """The configuration in memory's format."""
        return np.zeros(64, np.uint8) if self.config is None else self.config.copy()

    def tilerelease(self) -> None:
        """Back to the initial state."""
        self.config = None
        self.data[:] = 0

    def shape(self, tile: int) -> tuple[int, int]:
        """Rows and bytes per row of a tile that may be used."""
        if self.config is None or self.config[48 + tile] == 0:
            raise RefusedError("#UD")
        return int(self.config[48 + tile]), int(self.config[16 + 2 * tile])

    def _memory_shape(self, tile: int) -> tuple[int, int]:
        rows, row_bytes = self.shape(tile)
        assert self.config is not None
        if row_bytes % 4 or self.config[1] >= rows:
            raise RefusedError("#UD")
        return rows, row_bytes

    def tilezero(self, tile: int) -> None:
        """Clear one tile."""
        self.shape(tile)
        self.data[tile] = 0
        self._done()

    def tileload(self, tile: int, memory: Array, offset: int, stride: int) -> None:
        """Load rows from ``memory[offset + row * stride]``."""
        rows, row_bytes = self._memory_shape(tile)
        assert self.config is not None
        start = int(self.config[1])
        self.data[tile, start:] = 0
        for row in range(start, rows):
            first = offset + row * stride
            self.data[tile, row, :row_bytes] = memory[first : first + row_bytes]
        self._done()

    def tilestore(self, tile: int, memory: Array, offset: int, stride: int) -> None:
        """Store rows to ``memory[offset + row * stride]``, in ascending order."""
        rows, row_bytes = self._memory_shape(tile)
        assert self.config is not None
        for row in range(int(self.config[1]), rows):
            first = offset + row * stride
            memory[first : first + row_bytes] = self.data[tile, row, :row_bytes]
        self._done()

    def product(self, name: str, c: int, a: int, b: int) -> None:
        """One of the TDP instructions."""
        (rows, bytes_c), (rows_a, bytes_a), (depth, bytes_b) = self.shape(c), self.shape(a), self.shape(b)
        fits = rows == rows_a and bytes_c == bytes_b and bytes_a == 4 * depth
        if len({a, b, c}) < 3 or bytes_c % 4 or not fits:
            raise RefusedError("#UD")
        operands = [
            np.ascontiguousarray(self.data[tile, :height, :width]).view(np.uint32)
            for tile, height, width in ((c, rows, bytes_c), (a, rows, bytes_a), (b, depth, bytes_b))
        ]
        result = tdpbf16ps(*operands) if name == "tdpbf16ps" else tdp_bytes(*operands, *SIGNS[name])
        self.data[c] = 0
        self.data[c, :rows, :bytes_c] = result.view(np.uint8)
        self._done()

    def _done(self) -> None:
        assert self.config is not None
        self.config[1] = 0


def vdpbf16ps(c: Array, a: Array, b: Array) -> Array:
    """c + dot of the pairs in each lane: the odd product first, then the even one, both fused.

    NaN operands win over everything: the first of a even, b even, a odd, b odd, c, made quiet.
    """
    even_a, odd_a = pairs(a)
    even_b, odd_b = pairs(b)
    result = fma(even_a, even_b, fma(odd_a, odd_b, c))
    for operand in (c, odd_b, odd_a, even_b, even_a):
        result = np.where(is_nan(operand), operand | QUIET, result)
    return result.astype(np.uint32)


def convert(bits: Array) -> Array:
    """bfloat16 of float32 ``bits``."""
    exact = flush(bits).astype(np.uint64)
    below, rest = exact >> np.uint64(16), exact & np.uint64(0xFFFF)
    up = (rest > 0x8000) | ((rest == 0x8000) & (below & np.uint64(1) == 1))
    return np.where(is_nan(bits), below | np.uint64(0x40), below + up).astype(np.uint16)


def masked(old: Array, new: Array, mask: int | None, zeroing: bool) -> Array:
    """A 64-byte register after an EVEX instruction gave the elements ``new``; above them it is zero."""
    register = np.zeros(64 // new.itemsize, new.dtype)
    kept = np.zeros_like(new) if zeroing else old.view(new.dtype)[: len(new)]
    chosen = [mask is None or bool(mask >> i & 1) for i in range(len(new))]
    register[: len(new)] = np.where(chosen, new, kept)
    return register.view(np.uint8)
