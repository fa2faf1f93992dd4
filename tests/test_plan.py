"""What the planner decides: kernels of a config, the kernel of a call, the cut of rows into groups."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jitmoe import MoEConfig
from jitmoe.config import MAX_SIZE
from jitmoe.errors import ConfigError
from jitmoe.isa import ISAS
from jitmoe.plan import shapes
from jitmoe.plan.groups import GROUP_BYTES, Extents, group_limit, plan_groups, worst_extents

FIELDS = {"num_experts": 4, "hidden_size": 64, "intermediate_size": 96, "top_k": 2}


def config_with(**fields: object) -> MoEConfig:
    return MoEConfig(**{**FIELDS, **fields})


@pytest.mark.parametrize("field", ["num_experts", "hidden_size", "intermediate_size", "top_k", "lora_rank", "m_step"])
@pytest.mark.parametrize("value", [-1, -(2**63), MAX_SIZE + 1, 2**64, 1.0, "8", True])
def test_impossible_sizes_are_refused_by_name_and_value(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field) as refused:
        config_with(**{field: value})
    assert repr(value) in str(refused.value)


@pytest.mark.parametrize("field", FIELDS)
def test_zero_is_no_size(field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field} must be between 1"):
        config_with(**{field: 0})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lora_dtype", "float16"), ("isa", "sse2"), ("lora_alpha", float("nan")), ("lora_alpha", float("inf")),
        ("lora_alpha", "16"), ("use_rslora", 1), ("allow_skip", None), ("batch_invariant", "no"), ("recompute", 0),
    ],
)  # fmt: skip
def test_impossible_options_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        config_with(**{field: value})


def test_largest_sizes_are_planned_without_overflow() -> None:
    config = config_with(hidden_size=MAX_SIZE, intermediate_size=MAX_SIZE, num_experts=MAX_SIZE, lora_rank=MAX_SIZE)
    (*_, shape) = shapes.plan_kernels(config, "ref").shapes
    assert (shape.hidden, shape.intermediate, shape.padded_rank) == (MAX_SIZE,) * 3


@pytest.mark.parametrize(("rank", "padded"), [(0, 0), (1, 32), (31, 32), (32, 32), (33, 64)])
def test_rank_is_padded_to_the_k_step(rank: int, padded: int) -> None:
    assert {shape.padded_rank for shape in shapes.plan_kernels(config_with(lora_rank=rank), "ref").shapes} == {padded}


@pytest.mark.parametrize("isa", ISAS)
class TestRegisterBlocks:
    def test_all_of_the_instruction_set_are_planned_ascending(self, isa: str) -> None:
        found = shapes.plan_kernels(config_with(), isa).shapes
        steps = [shape.m_step for shape in found]
        assert [shape.m_step for shape in found if shape.isa == isa] == sorted(ISAS[isa].m_steps)
        assert steps and steps == sorted(steps)

    def test_there_is_a_limit_between_each_two(self, isa: str) -> None:
        limits = ISAS[isa].row_limits
        assert len(limits) == len(shapes.plan_kernels(config_with(), isa).shapes) - 1
        assert list(limits) == sorted(set(limits))

    def test_one_can_be_forced(self, isa: str) -> None:
        for step in ISAS[isa].m_steps:
            assert [shape.m_step for shape in shapes.plan_kernels(config_with(m_step=step), isa).shapes] == [step]

    def test_another_is_refused_with_the_choice(self, isa: str) -> None:
        with pytest.raises(ConfigError, match=f"m_step must be one of .* on {isa}, got 1000"):
            shapes.plan_kernels(config_with(m_step=1000), isa)

    def test_few_rows_take_the_smallest_many_the_largest(self, isa: str) -> None:
        kernels = shapes.plan_kernels(config_with(), isa)
        assert kernels.select(rows=4 * min(ISAS[isa].row_limits, default=1), active_experts=4) is kernels.shapes[0]
        assert kernels.select(rows=4000, active_experts=4) is kernels.shapes[-1]

    def test_a_batch_invariant_layer_has_one_form_for_every_row_count(self, isa: str) -> None:
        kernels = shapes.plan_kernels(config_with(batch_invariant=True), isa)
        assert {kernels.select(rows, 4) for rows in (0, 1, 32, 33, 10**6)} == {kernels.shapes[-1]}


def test_rows_choose_among_the_kernels_of_amx() -> None:
    kernels = shapes.plan_kernels(config_with(), "amx")
    chosen = [kernels.select(rows, 10) for rows in (*(10 * limit for limit in ISAS["amx"].row_limits), 1000)]
    assert [(shape.isa, shape.m_step) for shape in chosen] == [("avx512", 4), ("amx", 16), ("amx", 32)]
    assert {shape.isa for shape in shapes.plan_kernels(config_with(batch_invariant=True), "amx").shapes} == {"amx"}


def test_the_lora_dtype_of_cast_parameters_counts() -> None:
    assert not shapes.plan_kernels(config_with(), "ref").shapes[0].lora_bf16
    assert shapes.plan_kernels(config_with(), "ref", lora_dtype="bfloat16").shapes[0].lora_bf16


def test_names_of_shapes_tell_them_apart() -> None:
    configs = [config_with(lora_rank=rank, lora_dtype=dtype) for rank in (0, 8) for dtype in ("float32", "bfloat16")]
    named = {shape for isa in ISAS for config in configs for shape in shapes.plan_kernels(config, isa).shapes}
    named |= {replace(shape, activation="another") for shape in named}
    assert len({shape.name for shape in named}) == len(named)


@st.composite
def routed(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """``active`` and ``offsets`` as a Route has them: ascending ids, no expert without rows."""
    counts = draw(st.lists(st.one_of(st.just(0), st.integers(1, 60)), max_size=12))
    active = [expert for expert, rows in enumerate(counts) if rows]
    offsets = np.cumsum([0, *(counts[expert] for expert in active)])
    return np.array(active, np.int64), offsets.astype(np.int64)


@given(routed(), st.sampled_from([1, 3, 4, 14]), st.sampled_from([1 << 20, 4 << 20, 1 << 40]))
def test_groups(rows: tuple[np.ndarray, np.ndarray], m_step: int, row_bytes: int) -> None:
    """Every row lies in one segment of its expert, in order; groups hold whole segments that fit the panels."""
    active, offsets = rows
    groups = plan_groups(active, offsets, m_step, row_bytes)
    limit = max(GROUP_BYTES // row_bytes, 4 * m_step) + m_step
    row = 0
    for expert, first, count, _ in groups.segments.tolist():
        assert count > 0 and first == row
        index = active.tolist().index(expert)
        assert offsets[index] <= first and first + count <= offsets[index + 1]
        row += count
    assert row == offsets[-1]
    assert groups.bounds.tolist() == sorted(set(groups.bounds.tolist())), "no empty group"
    assert groups.bounds[0] == 0 and groups.bounds[-1] == len(groups.segments)
    sizes = []
    for begin, end in zip(groups.bounds[:-1], groups.bounds[1:], strict=True):
        mine = groups.segments[begin:end]
        assert len(set(mine[:, 0].tolist())) == len(mine), "one expert's segments may not meet in a group"
        blocks = [shapes.ceil_div(int(count), m_step) for count in mine[:, 2]]
        assert mine[:, 3].tolist() == [sum(blocks[:i]) for i in range(len(blocks))]
        assert sum(blocks) * m_step <= limit
        sizes.append((int(mine[:, 2].sum()), sum(blocks)))
    assert groups.extents(tokens=5, rank=6, threads=7) == Extents(
        tokens=5,
        rows=max((size for size, _ in sizes), default=0),
        blocks=max((blocks for _, blocks in sizes), default=0),
        segment_rows=max((int(count) for count in groups.segments[:, 2]), default=0),
        rank=6,
        threads=7,
    )


@given(st.lists(st.integers(0, 60), min_size=1, max_size=12), st.sampled_from([1, 3, 14]), st.integers(4, 40))
def test_no_routing_exceeds_the_worst_extents(counts: list[int], m_step: int, blocks: int) -> None:
    """Whatever the routing: neither those that reach the extents (next test) nor any other is above them."""
    row_bytes = GROUP_BYTES // (blocks * m_step)
    limit = group_limit(m_step, row_bytes)
    active = np.flatnonzero(counts)
    offsets = np.cumsum([0, *(counts[expert] for expert in active)])
    groups = plan_groups(active, offsets, m_step, row_bytes).extents(9, 8, 2)
    for range_ in ((active.size, active.size), (min(active.size, 1), min(len(counts), sum(counts)))):
        worst = worst_extents(9, sum(counts), range_, m_step, limit, 8, 2)
        assert groups.rows <= worst.rows and groups.blocks <= worst.blocks and groups.segment_rows <= worst.segment_rows


@given(st.integers(1, 400), st.integers(1, 30), st.sampled_from([1, 3, 14]), st.integers(4, 40))
def test_the_worst_extents_are_reached(rows: int, experts: int, m_step: int, blocks: int) -> None:
    row_bytes = GROUP_BYTES // (blocks * m_step)
    limit = group_limit(m_step, row_bytes)
    most = min(rows, experts)
    worst = worst_extents(9, rows, (1, most), m_step, limit, 8, 2)

    def extents(counts: list[int]) -> Extents:
        return plan_groups(np.arange(len(counts)), np.cumsum([0, *counts]), m_step, row_bytes).extents(9, 8, 2)

    heavy, spread = extents([rows]), extents([1] * (most - 1) + [rows - most + 1])
    if rows <= limit:
        assert heavy.segment_rows == worst.segment_rows == worst.rows == heavy.rows
        assert spread.blocks == worst.blocks or most + (rows - most) // m_step > limit // m_step
    elif experts > 1:
        assert extents([limit, rows - limit]) == worst


@given(st.integers(1, 500), st.integers(1, 40), st.sampled_from(list(ISAS)), st.booleans(), st.booleans())
def test_kernels_that_a_routing_can_reach(rows: int, experts: int, isa: str, skip: bool, invariant: bool) -> None:
    config = MoEConfig(experts, 64, 96, 1, allow_skip=skip, batch_invariant=invariant)
    kernels = shapes.plan_kernels(config, isa)
    reached: dict[shapes.Shape, tuple[int, int]] = {}
    for active in range(1, min(rows, experts) + 1):
        shape = kernels.select(rows, active)
        reached[shape] = (reached.get(shape, (active, active))[0], active)
    if skip:
        reached = dict.fromkeys((kernels.select(n, 1) for n in range(1, rows + 1)), (1, min(rows, experts)))
    assert kernels.reachable(rows) == reached
    assert list(kernels.reachable(0).values()) == [(0, 0)]
