"""Compiled kernels as Python functions."""

import ctypes
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jitmoe.errors import KernelError
from jitmoe.jit import abi
from jitmoe.jit.build import ensure
from jitmoe.jit.capability import resolve_isa
from jitmoe.jit.library import load as load_library
from jitmoe.jit.render import render
from jitmoe.plan.shapes import Shape


class Kernels:
    """The functions of one loaded instance.

    Raises:
        KernelError: the library was built for another version of the C interface, or cannot be loaded.
        CacheSecurityError: it is in the hands of somebody else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        library = load_library(path)
        if not hasattr(library, "jitmoe_abi"):
            raise KernelError(f"{path} is no kernel of jitmoe; run `jitmoe cache clear`")
        library.jitmoe_call_size.restype = ctypes.c_int64
        if library.jitmoe_abi() != abi.ABI_VERSION or library.jitmoe_call_size() != abi.CALL.itemsize:
            raise KernelError(f"{path} was built for another version of jitmoe; run `jitmoe cache clear`")
        sizes = [ctypes.c_int64] * 4
        move = [*[ctypes.c_void_p] * 3, *sizes]
        self._passes = {
            name: _function(library, f"jitmoe_{name}", [ctypes.c_void_p]) for name in ("forward", "backward")
        }
        self._pack = _function(library, "jitmoe_pack", move)
        self._unpack = _function(library, "jitmoe_unpack", move)
        self._decode = _function(library, "jitmoe_decode", [*[ctypes.c_void_p] * 2, *sizes])

    def run(self, pass_name: str, record: abi.Record) -> None:
        """Run the pass "forward" or "backward" on the ``Call`` in ``record``, whose addresses must stay valid."""
        self._passes[pass_name](record.ctypes.data)

    def pack(
        self, values: int, packed: int, experts: int, out: int, in_: int, threads: int, scales: int | None = None
    ) -> None:
        """Pack matrices of the shape's weight format.

        Args:
            values: address of [experts, out, in_] as shipped; see :class:`~jitmoe.formats.Packing`.
            packed: address of ``experts`` times :meth:`~jitmoe.formats.Packing.packed_bytes`, to be written.
            experts: number of matrices.
            out: rows of each.
            in_: columns of each.
            threads: to use.
            scales: address of the scales as shipped; of bfloat16 there are none.
        """
        self._pack(values, scales, packed, experts, out, in_, threads)

    def unpack(
        self, packed: int, values: int, experts: int, out: int, in_: int, threads: int, scales: int | None = None
    ) -> None:
        """The inverse of :meth:`pack`: reads ``packed`` and writes ``values`` and ``scales``."""
        self._unpack(packed, values, scales, experts, out, in_, threads)

    def decode(self, packed: int, decoded: int, experts: int, out: int, in_: int, threads: int) -> None:
        """Write the bfloat16 [experts, out, in_] that products multiply with to ``decoded``."""
        self._decode(packed, decoded, experts, out, in_, threads)


def array_at(
    address: int, dtype: type[np.generic], shape: tuple[int, ...], strides: tuple[int, ...] | None = None
) -> npt.NDArray[np.generic]:
    """The memory at ``address`` as an array, valid as long as the owner keeps the memory.

    ``strides`` are in elements; without them the array is C-contiguous.
    """
    item = np.dtype(dtype).itemsize
    if not math.prod(shape):
        return np.empty(shape, dtype)
    if strides is None:
        strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    elements = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    memory = memoryview((ctypes.c_uint8 * (elements * item)).from_address(address)).cast("B")
    return np.ndarray(shape, dtype, memory, strides=tuple(stride * item for stride in strides))


@cache
def load(shape: Shape) -> Kernels:
    """Kernels of ``shape``, compiled at first use and kept for the life of the process.

    Raises:
        IsaError: this machine cannot execute them.
        BuildError: there is no compiler, or it fails.
        CacheSecurityError: somebody else could write into the cache.
        KernelError: the library was built for another version of the C interface.
    """
    resolve_isa(shape.isa)
    return Kernels(ensure(render(shape)))


def _function(library: ctypes.CDLL, name: str, argtypes: list[Any]) -> Any:
    function = getattr(library, name)
    function.argtypes = argtypes
    function.restype = None
    return function
