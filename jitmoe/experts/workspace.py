"""Memory of the process: one arena for scratch, grown on demand and shared by all layers; blocks that tensors reuse."""

import mmap
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from jitmoe.files import warn_once
from jitmoe.process import Lock

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
        try:
            pages.madvise(mmap.MADV_HUGEPAGE)
        except OSError as error:
            warn_once(f"this system has no huge pages ({error}): large layers may be slower")
    return np.frombuffer(pages, dtype=np.uint8)


@contextmanager
def memory_errors() -> Iterator[None]:
    """Where the system has no memory left, torch's allocator says RuntimeError and everything else MemoryError."""
    try:
        yield
    except RuntimeError as error:
        if "allocate memory" in str(error) or "size calculation overflowed" in str(error):
            raise MemoryError(str(error)) from error
        raise


class Arenas:
    """Arenas that no call is using; a call takes one for its duration.

    One thread calling one layer after the other always gets the same arena back, so a process holds
    as many arenas as calls have ever been under way at once. Threads of a NUMA node get those that they wrote first.
    """

    def __init__(self) -> None:
        self._free: dict[int | None, list[npt.NDArray[np.uint8]]] = {}
        self._lock = Lock()

    @contextmanager
    def lease(self, nbytes: int, node: int | None = None) -> Iterator[int]:
        """Address of at least ``nbytes`` bytes that nobody else uses until the block ends.

        ``node`` is that of the threads that use it; None where they run anywhere.
        """
        with self._lock:
            free = self._free.setdefault(node, [])
            arena = free.pop() if free else None
        if arena is None or arena.nbytes < nbytes:
            del arena  # before the larger one is taken, so that both are never held
            arena = allocate(nbytes)
        try:
            yield arena.ctypes.data
        finally:
            with self._lock:
                self._free.setdefault(node, []).append(arena)

    def free(self) -> list[npt.NDArray[np.uint8]]:
        """The arenas that no call is using now, of all nodes."""
        with self._lock:
            return [arena for arenas in self._free.values() for arena in arenas]

    def held_bytes(self) -> int:
        """Bytes of the arenas that are free now."""
        return sum(arena.nbytes for arena in self.free())

    def release(self) -> None:
        """Give all free arenas back to the system."""
        with self._lock:
            self._free.clear()


class Blocks:
    """Memory of large tensors that come with a call and go with it or its backward: the next call gets it again.

    The system clears fresh pages at 2 GB/s, slower than the kernels fill them (2026-11-24, two threads of Zen 4). A
    block is free again when the last tensor in it is gone, so what is held is what tensors once filled at one time.
    """

    def __init__(self) -> None:
        self._free: list[npt.NDArray[np.uint8]] = []
        # Tensors die in any thread, also while this one holds the lock: they only append here.
        self._returned: deque[npt.NDArray[np.uint8]] = deque()
        self._lock = Lock()

    def take(self, nbytes: int) -> npt.NDArray[np.uint8]:
        """``nbytes`` bytes of any contents, the caller's until the last view of them is gone.

        Raises:
            MemoryError: as :func:`allocate`.
        """
        with self._lock:
            self._collect()
            found = self._find(nbytes)
        block = allocate(nbytes) if found is None else found
        # Through a memoryview: NumPy makes the first array the base of a view of a view, so only `block` would be held.
        view = np.frombuffer(block.data, np.uint8, nbytes)
        weakref.finalize(view, self._returned.append, block).atexit = False
        return view

    def held_bytes(self) -> int:
        """Bytes of the blocks that are free now."""
        with self._lock:
            self._collect()
            return sum(block.nbytes for block in self._free)

    def release(self) -> None:
        """Give all free blocks back to the system."""
        with self._lock:
            self._collect()
            self._free.clear()

    def _collect(self) -> None:
        while self._returned:
            self._free.append(self._returned.popleft())

    def _find(self, nbytes: int) -> npt.NDArray[np.uint8] | None:
        """The smallest free block that fits and is not half empty; else room is made for a new one."""
        fitting = [block for block in self._free if nbytes <= block.nbytes <= 2 * nbytes]
        if fitting:
            best = min(fitting, key=lambda block: block.nbytes)
            self._free = [block for block in self._free if block is not best]
            return best
        self._free.sort(key=lambda block: block.nbytes)
        while nbytes > 0 and self._free:
            nbytes -= self._free.pop(0).nbytes
        return None


arenas = Arenas()
blocks = Blocks()


def release_memory() -> None:
    """Give the system what no call and no tensor is using: the process keeps scratch and blocks for the next call."""
    arenas.release()
    blocks.release()
