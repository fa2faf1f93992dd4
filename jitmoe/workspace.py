"""Memory of the process: one arena for scratch, grown on demand and shared by all layers."""

import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

PAGE = 2 << 20
"""Huge page of x86-64: the size where transparent huge pages start to help."""


def allocate(nbytes: int) -> npt.NDArray[np.uint8]:
    """Zeroed, page-aligned bytes, on huge pages where the system gives them.

    Raises:
        MemoryError: naming the size, if the system refuses.
    """
    try:
        pages = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, ValueError, OverflowError) as error:
        raise MemoryError(f"cannot allocate {nbytes} bytes: {error}") from error
    if nbytes >= PAGE:
        pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, dtype=np.uint8)


class Arenas:
    """Arenas that no call is using; a call takes one for its duration.

    One thread calling one layer after the other always gets the same arena back, so a process holds
    as many arenas as calls have ever been under way at once.
    """

    def __init__(self) -> None:
        self._free: list[npt.NDArray[np.uint8]] = []
        self._renew_lock()
        os.register_at_fork(after_in_child=self._renew_lock)

    def _renew_lock(self) -> None:
        """At birth and in a forked child, where a thread that held the lock in the parent does not exist."""
        self._lock = threading.Lock()

    @contextmanager
    def lease(self, nbytes: int) -> Iterator[int]:
        """Address of at least ``nbytes`` bytes that nobody else uses until the block ends."""
        with self._lock:
            arena = self._free.pop() if self._free else None
        if arena is None or arena.nbytes < nbytes:
            del arena  # before the larger one is taken, so that both are never held
            arena = allocate(nbytes)
        try:
            yield arena.ctypes.data
        finally:
            with self._lock:
                self._free.append(arena)

    def held_bytes(self) -> int:
        """Bytes of the arenas that are free now."""
        with self._lock:
            return sum(arena.nbytes for arena in self._free)

    def release(self) -> None:
        """Give all free arenas back to the system."""
        with self._lock:
            self._free.clear()


arenas = Arenas()
