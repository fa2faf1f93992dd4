"""AMX and AVX512-BF16 instructions on machines that lack them: build the emulator, install it, read its counters."""

import ctypes
import os
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from jitmoe import render
from jitmoe.build import ensure
from jitmoe.errors import IsaError
from jitmoe.render import Instance

SOURCE = "emulator.cpp"

TILE_ROWS = 16


@dataclass(frozen=True)
class Counts:
    """Instructions emulated in this process since the start or :func:`reset_counts`, by kind; as in ``Count``.

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


class EmulatorLibrary:
    """A shared library with ``int jitmoe_emulator_install(void)``; ours also counts.

    Raises:
        IsaError: if it cannot be loaded or exports no such function.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._library = ctypes.CDLL(str(path))
        except OSError as error:
            raise IsaError(f"the emulator {path} cannot be loaded: {error}") from error
        self._install = self._function("jitmoe_emulator_install", ctypes.c_int)

    def install(self) -> int:
        """Take SIGILL; 0 or an errno."""
        return int(self._install())

    def read_counts(self) -> list[int]:
        """The counters in the order of :class:`Counts`."""
        counts = self._function("jitmoe_emulator_counts", ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
        values = (ctypes.c_uint64 * counts(None, 0))()
        counts(values, len(values))
        return list(values)

    def reset_counts(self) -> None:
        """Set all counters to zero."""
        self._function("jitmoe_emulator_reset", None)()

    def _function(self, name: str, result: Any, *arguments: Any) -> Any:
        try:
            function = getattr(self._library, name)
        except AttributeError:
            raise IsaError(f"the emulator {self.path} does not export {name}") from None
        function.restype, function.argtypes = result, list(arguments)
        return function


@dataclass(frozen=True)
class _Source:
    """Takes the shape's place in an Instance: the build needs a name and an instruction set."""

    isa: str = "ref"
    name: str = "emulator"


@cache
def library() -> EmulatorLibrary:
    """Our emulator, compiled at first use and loaded, but not installed.

    Raises:
        BuildError: if it cannot be compiled.
    """
    text = (render.template_dir() / SOURCE).read_text(encoding="utf-8")
    return EmulatorLibrary(ensure(Instance(_Source(), text)))  # type: ignore[arg-type]


def install(emulator: EmulatorLibrary | None = None) -> None:
    """Let ``emulator`` (ours by default) execute AMX and AVX512-BF16 in this process; again is the same.

    Call it before threads start. From then on SIGILL belongs to the emulator, which passes on what is not
    its own to the handler that was there before.

    Raises:
        IsaError: if it refuses: the CPU lacks AVX2 and FMA, or another handler was put over it.
    """
    chosen = emulator or library()
    status = chosen.install()
    if status:
        raise IsaError(f"the emulator {chosen.path} could not be installed: {os.strerror(status)}")


def counts() -> Counts:
    """What our emulator has executed in this process."""
    values = library().read_counts()
    return Counts(**dict(zip((field.name for field in fields(Counts)), values, strict=True)))


def reset_counts() -> None:
    """Start counting from zero."""
    library().reset_counts()
