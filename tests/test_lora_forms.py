"""LoRA of a back end alone: what it keeps of float32 parameters, u and du that bfloat16 cannot hold.

The yardstick's parameters are values of bfloat16, so it cannot see what becomes of the others.
"""

import ctypes
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from emulated import NEEDS_TILES, TILE_ISAS, Emulated, can_emulate
from helpers import NATIVE
from test_back_end import address, bfloat16, compile_text

from jitmoe.isa import ISAS
from jitmoe.jit import capability

DRIVER = Path(__file__).parent / "lora_driver.cpp"

HIDDEN, SCALE = 96, 2.0

RANKS = (1, 3, 8, 10, 11, 16, 17, 40)
"""Both halves in one tile and not, one step of the contraction and more, odd ranks."""

ROWS = (3, 16, 35, 100)

EXACT = 2.0**-14
"""Of the sum of magnitudes: 2^-16 for the rest of each operand and for the product of low halves, and float32 sums."""

ROUNDED = 2.0**-8 + EXACT
"""The same where one operand is rounded to bfloat16."""


def check_form(isa: str, m_step: int, folder: Path) -> None:
    text = DRIVER.read_text(encoding="utf-8").replace("DRIVEN_ISA", isa).replace("DRIVEN_M_STEP", str(m_step))
    run = ctypes.CDLL(str(compile_text(text, isa, folder / f"{isa}_{m_step}"))).jitmoe_lora
    generator = np.random.default_rng(1)

    def normal(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape, dtype=np.float32)

    def operand(*shape: int) -> np.ndarray:
        bits = normal(*shape).view(np.uint32) & 0xFFFF0000
        return bits.view(np.float32)

    for rank in RANKS:
        for rows in ROWS:
            x, values, a, b, weights = (
                operand(rows, HIDDEN),
                operand(rows, 32),
                normal(rank, HIDDEN),
                normal(32, rank),
                normal(rows),
            )
            u, product, grads = np.zeros((rows, rank), np.float32), normal(rows, 32), normal(2, rank, 32)
            run(
                address(bfloat16(x)),
                ctypes.c_int64(rows),
                address(a),
                address(b),
                ctypes.c_int64(rank),
                ctypes.c_float(SCALE),
                address(weights),
                address(bfloat16(values)),
                address(u),
                address(product),
                address(grads),
            )
            left = (u.astype(np.float64) * weights[:, None]).T
            b_limit = ROUNDED if ISAS[isa].tiles and rank > 8 else EXACT
            for name, found, one, other, limit in (
                ("u", u, SCALE * x.astype(np.float64), a.T, EXACT),
                ("K-step", product, u.astype(np.float64), b.T, EXACT),
                ("gradient of A", grads[0], left, values, EXACT),
                ("gradient of B", grads[1], left, values, b_limit),
            ):
                error = np.abs(found - one @ other)
                assert (error <= limit * (np.abs(one) @ np.abs(other))).all(), (
                    f"{name}, {isa} {m_step}, {rank=}, {rows=}"
                )


def native_cells() -> Iterator[pytest.param]:
    """Sets without tiles have one form of LoRA: one of them always, the others where there is time."""
    for isa in NATIVE:
        yield pytest.param(isa, marks=[pytest.mark.isa(isa), *([] if isa == "avx2" else [pytest.mark.slow])])


@pytest.mark.parametrize("isa", list(native_cells()))
def test_float32_values_are_kept(isa: str, tmp_path: Path) -> None:
    check_form(isa, ISAS[isa].m_steps[-1], tmp_path)


@NEEDS_TILES
@pytest.mark.parametrize("isa", TILE_ISAS)
def test_float32_values_are_kept_on_tiles(isa: str, tmp_path: Path) -> None:
    if not can_emulate(isa):
        pytest.skip(f"{isa} cannot be emulated on this CPU")
    process = Emulated()
    for m_step in ISAS[isa].m_steps:
        process(check_emulated, isa, m_step, tmp_path)
    process.close()


def check_emulated(isa: str, m_step: int, folder: Path) -> None:
    capability.resolve_isa(isa)  # installs the emulator
    check_form(isa, m_step, folder)
