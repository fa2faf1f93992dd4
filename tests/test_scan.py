"""The census of a matrix, in three formats, compiled and interpreted."""

import ctypes
import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jitmoe.host.scan
from jitmoe.errors import InputError, InputTypeError
from jitmoe.host.scan import Scan, scan


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def numbers(values: np.ndarray) -> np.ndarray:
    """The values of a matrix in float64, whatever its format."""
    if values.dtype == np.uint16:
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float64)


FORMATS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "float32": lambda values: values.astype(np.float32),
    "float64": lambda values: values.astype(np.float64),
    "bfloat16": bfloat16_bits,
}
formats = pytest.mark.parametrize("to_format", FORMATS.values(), ids=FORMATS)


@pytest.fixture(autouse=True, params=["compiled", "interpreted"])
def either(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run each test with Numba's code and with the Python that it was compiled from."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "interpreted":
            patch.setattr(jitmoe.host.scan, "_scan", jitmoe.host.scan._scan.py_func)
        yield


def model(values: np.ndarray) -> Scan:
    exact = numbers(values)
    finite = exact[np.isfinite(exact)]
    bad = np.argwhere(~np.isfinite(exact))
    return Scan(
        size=values.size,
        nan=int(np.isnan(exact).sum()),
        inf=int(np.isinf(exact).sum()),
        zero=int((exact == 0).sum()),
        first=(int(bad[0][0]), int(bad[0][1])) if bad.size else None,
        minimum=float(finite.min()) if finite.size else math.nan,
        maximum=float(finite.max()) if finite.size else math.nan,
        absmean=float(np.abs(finite).mean()) if finite.size else math.nan,
    )


def assert_same(found: Scan, expected: Scan) -> None:
    for name in ("nan", "inf", "zero", "first"):
        assert getattr(found, name) == getattr(expected, name), name
    for name in ("minimum", "maximum"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    # NumPy adds in pairs, the scan one after the other: equal within 1 ulp of float64 for each addend.
    np.testing.assert_allclose(found.absmean, expected.absmean, rtol=1e-12)


PATTERNS = hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=6)


@settings(deadline=None, max_examples=200)
@given(hnp.arrays(np.uint16, PATTERNS) | hnp.arrays(np.float32, PATTERNS, elements=st.floats(width=32)))
def test_any_bit_pattern(values: np.ndarray) -> None:
    assert_same(scan(values), model(values))


@formats
def test_finds_and_counts(to_format: Callable[[np.ndarray], np.ndarray]) -> None:
    values = np.random.default_rng(0).standard_normal((9, 17))
    values[0, 0], values[8, 16] = 0.0, -0.0
    values[4, 2], values[4, 11], values[6, 0], values[6, 5] = -np.inf, np.nan, np.inf, -np.nan
    found = scan(to_format(values))
    assert (found.nan, found.inf, found.zero, found.first) == (2, 2, 2, (4, 2))
    assert_same(found, model(to_format(values)))


@formats
def test_range_of_negative_numbers(to_format: Callable[[np.ndarray], np.ndarray]) -> None:
    found = scan(to_format(np.array([[-3.0, -0.5], [-2.0, np.nan]])))
    assert (found.minimum, found.maximum, found.absmean) == (-3.0, -0.5, 5.5 / 3)


@formats
def test_nothing_finite(to_format: Callable[[np.ndarray], np.ndarray]) -> None:
    found = scan(to_format(np.array([[np.nan, np.inf]])))
    assert (found.nan, found.inf, found.zero, found.first) == (1, 1, 0, (0, 0))
    assert all(map(math.isnan, (found.minimum, found.maximum, found.absmean)))


@formats
@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_empty(to_format: Callable[[np.ndarray], np.ndarray], shape: tuple[int, int]) -> None:
    found = scan(to_format(np.empty(shape)))
    assert (found.nan, found.inf, found.zero, found.first) == (0, 0, 0, None)
    assert math.isnan(found.absmean)


@formats
def test_denormals_are_neither_zero_nor_special(to_format: Callable[[np.ndarray], np.ndarray]) -> None:
    # The smallest denormal of bfloat16, which is one of float32 too.
    found = scan(to_format(np.array([[2.0**-133, -(2.0**-133)]])))
    assert (found.zero, found.minimum, found.maximum) == (0, -(2.0**-133), 2.0**-133)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_extremes(dtype: type[np.floating]) -> None:
    limits = np.finfo(dtype)
    values = np.array([[limits.max, limits.min, limits.smallest_subnormal, -limits.smallest_subnormal]])
    found = scan(values.astype(dtype))
    assert (found.nan, found.inf, found.zero, found.minimum, found.maximum) == (0, 0, 0, limits.min, limits.max)


@formats
def test_strided(to_format: Callable[[np.ndarray], np.ndarray]) -> None:
    values = to_format(np.random.default_rng(1).standard_normal((6, 10)))
    assert_same(scan(values[::2, 3:7]), model(values[::2, 3:7]))
    assert_same(scan(values.T), model(values.T))


@pytest.mark.parametrize("dtype", [np.float16, np.int64, np.int16])
def test_other_dtypes_are_refused(dtype: type) -> None:
    with pytest.raises(InputTypeError, match="values must be float32, float64 or uint16"):
        scan(np.zeros((2, 2), dtype))


def test_other_shapes_are_refused() -> None:
    with pytest.raises(InputError, match="2-D"):
        scan(np.zeros(4, np.float32))


def add_piece(record: np.ndarray, values: np.ndarray, row: int, column: int, strides: tuple[int, int]) -> None:
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    call = ctypes.CFUNCTYPE(None, pointer, pointer, *[integer] * 6)(jitmoe.host.scan.observe_address())
    rows, columns = values.shape
    call(record.ctypes.data, values.ctypes.data, row, rows, column, columns, *strides)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_pieces_add_up_to_the_whole(seed: int, transposed: bool) -> None:
    """In whatever order they come; with NaN around each piece that must not be read."""
    generator = np.random.default_rng(seed)
    matrix = generator.standard_normal((11, 13)).astype(np.float32)
    matrix[generator.random(matrix.shape) < 0.04] = np.nan
    matrix[8:, 10:] = np.nan
    for value in (np.inf, -np.inf, 0.0, -0.0, 3e38, 1e-42):
        matrix[tuple(generator.integers(matrix.shape))] = value
    pieces = [(row, column) for row in range(0, 11, 4) for column in range(0, 13, 5)]
    record = jitmoe.host.scan.empty_records(1)
    for row, column in generator.permutation(pieces).tolist():
        piece = matrix[row : row + 4, column : column + 5]
        around = np.full((8, 8), np.nan, np.float32)
        inside = (around.T if transposed else around)[: piece.shape[0], : piece.shape[1]]
        inside[:] = piece
        add_piece(record, inside, row, column, (1, 8) if transposed else (8, 1))
    assert_same(jitmoe.host.scan.read_record(record[0]), model(matrix))


def test_a_record_of_nothing() -> None:
    assert_same(jitmoe.host.scan.read_record(jitmoe.host.scan.empty_records(2)[1]), model(np.empty((0, 3), np.float32)))
