"""Moves rows between token order and expert order, for the threads of the kernels.

``gather_rows`` and ``sum_rows`` are transposes of each other. The kernels call them through C function pointers from
their own threads, so there is no second thread pool. Python can call them on arrays.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import carray  # type: ignore[attr-defined]

from jitmoe.host.compiled import callback, jit
from jitmoe.process import Lock, compiled_call

_GATHER_ROWS = "void(CPointer(uint16), int64, CPointer(int64), int64, int64, int64, CPointer(uint16), int64)"
_SUM_ROWS = (
    "void(CPointer(float32), int64, CPointer(int64), CPointer(float32), "
    "int64, int64, int64, int64, CPointer(float32), int64)"
)

# Numba tests whether a signed index is negative, as NumPy counts those from the end; the test prevents vector code.
_unsigned = np.uintp

# Inlined into their C entry: to pass the arrays takes some 20 stack words, as long as a row of 32 columns.
_jit = jit(forceinline=True)


@_jit
def gather_rows(x: np.ndarray, row_token: np.ndarray, column: int, columns: int, out: np.ndarray) -> None:
    """Copy ``columns`` columns from ``column`` on of each row's token: out[r, c] = x[row_token[r], column + c].

    Args:
        x: [T, >= column + columns] uint16 (bfloat16 bits).
        row_token: [S] int64 within [0, T), not checked here: :func:`jitmoe.host.route.route` did.
        column: first column of x to copy.
        columns: number of columns to copy.
        out: [S, >= columns] uint16; columns beyond ``columns`` are left alone.
    """
    first = _unsigned(column)
    for row in range(_unsigned(row_token.size)):
        token = _unsigned(row_token[row])
        for c in range(_unsigned(columns)):
            out[row, c] = x[token, first + c]


@_jit
def sum_rows(
    values: np.ndarray,
    row_token: np.ndarray,
    row_weight: np.ndarray,
    weighted: bool,
    column: int,
    columns: int,
    out: np.ndarray,
) -> None:
    """Add each row to its token: out[row_token[r], column + c] += row_weight[r] * values[r, c].

    Rows are added in ascending order, and product and sum are rounded separately, so the result depends on the inputs
    alone.

    Args:
        values: [S, >= columns] float32.
        row_token: [S] int64 within [0, T), not checked here: :func:`jitmoe.host.route.route` did.
        row_weight: [S] float32 routing weights, read only if ``weighted``.
        weighted: multiply by ``row_weight``; else values are added as they are.
        column: first column of out to add to.
        columns: number of columns to add.
        out: [T, >= column + columns] float32.
    """
    first = _unsigned(column)
    for row in range(_unsigned(row_token.size)):
        token = _unsigned(row_token[row])
        if weighted:
            weight = row_weight[row]
            for c in range(_unsigned(columns)):
                out[token, first + c] += weight * values[row, c]
        else:
            for c in range(_unsigned(columns)):
                out[token, first + c] += values[row, c]


@functools.cache
def gather_rows_address() -> int:
    """Address of ``gather_rows`` for C; compiled at first use, or read from Numba's cache on disk.

    ``void (const uint16_t* x, int64_t x_stride, const int64_t* row_token, int64_t rows, int64_t column,
    int64_t columns, uint16_t* out, int64_t out_stride)``, strides in elements. Any thread may call it,
    without the GIL, for as long as the process lives.
    """
    return int(compile_callback(_gather_rows_at, _GATHER_ROWS).address)


@functools.cache
def sum_rows_address() -> int:
    """Address of ``sum_rows`` for C; compiled at first use, or read from Numba's cache on disk.

    ``void (const float* values, int64_t values_stride, const int64_t* row_token, const float* row_weight,
    int64_t weighted, int64_t rows, int64_t column, int64_t columns, float* out, int64_t out_stride)``,
    strides in elements; ``row_weight`` may be null where ``weighted`` is 0. Any thread may call it,
    without the GIL, for as long as the process lives.
    """
    return int(compile_callback(_sum_rows_at, _SUM_ROWS).address)


_compiling = Lock()


def compile_callback(function: Callable[..., None], signature: str) -> Any:
    """The Numba cfunc of a module-level ``function``, compiled once and kept for the life of the process."""
    # functools.cache alone lets two threads compile at once and then drops one result, whose address is in use.
    with _compiling, compiled_call():
        return _compile_once(function, signature)


@functools.cache
def _compile_once(function: Callable[..., None], signature: str) -> Any:
    return callback(function, signature)


# C does not pass T, the leading dimension of the arrays that are indexed by token. Any number will do: addresses in a
# C-contiguous array do not depend on it.


def _gather_rows_at(
    x: Any, x_stride: int, row_token: Any, rows: int, column: int, columns: int, out: Any, out_stride: int
) -> None:
    gather_rows(carray(x, (rows, x_stride)), carray(row_token, rows), column, columns, carray(out, (rows, out_stride)))


def _sum_rows_at(
    values: Any,
    values_stride: int,
    row_token: Any,
    row_weight: Any,
    weighted: int,
    rows: int,
    column: int,
    columns: int,
    out: Any,
    out_stride: int,
) -> None:
    sum_rows(
        carray(values, (rows, values_stride)),
        carray(row_token, rows),
        carray(row_weight, rows),
        weighted != 0,
        column,
        columns,
        carray(out, (rows, out_stride)),
    )
