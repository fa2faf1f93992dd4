"""Routing against NumPy's stable argsort, and the ids that it must refuse or skip."""

from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jitmoe.host.route
from jitmoe.errors import InputError, InputTypeError
from jitmoe.host.route import Route, route

ARRAYS = ("active", "offsets", "row_token", "row_slot")
EXTREMES = (-1, -(2**31), -(2**63), 2**31 - 1, 2**31, 2**32, 2**63 - 1)


def model(topk_ids: np.ndarray, num_experts: int) -> Route:
    """The same routing in NumPy: sort all slots, drop those outside [0, E)."""
    ids = topk_ids.reshape(-1).astype(np.int64)
    order = np.argsort(ids, kind="stable")
    row_slot = order[(ids[order] >= 0) & (ids[order] < num_experts)]
    active, counts = np.unique(ids[row_slot], return_counts=True)
    return Route(active, np.concatenate(([0], np.cumsum(counts))), row_slot // max(topk_ids.shape[1], 1), row_slot)


def assert_same(found: Route, expected: Route) -> None:
    for name in ARRAYS:
        array = getattr(found, name)
        assert array.dtype == np.int64 and array.flags.c_contiguous, name
        np.testing.assert_array_equal(array, getattr(expected, name), err_msg=name)


@pytest.fixture(autouse=True, params=["compiled", "interpreted"])
def either(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run each test with Numba's code and with the Python that it was compiled from."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "interpreted":
            for name in ("_first_outside", "_count_rows", "_row_ranges", "_sort_slots"):
                patch.setattr(jitmoe.host.route, name, getattr(jitmoe.host.route, name).py_func)
        yield


@st.composite
def routings(draw: st.DrawFn, outside: bool) -> tuple[np.ndarray, int]:
    num_experts = draw(st.integers(1, 9))
    dtype = draw(st.sampled_from([np.int64, np.int32]))
    limits = np.iinfo(dtype)
    inside = st.integers(0, num_experts - 1)
    ids = inside | st.sampled_from([v for v in EXTREMES if limits.min <= v <= limits.max] + [num_experts])
    shape = draw(st.tuples(st.integers(0, 12), st.integers(1, 5)))
    return draw(hnp.arrays(dtype, shape, elements=ids if outside else inside)), num_experts


@settings(deadline=None, max_examples=300)
@given(routings(outside=False))
def test_sorts_as_numpy_does(case: tuple[np.ndarray, int]) -> None:
    topk_ids, num_experts = case
    assert_same(route(topk_ids, num_experts), model(topk_ids, num_experts))


@settings(deadline=None, max_examples=300)
@given(routings(outside=True))
def test_skips_every_id_outside_the_experts(case: tuple[np.ndarray, int]) -> None:
    topk_ids, num_experts = case
    assert_same(route(topk_ids, num_experts, allow_skip=True), model(topk_ids, num_experts))


@settings(deadline=None, max_examples=300)
@given(routings(outside=True))
def test_absent_experts_in_ranges_that_do_not_touch(case: tuple[np.ndarray, int]) -> None:
    topk_ids, num_experts = case
    ranges = list(route(topk_ids, num_experts, allow_skip=True).absent(num_experts))
    found = [expert for begin, end in ranges for expert in range(begin, end)]
    assert found == np.setdiff1d(np.arange(num_experts), topk_ids).tolist()
    assert all(begin < end for begin, end in ranges)
    assert all(end < begin for (_, end), (begin, _) in pairwise(ranges))


def one_expert(_: np.random.Generator) -> np.ndarray:
    return np.full((33, 3), 5)


def every_expert(rng: np.random.Generator) -> np.ndarray:
    return np.stack([rng.permutation(8) for _ in range(17)])


def twice_in_a_token(rng: np.random.Generator) -> np.ndarray:
    return np.repeat(rng.integers(0, 8, (29, 2)), 2, axis=1)


def one_token(_: np.random.Generator) -> np.ndarray:
    return np.array([[7, 0]])


def no_token(_: np.random.Generator) -> np.ndarray:
    return np.empty((0, 4), np.int64)


@pytest.mark.parametrize("dtype", [np.int64, np.int32])
@pytest.mark.parametrize("ids", [one_expert, every_expert, twice_in_a_token, one_token, no_token])
def test_odd_routings(ids: Callable[[np.random.Generator], np.ndarray], dtype: type) -> None:
    topk_ids = ids(np.random.default_rng(0)).astype(dtype)
    assert_same(route(topk_ids, 8), model(topk_ids, 8))


def test_written_out() -> None:
    found = route(np.array([[2, 0], [0, 2], [4, 2]]), 5)
    assert [getattr(found, name).tolist() for name in ARRAYS] == [
        [0, 2, 4],
        [0, 2, 5, 6],
        [0, 1, 0, 1, 2, 2],
        [1, 2, 0, 3, 5, 4],
    ]


def test_every_slot_skipped() -> None:
    found = route(np.full((3, 2), -1), 4, allow_skip=True)
    assert [getattr(found, name).tolist() for name in ARRAYS] == [[], [0], [], []]


@pytest.mark.parametrize("strided", [lambda ids: ids[::2], lambda ids: ids[:, ::-1], lambda ids: ids.T])
def test_strided_and_read_only_ids(strided: Callable[[np.ndarray], np.ndarray]) -> None:
    ids = np.random.default_rng(1).integers(0, 6, (10, 4))
    ids.flags.writeable = False
    assert_same(route(strided(ids), 6), model(strided(ids), 6))


@pytest.mark.parametrize("bad", [*EXTREMES, 4])
def test_an_id_outside_is_named_with_token_and_slot(bad: int) -> None:
    topk_ids = np.zeros((5, 3), np.int64)
    topk_ids[3, 1] = bad
    topk_ids[4, 0] = -7
    before = topk_ids.copy()
    with pytest.raises(InputError) as caught:
        route(topk_ids, 4)
    assert f"topk_ids[3, 1] (token 3, slot 1) is {bad}: expert ids must lie in [0, 4)" in str(caught.value)
    np.testing.assert_array_equal(topk_ids, before)


@pytest.mark.parametrize("bad", [-1, -(2**31), 4, 2**31 - 1])
def test_an_int32_id_outside_is_named(bad: int) -> None:
    topk_ids = np.array([[0, bad]], np.int32)
    with pytest.raises(InputError, match=rf"topk_ids\[0, 1\] .* is {bad}:"):
        route(topk_ids, 4)


def test_an_id_that_wraps_to_a_valid_int32_is_refused() -> None:
    with pytest.raises(InputError, match=f"is {2**32 + 1}:"):
        route(np.array([[2**32 + 1]]), 4)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.bool_, np.int16, np.uint64, np.dtype(">i8")])
def test_other_dtypes_are_refused(dtype: type) -> None:
    with pytest.raises(InputTypeError, match="topk_ids must be int64 or int32, got"):
        route(np.zeros((2, 2), dtype), 4)


@pytest.mark.parametrize("shape", [(), (4,), (2, 2, 2)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="topk_ids must be 2-D"):
        route(np.zeros(shape, np.int64), 4)
