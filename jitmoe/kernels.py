"""Compiled kernels as Python functions; the only module that speaks ctypes."""

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from jitmoe.build import ensure
from jitmoe.errors import KernelError
from jitmoe.plan import Shape
from jitmoe.render import render

ABI_VERSION = 1

_POINTERS_IN = """
    x out_grad gate_weights up_weights down_weights
    gate_lora_a gate_lora_b up_lora_a up_lora_b down_lora_a down_lora_b
    gate_lora_a_grad gate_lora_b_grad up_lora_a_grad up_lora_b_grad down_lora_a_grad down_lora_b_grad
    saved_gate saved_up result result_float weights_grad
    row_token row_slot row_weight segments group_segments
""".split()
_NUMBERS = "groups tokens rank threads".split()
_FUNCTIONS = "gather_rows sum_rows".split()
SCRATCH = """
    sums x_panel out_panel act_panel gate_panel up_panel gate_low up_low down_low
    gate_low_rows up_low_rows down_low_rows gate_in_rows up_in_rows down_in_rows
    dot_parts group_gate group_up thread_weights thread_strips thread_rows thread_block
""".split()
_STRIDES = "weights_stride strips_stride rows_stride block_stride".split()


class Call(ctypes.Structure):
    """Mirror of ``Call`` in call.hpp: 8-byte fields in the same order."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS_IN),
        *((name, ctypes.c_int64) for name in _NUMBERS),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in _FUNCTIONS + SCRATCH),
        *((name, ctypes.c_int64) for name in _STRIDES),
    ]


class Kernels:
    """The functions of one loaded instance.

    Raises:
        KernelError: if the library was built for another ABI.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        library = ctypes.CDLL(str(path))
        library.jitmoe_call_size.restype = ctypes.c_int64
        if library.jitmoe_abi() != ABI_VERSION or library.jitmoe_call_size() != ctypes.sizeof(Call):
            raise KernelError(f"{path} was built for another version of jitmoe; run `jitmoe cache clear`")
        call = [ctypes.POINTER(Call)]
        move = [ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 4]
        self._forward = _function(library, "jitmoe_forward", call)
        self._backward = _function(library, "jitmoe_backward", call)
        self._pack = _function(library, "jitmoe_pack", move)
        self._unpack = _function(library, "jitmoe_unpack", move)

    def forward(self, fields: dict[str, Any]) -> None:
        """Run forward; ``fields`` are those of :class:`Call`, absent ones null or zero."""
        self._forward(ctypes.byref(Call(**fields)))

    def backward(self, fields: dict[str, Any]) -> None:
        """Run backward; ``fields`` as for :meth:`forward`."""
        self._backward(ctypes.byref(Call(**fields)))

    def pack(self, canonical: int, packed: int, experts: int, out: int, in_: int, threads: int) -> None:
        """Write ``experts`` matrices [out, in] at address ``canonical`` in packed order to ``packed``."""
        self._pack(canonical, packed, experts, out, in_, threads)

    def unpack(self, packed: int, canonical: int, experts: int, out: int, in_: int, threads: int) -> None:
        """The inverse of :meth:`pack`."""
        self._unpack(packed, canonical, experts, out, in_, threads)


@cache
def load(shape: Shape) -> Kernels:
    """Kernels of ``shape``, compiled at first use and kept for the life of the process."""
    return Kernels(ensure(render(shape)))


def number_function(path: Path, name: str, arguments: int) -> Callable[..., float]:
    """``double name(int64_t, ...)`` with that many arguments, from the library at ``path``; runs without the GIL."""
    function: Callable[..., float] = getattr(ctypes.CDLL(str(path)), name)
    function.argtypes = [ctypes.c_int64] * arguments  # type: ignore[attr-defined]
    function.restype = ctypes.c_double  # type: ignore[attr-defined]
    return function


def _function(library: ctypes.CDLL, name: str, argtypes: list[Any]) -> Any:
    function = getattr(library, name)
    function.argtypes = argtypes
    function.restype = None
    return function
