"""Row movement: right in every form, transposes of each other, the same through a C pointer."""

import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jitmoe.host import tokens

INT = ctypes.c_int64
POINTER = ctypes.c_void_p


def address_of(array: np.ndarray) -> ctypes.c_void_p:
    return POINTER(array.ctypes.data)


def gather_through_c(x: np.ndarray, row_token: np.ndarray, column: int, columns: int, out: np.ndarray) -> None:
    call = ctypes.CFUNCTYPE(None, POINTER, INT, POINTER, INT, INT, INT, POINTER, INT)(tokens.gather_rows_address())
    call(
        address_of(x), x.shape[1], address_of(row_token), row_token.size, column, columns, address_of(out), out.shape[1]
    )


def sum_through_c(
    values: np.ndarray,
    row_token: np.ndarray,
    row_weight: np.ndarray,
    weighted: bool,
    column: int,
    columns: int,
    out: np.ndarray,
) -> None:
    call = ctypes.CFUNCTYPE(None, POINTER, INT, POINTER, POINTER, INT, INT, INT, INT, POINTER, INT)(
        tokens.sum_rows_address()
    )
    call(
        address_of(values),
        values.shape[1],
        address_of(row_token),
        address_of(row_weight) if weighted else None,
        weighted,
        row_token.size,
        column,
        columns,
        address_of(out),
        out.shape[1],
    )


GATHERS = {"compiled": tokens.gather_rows, "interpreted": tokens.gather_rows.py_func, "c": gather_through_c}
SUMS = {"compiled": tokens.sum_rows, "interpreted": tokens.sum_rows.py_func, "c": sum_through_c}
gathers = pytest.mark.parametrize("gather", GATHERS.values(), ids=GATHERS)
sums = pytest.mark.parametrize("sum_up", SUMS.values(), ids=SUMS)
forms = pytest.mark.parametrize(("gather", "sum_up"), [(GATHERS[name], SUMS[name]) for name in GATHERS], ids=GATHERS)

TOKENS = 7
WIDTH = 70
WINDOWS = [(0, 70), (0, 1), (69, 1), (3, 31), (32, 32), (5, 33), (2, 64), (4, 0)]
windows = pytest.mark.parametrize(("column", "columns"), WINDOWS)
ROW_TOKEN = np.array([3, 0, 6, 3, 3, 1, 0, 5])


@gathers
@windows
def test_gather_copies_the_window_and_nothing_else(gather: Callable[..., None], column: int, columns: int) -> None:
    x = np.random.default_rng(0).integers(1, 2**16, (TOKENS, WIDTH)).astype(np.uint16)
    out = np.zeros((ROW_TOKEN.size, columns + 3), np.uint16)
    gather(x, ROW_TOKEN, column, columns, out)
    np.testing.assert_array_equal(out[:, :columns], x[ROW_TOKEN, column : column + columns])
    assert not out[:, columns:].any()


@sums
@windows
@pytest.mark.parametrize("weighted", [False, True])
def test_sum_adds_rows_in_order_and_rounds_twice(
    sum_up: Callable[..., None], weighted: bool, column: int, columns: int
) -> None:
    rng = np.random.default_rng(1)
    values = rng.standard_normal((ROW_TOKEN.size, columns + 3)).astype(np.float32)
    weight = rng.standard_normal(ROW_TOKEN.size).astype(np.float32)
    out = rng.standard_normal((TOKENS, WIDTH)).astype(np.float32)
    expected = out.copy()
    for row, token in enumerate(ROW_TOKEN):
        product = weight[row] * values[row, :columns] if weighted else values[row, :columns]
        expected[token, column : column + columns] += product
    sum_up(values, ROW_TOKEN, weight, weighted, column, columns, out)
    np.testing.assert_array_equal(out.view(np.uint32), expected.view(np.uint32))


@sums
@pytest.mark.parametrize("columns", [1, 32, 40, 64])
def test_product_and_sum_are_not_fused(sum_up: Callable[..., None], columns: int) -> None:
    factor = np.float32(1 + 2**-12)
    values = np.full((1, columns), factor, np.float32)
    out = np.full((1, columns), -(1 + 2**-11), np.float32)
    sum_up(values, np.array([0]), np.array([factor]), True, 0, columns, out)
    # The square is 1 + 2^-11 + 2^-24; a fused multiply-add would leave the last term.
    assert not out.any()


@sums
def test_without_weights_none_is_read(sum_up: Callable[..., None]) -> None:
    out = np.zeros((1, 4), np.float32)
    sum_up(np.ones((2, 4), np.float32), np.array([0, 0]), np.full(2, np.nan, np.float32), False, 0, 4, out)
    np.testing.assert_array_equal(out, 2)


@sums
def test_zero_weight_adds_zero_and_keeps_the_nan_of_its_own_token(sum_up: Callable[..., None]) -> None:
    values = np.array([[1e38], [np.nan]], np.float32)
    out = np.array([[3], [4], [5]], np.float32)
    sum_up(values, np.array([0, 2]), np.zeros(2, np.float32), True, 0, 1, out)
    assert out[:2, 0].tolist() == [3, 4] and np.isnan(out[2, 0])


@forms
@windows
def test_sum_is_the_transpose_of_gather(
    gather: Callable[..., None], sum_up: Callable[..., None], column: int, columns: int
) -> None:
    rng = np.random.default_rng(2)
    # Small integers: exact in bfloat16, float32 and the float64 of the inner products.
    x = rng.integers(-8, 9, (TOKENS, WIDTH)).astype(np.float32)
    y = rng.integers(-8, 9, (ROW_TOKEN.size, columns)).astype(np.float32)
    gathered = np.zeros((ROW_TOKEN.size, columns), np.uint16)
    gather((x.view(np.uint32) >> 16).astype(np.uint16), ROW_TOKEN, column, columns, gathered)
    gathered_floats = (gathered.astype(np.uint32) << 16).view(np.float32)
    summed = np.zeros((TOKENS, WIDTH), np.float32)
    sum_up(y, ROW_TOKEN, np.ones(0, np.float32), False, column, columns, summed)
    rows_side = np.vdot(gathered_floats.astype(np.float64), y)
    assert rows_side == np.vdot(x.astype(np.float64), summed)
    assert columns == 0 or rows_side != 0


@forms
def test_no_rows_touch_nothing(gather: Callable[..., None], sum_up: Callable[..., None]) -> None:
    none = np.empty(0, np.int64)
    gather(np.ones((0, 4), np.uint16), none, 0, 4, np.empty((0, 4), np.uint16))
    out = np.ones((2, 4), np.float32)
    sum_up(np.ones((0, 4), np.float32), none, np.ones(0, np.float32), True, 0, 4, out)
    np.testing.assert_array_equal(out, 1)


def test_threads_own_their_columns() -> None:
    rng = np.random.default_rng(3)
    row_token = np.sort(rng.integers(0, 50, 300))
    values = rng.standard_normal((300, 32)).astype(np.float32)
    weight = rng.standard_normal(300).astype(np.float32)
    expected = np.zeros((50, 32), np.float32)
    tokens.sum_rows(values, row_token, weight, True, 0, 32, expected)
    out = np.zeros((50, 8 * 32), np.float32)
    threads = [
        threading.Thread(target=sum_through_c, args=(values, row_token, weight, True, 32 * strip, 32, out))
        for strip in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(out, np.tile(expected, 8))


def test_an_address_stays() -> None:
    assert tokens.gather_rows_address() == tokens.gather_rows_address() != 0
    assert tokens.sum_rows_address() == tokens.sum_rows_address() != tokens.gather_rows_address()


def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    program = (
        "from jitmoe.host import tokens\n"
        "tokens.gather_rows_address(), tokens.sum_rows_address()\n"
        "entries = [(tokens._gather_rows_at, tokens._GATHER_ROWS), (tokens._sum_rows_at, tokens._SUM_ROWS)]\n"
        "print(*(tokens.compile_callback(*entry).cache_hits for entry in entries))\n"
    )
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}

    def run() -> tuple[str, dict[str, int]]:
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=120
        )
        return done.stdout.strip(), {str(path): path.stat().st_mtime_ns for path in tmp_path.rglob("*.nb?")}

    cold, written = run()
    warm, kept = run()
    assert (cold, warm) == ("0 0", "1 1")
    assert written and kept == written
