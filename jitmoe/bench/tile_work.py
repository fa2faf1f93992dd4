"""What AMX does for LoRA and beside its tiles, counted: tile products as the emulator counts them, and vector work.

Counts are of one expert. A test holds the products against the emulator; the vector work is the number of times that
each piece of gemm/lora_tiles.hpp and gemm/pair.hpp runs. What a piece takes is measured, on CPUs without AMX: no tile
instruction is in it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from jitmoe.plan.shapes import K_STEP, N_STRIP, ceil_div

TILE = 16
"""Rows of a whole AMX tile."""

ROW_BLOCK = 2 * TILE
"""Rows of a row block with many rows."""

SHARED_RANKS = TILE // 2
"""Ranks whose two halves share a tile."""


@dataclass(frozen=True)
class Sizes:
    """One expert of a call: its rows, H, I and the LoRA rank."""

    rows: int
    hidden: int
    intermediate: int
    rank: int

    @property
    def row_tiles(self) -> int:
        """Tiles of rows."""
        return ceil_div(self.rows, TILE)

    @property
    def row_blocks(self) -> int:
        """Row blocks of 32."""
        return ceil_div(self.rows, ROW_BLOCK)

    @property
    def low_tiles(self) -> int:
        """Tiles of ranks of the product that makes u or du, of float32 parameters."""
        return ceil_div(self.rank, SHARED_RANKS)

    @property
    def lora_steps(self) -> int:
        """Steps of the contraction that LoRA adds to a product."""
        return ceil_div(3 * self.rank, K_STEP)

    def contracted(self, backward: bool) -> int:
        """Columns that u of the three projections contracts over; in backward those of du."""
        return sum((self.hidden, self.intermediate)[i] for i in ((0, 1, 1) if backward else (0, 0, 1)))

    def strips(self, backward: bool) -> int:
        """Strips of 32 columns of the three products."""
        wide, narrow = ceil_div(self.hidden, N_STRIP), ceil_div(self.intermediate, N_STRIP)
        return 2 * wide + narrow if backward else 2 * narrow + wide


def base_products(sizes: Sizes) -> int:
    """Tile products of the frozen weights in either pass, of sizes that are multiples of 32."""
    return 3 * sizes.row_tiles * (sizes.hidden // K_STEP) * (sizes.intermediate // TILE)


def lora_products(sizes: Sizes, backward: bool) -> int:
    """Tile products of LoRA, of sizes that are multiples of 32 and more than 8 rows."""
    if not sizes.rank:
        return 0
    low = sizes.row_tiles * sizes.low_tiles * sizes.contracted(backward) // K_STEP
    added = sizes.row_tiles * sizes.lora_steps * 2 * sizes.strips(backward)
    return low + added + (_gradient_products(sizes) if backward else 0)


def _gradient_products(sizes: Sizes) -> int:
    whole = ceil_div(sizes.rank, TILE)
    of_a = 1 if sizes.rank <= SHARED_RANKS else 2 * whole
    lanes = 2 * sizes.hidden + sizes.intermediate, sizes.hidden + 2 * sizes.intermediate
    return sizes.row_blocks * (of_a * lanes[0] + whole * lanes[1]) // TILE


def vector_work(sizes: Sizes, backward: bool) -> Mapping[str, float]:
    """How often each piece of vector work runs; the names are those of :data:`CYCLES`."""
    blocks = 3 * ceil_div(sizes.hidden, K_STEP) * ceil_div(sizes.intermediate, N_STRIP)
    work: dict[str, float] = {"pair a block of weights": blocks} if backward else {}
    if not sizes.rank:
        return work
    steps = sizes.low_tiles * ceil_div(sizes.contracted(backward), K_STEP)
    work["pack a tile of A or B"] = sizes.row_blocks * steps
    work["strip of A or B, 8 ranks"] = sizes.low_tiles * sizes.strips(backward)
    if backward:
        wide, narrow = ceil_div(sizes.hidden, N_STRIP), ceil_div(sizes.intermediate, N_STRIP)
        work["pair the rows of a block"] = sizes.row_blocks * (2 * wide + 3 * narrow)
        work["add a strip of a gradient, 8 ranks"] = sizes.low_tiles * 3 * (wide + narrow)
    return work


CYCLES: Mapping[str, float] = {
    "pair a block of weights": 105,
    "pack a tile of A or B": 105,
    "strip of A or B, 8 ranks": 190,
    "pair the rows of a block": 95,
    "add a strip of a gradient, 8 ranks": 160,
}
"""Cycles of a piece, its data in cache: one thread of Zen 4 at its reference clock, 2026-11-25."""


def vector_cycles(sizes: Sizes, backward: bool) -> float:
    """Cycles of one core for :func:`vector_work`."""
    return sum(CYCLES[name] * number for name, number in vector_work(sizes, backward).items())
