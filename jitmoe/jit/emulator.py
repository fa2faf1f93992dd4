"""Installs the emulator of AMX and AVX512-BF16 by hand, and counts what it has executed in this process.

``JITMOE_EMULATE=1`` installs the emulator wherever a layer needs it.
"""

from dataclasses import dataclass, fields

from jitmoe.jit import programs

TILE_ROWS = 16


@dataclass(frozen=True)
class Counts:
    """Instructions emulated since the start or :func:`reset_counts`, by kind.

    The order is that of ``Count`` in tools/emulator_decode.hpp.

    Attributes:
        tdpbf16ps: tile products of bfloat16; the next four are those of bytes.
        tdpbssd: signed times signed.
        tdpbsud: signed times unsigned.
        tdpbusd: unsigned times signed.
        tdpbuud: unsigned times unsigned.
        tile_loads: TILELOADD and TILELOADDT1.
        tile_stores: TILESTORED.
        tile_zeros: TILEZERO.
        configurations: LDTILECFG.
        configuration_stores: STTILECFG.
        releases: TILERELEASE.
        avx512_bf16: VDPBF16PS, VCVTNEPS2BF16 and VCVTNE2PS2BF16.
        useful_rows: configured rows of the A tiles, over all products.
        useful_flop: multiplications and additions on configured rows and columns, over all products.
    """

    tdpbf16ps: int
    tdpbssd: int
    tdpbsud: int
    tdpbusd: int
    tdpbuud: int
    tile_loads: int
    tile_stores: int
    tile_zeros: int
    configurations: int
    configuration_stores: int
    releases: int
    avx512_bf16: int
    useful_rows: int
    useful_flop: int

    @property
    def products(self) -> int:
        """Tile products of all kinds."""
        return self.tdpbf16ps + self.tdpbssd + self.tdpbsud + self.tdpbusd + self.tdpbuud

    @property
    def row_use(self) -> float:
        """Share of the products' 16 rows that were configured; 1 means that no tile was partly empty."""
        return self.useful_rows / (TILE_ROWS * self.products) if self.products else 0.0


def install() -> None:
    """Let our emulator execute AMX and AVX512-BF16 in this process; a second call does nothing.

    Call it before threads start. From then on SIGILL belongs to the emulator. Signals of other instructions go on to
    the handler that was there before.

    Raises:
        BuildError: the emulator cannot be compiled.
        IsaError: the CPU lacks AVX2 or FMA, or another handler was put over the emulator's.
    """
    programs.emulator().install()


def counts() -> Counts:
    """What our emulator has executed in this process.

    Raises:
        BuildError: the emulator cannot be compiled.
    """
    values = programs.emulator().read_counts()
    return Counts(**dict(zip((field.name for field in fields(Counts)), values, strict=True)))


def reset_counts() -> None:
    """Set all counters to zero; errors as of :func:`counts`."""
    programs.emulator().reset_counts()
