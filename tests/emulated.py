"""Runs functions of the tests in a process of its own, where AMX is emulated; also what those functions need.

The emulator keeps SIGILL once it has it, and ends the process at an instruction that hardware would refuse.
"""

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

from jitmoe.isa import EMULATED_FEATURES, ISAS
from jitmoe.jit import cpu

TIMEOUT = 280


def can_emulate(isa: str) -> bool:
    """Whether the emulator executes on this CPU what it lacks of ``isa``."""
    return set(cpu.missing_features(isa, cpu.detect())) <= EMULATED_FEATURES


TILE_ISAS = tuple(isa for isa, found in ISAS.items() if found.tiles)

NEEDS_TILES = pytest.mark.skipif(
    not any(map(can_emulate, TILE_ISAS)), reason="the emulator needs a CPU with AVX2, FMA and F16C"
)


class _Chosen:
    """The set of ``--tiles``."""

    isa: str | None = None


def choose_tiles(isa: str | None) -> None:
    """Tests of tiles take this set from now on."""
    assert isa in (None, *TILE_ISAS), f"--tiles is one of {', '.join(TILE_ISAS)}"
    _Chosen.isa = isa


def tiles() -> str:
    """The set with tiles that tests run: that of ``--tiles``, else the best one that can be emulated here."""
    return _Chosen.isa or next(filter(can_emulate, TILE_ISAS), TILE_ISAS[0])


def _start() -> None:
    os.environ["JITMOE_EMULATE"] = "1"
    import torch

    torch.set_num_threads(2)


class Emulated:
    """One process that is kept from call to call, and replaced after a call that ended it."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """``function(*arguments)`` there.

        Raises:
            BrokenProcessPool: if it ended the process.
        """
        if self._pool is None:
            self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _start)
        try:
            return self._pool.submit(function, *arguments).result(TIMEOUT)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the process."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        self._pool = None
