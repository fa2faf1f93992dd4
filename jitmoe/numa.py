"""Puts memory on NUMA nodes and asks where it lies, by the system calls of Linux; libnuma is not needed."""

import ctypes
import mmap
import os
from collections.abc import Callable

PAGE = os.sysconf("SC_PAGE_SIZE")

MBIND, MOVE_PAGES = 237, 279
"""Numbers of the system calls on x86-64."""

PREFERRED = 1
"""``MPOL_PREFERRED``: another node is taken where this one is full, and nobody is killed."""

MASK_BITS = 1024
"""Bits of a mask of nodes."""

SAMPLES = 512
"""Pages that :func:`nodes_of` asks for."""

Call = Callable[..., int]
"""``syscall``: negative for an error."""


def _system() -> tuple[Call, Callable[[], int]]:
    library = ctypes.CDLL(None, use_errno=True)
    library.syscall.restype = ctypes.c_long
    return library.syscall, ctypes.get_errno


def prefer(address: int, nbytes: int, node: int) -> str | None:
    """Let pages that are not touched yet come from ``node``.

    Args:
        address: of whole pages, fresh from mmap.
        nbytes: of them; a page in part counts.
        node: its number.

    Returns:
        None, or why the system refuses: containers often forbid it.
    """
    call, error = _system()
    mask = (ctypes.c_uint64 * (MASK_BITS // 64))()
    mask[node // 64] = 1 << node % 64
    length = ctypes.c_ulong(-(-nbytes // PAGE) * PAGE)
    arguments = (ctypes.c_void_p(address), length, ctypes.c_int(PREFERRED), mask)
    if call(MBIND, *arguments, ctypes.c_ulong(MASK_BITS + 1), ctypes.c_uint(0)) < 0:
        return f"mbind: {os.strerror(error())}"
    return None


def nodes_of(address: int, nbytes: int) -> dict[int, int] | str:
    """On which nodes the pages lie, of up to :data:`SAMPLES` of them: pages by node; negative nodes are errors.

    Returns:
        Number of pages by node, or why the system does not say.
    """
    pages = max(-(-nbytes // PAGE), 1)
    chosen = sorted({pages * place // SAMPLES for place in range(SAMPLES)})
    first = address // PAGE * PAGE
    places = (ctypes.c_void_p * len(chosen))(*(first + page * PAGE for page in chosen))
    status = (ctypes.c_int * len(chosen))()
    call, error = _system()
    # Without target nodes nothing is moved: the call only says where pages are.
    count = ctypes.c_ulong(len(chosen))
    if call(MOVE_PAGES, ctypes.c_int(0), count, places, None, status, ctypes.c_int(0)) < 0:
        return f"move_pages: {os.strerror(error())}"
    found: dict[int, int] = {}
    for node in status:
        found[node] = found.get(node, 0) + 1
    return found


def trial(node: int) -> str | None:
    """Put a page on ``node`` and look where it is: None if it is there, else why not."""
    with mmap.mmap(-1, PAGE) as memory:
        page = ctypes.c_char.from_buffer(memory)
        address = ctypes.addressof(page)
        refused = prefer(address, PAGE, node)
        page.value = b"\1"
        found = nodes_of(address, PAGE)
        del page  # or the memory would still be in use
    if refused:
        return refused
    return found if isinstance(found, str) else None if node in found else "it came from another node"
