"""The C interface of the kernels as records: mirrors of call.hpp and watch/, which a test compares by name."""

import struct
from typing import Any

import numpy as np
import numpy.typing as npt

from jitmoe.errors import KernelError
from jitmoe.plan.projections import NAMES

ABI_VERSION = 4
"""Version of the interface; ``kAbiVersion`` in call.hpp."""

PHASES = (
    *("gather", "pack", "low_rank", "gate_up", "activation", "down", "combine", "act_grad", "x_grad"),
    *("lora_grads", "sums"),
)
"""Phases that a timed instance measures, in the order of ``Phase`` in watch/timed.hpp."""

TENSORS = (
    *("x", "gate_u", "up_u", "gate", "up", "act", "down_u", "down", "dout", "down_du", "dact", "dgate", "dup"),
    *("gate_du", "up_du", "dx"),
)
"""Tensors that a traced instance shows, in the order of ``Tensor`` in watch/traced.hpp."""


def view_fields(name: str) -> tuple[str, ...]:
    """Fields of the ``Matrices`` called ``name``: its address and three strides, in elements."""
    return name, f"{name}.expert", f"{name}.row", f"{name}.column"


def _per_thread(name: str) -> tuple[str, str]:
    return name, f"{name}.stride"


PROJECTION = (
    *(
        "weights",
        "bias",
        *view_fields("a"),
        *view_fields("b"),
        *view_fields("a_grad"),
        *view_fields("b_grad"),
        "saved",
        "saved_u",
    ),
    *("low", "du_rows", "u_rows", "grad_panel", "again"),
)
"""Fields of a ``Projection`` (call.hpp) in their order."""

NUMBERS = ("scale", "alpha", "limit")
"""Fields that are no addresses and no counts: float64."""

FIELDS = (
    *("x", "out_grad"),
    *(f"{name}.{field}" for name in NAMES for field in PROJECTION),
    *("result", "result_float", "weights_grad"),
    *("row_token", "row_slot", "row_weight", "segments", "group_segments"),
    *("groups", "tokens", "rows", "rank", "threads", "scale", "alpha", "limit", "gather_rows", "sum_rows"),
    *("sums", "x_panel", "out_panel", "act_panel", "dot_parts"),
    *_per_thread("thread_weights"),
    *_per_thread("thread_strips"),
    *_per_thread("thread_rows"),
    *_per_thread("thread_lora"),
    *("phase_seconds", "checks", "census", "observe"),
)
"""Fields of a ``Call`` (call.hpp) in their order; members of members with dots."""

CALL = np.dtype([(name, np.float64 if name in NUMBERS else np.int64) for name in FIELDS])

_EMPTY: dict[str, Any] = dict.fromkeys(FIELDS, 0)
_LAYOUT = struct.Struct("=" + "".join("d" if name in NUMBERS else "q" for name in FIELDS))

Record = npt.NDArray[np.void]
"""One ``Call``, 0-dimensional: addresses and numbers under the names of :data:`FIELDS`."""


def record(fields: dict[str, Any]) -> Record:
    """A ``Call`` with these fields; the others are null or zero.

    Args:
        fields: addresses, strides and numbers under names of :data:`FIELDS`.

    Raises:
        KernelError: a ``Call`` has no field of some name; the message has the names.
    """
    filled = _EMPTY | fields  # in the order of FIELDS, and what is unknown behind them
    if len(filled) > len(FIELDS):
        unknown = ", ".join(list(filled)[len(FIELDS) :])
        raise KernelError(f"the kernels know no field {unknown}: jitmoe itself is wrong, please report this")
    return np.frombuffer(bytearray(_LAYOUT.pack(*filled.values())), CALL).reshape(())


LIFE = np.dtype([(name, np.int64) for name in ("offset", "nbytes", "first", "last", "alive")])
"""``Life`` in watch/checked.hpp; a checked call has one for each field of its ``Call``."""

CHECKS = np.dtype(
    [(name, np.int64) for name in ("arena", "owners", "lives", "step", "entered")]
    + [(f"fault{part}", np.int64) for part in ("", "_entered", "_step", "_buffer", "_offset", "_owner")]
)
"""``Checks`` in watch/checked.hpp."""
