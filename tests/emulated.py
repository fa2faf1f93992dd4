"""Runs functions of the tests in a process of its own, where AMX is emulated; also what those functions need.

The emulator keeps SIGILL once it has it, and ends the process at an instruction that hardware would refuse.
"""

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

TIMEOUT = 280


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
