"""Loads compiled libraries: what was checked is what is loaded, and a new one is tried in a child process first."""

import ctypes
import itertools
import sys
import tempfile
from pathlib import Path

from jitmoe.errors import BuildError, KernelError
from jitmoe.jit import abi, toolchain
from jitmoe.jit.cache import opened_library

TRIAL_SECONDS = 60.0
"""Longest trial of a library. It takes 50 ms; machines can be busy, and a library can hang."""

TRIAL_SIZE = (3, 5, 96)
"""Experts, rows and columns of the matrices that a trial packs and unpacks: rows that are padded, and no part of a word
or group, which a quantised format would not give back."""

ROOM = 1 << 16
"""Bytes for values, scales and packed weights of a trial, more than any format takes."""

_loads = itertools.count(1)

TRIAL = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
if hasattr(library, "jitmoe_abi"):
    version, size, experts, out, columns, room = map(int, sys.argv[2:])
    library.jitmoe_call_size.restype = ctypes.c_int64
    found = library.jitmoe_abi(), library.jitmoe_call_size()
    if found != (version, size):
        sys.exit(f"it has the interface {found}, expected {(version, size)}")
    move = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 4
    library.jitmoe_pack.argtypes = library.jitmoe_unpack.argtypes = move
    given = (ctypes.c_uint8 * room)(*(1 + at % 251 for at in range(room)))
    scales, packed, back, others = ((ctypes.c_uint8 * room)() for _ in range(4))
    library.jitmoe_pack(given, scales, packed, experts, out, columns, 1)
    library.jitmoe_unpack(packed, back, others, experts, out, columns, 1)
    written = bytes(back).rstrip(bytes(1))
    if not written or written != bytes(given)[: len(written)]:
        sys.exit("what it packs is not what it unpacks")
"""


def try_in_child(library: Path) -> None:
    """Load ``library`` in a process of its own and, if it is a kernel, check its interface and move some weights.

    Raises:
        BuildError: it cannot be loaded, ends the process, hangs, or is of another interface.
    """
    experts, out, columns = TRIAL_SIZE
    numbers = (abi.ABI_VERSION, abi.CALL.itemsize, experts, out, columns, ROOM)
    arguments = [str(library), *map(str, numbers)]
    with tempfile.TemporaryFile() as said:
        failure = toolchain.run([sys.executable, "-I", "-S", "-c", TRIAL, *arguments], TRIAL_SECONDS, said)
        said.seek(0)
        last = said.read().decode(errors="replace").strip().splitlines()[-1:]
    if failure is not None:
        raise BuildError(
            f"the compiler reported success, and a process that tried its library {failure}: "
            f"{''.join(last) or '(it said nothing)'}. Is JITMOE_CXX or CXX a wrapper that changes what is compiled?"
        )


def load(path: Path) -> ctypes.CDLL:
    """Load a library of the cache, from the very descriptor that its owner, mode and digest were read from.

    Raises:
        CacheSecurityError: it belongs to somebody else or is writable by others.
        KernelError: it has changed since it was found, or the system cannot load it.
    """
    try:
        with opened_library(path) as descriptor:
            return ctypes.CDLL(f"{_new_folder()}{descriptor}")
    except OSError as error:
        raise KernelError(f"{path} cannot be loaded: {error}. Remove it with `jitmoe cache clear`") from error


def _new_folder() -> str:
    """/proc/self/fd/, spelled as never before: the loader gives back an older library for a name that it knows."""
    return "/proc/self/fd/" + "".join("./" if bit == "1" else "/" for bit in f"{next(_loads):b}")
