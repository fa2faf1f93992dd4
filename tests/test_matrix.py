"""Every shape on every instruction set: the output and all gradients against float64, by the yardstick.

The matrix is (hidden, intermediate, padded rank, M_STEP) x instruction set x LoRA dtype. Each cell is a kernel to
compile: `make test` takes those that differ in code, `make test-slow` the whole product.
"""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from helpers import NATIVE, config_of, different, launches, layer_of, usable_isas
from yardstick import CASES, SMALL_SIZE, Case, check, make_inputs, results_of_layer

from jitmoe import build
from jitmoe.experts.supplies import supplied
from jitmoe.isa import ISAS
from jitmoe.plan import shapes

CELLS = [(case, isa, m_step) for case in CASES for isa in NATIVE for m_step in ISAS[isa].m_steps]
"""Every case of the yardstick on every register block."""

FEW_ROWS_SHAPES = ("small", "medium", "all_ones", "ragged_31", "ragged_65", "no_lora")
"""Cases that `make test` also runs on the smaller register blocks and the scalar kernels."""

BFLOAT16_LORA_SHAPES = ("medium", "ragged_33")
"""Cases that `make test` also runs with bfloat16 LoRA, beside the one that has it anyway."""

GROUPS_CASES = [case for case in CASES if case.name in ("small", "ragged_65", "medium")]


def cells(with_bfloat16: bool) -> Iterator[pytest.param]:
    for case, isa, m_step in CELLS:
        fast = (m_step == ISAS[isa].m_steps[-1] and isa != "ref") or case.name in FEW_ROWS_SHAPES
        if with_bfloat16:
            if not case.rank or case.lora_dtype == torch.bfloat16:
                continue
            fast = fast and case.name in BFLOAT16_LORA_SHAPES and isa != "ref"
            case = replace(case, lora_dtype=torch.bfloat16)
        marks = [pytest.mark.isa(isa), *([] if fast else [pytest.mark.slow])]
        yield pytest.param(case, isa, m_step, marks=marks, id=f"{case}-{isa}-m{m_step}")


@pytest.fixture(scope="module", autouse=True)
def kernels_are_built(request: pytest.FixtureRequest) -> None:
    """Compile in parallel what the selected tests would otherwise compile one by one."""
    mine = [item for item in request.session.items if item.module is request.module]
    cells = [item.callspec.params for item in mine if hasattr(item, "callspec") and "m_step" in item.callspec.params]
    usable = usable_isas()
    wanted = [config_of(c["case"], c["isa"], m_step=c["m_step"]) for c in cells if c["isa"] in usable]
    build(wanted, progress=False)


def check_cell(case: Case, isa: str, m_step: int) -> None:
    inputs = make_inputs(case)
    results = results_of_layer(layer_of(inputs, isa, m_step=m_step), inputs)
    check(results, inputs)
    again = results_of_layer(layer_of(inputs, isa, m_step=m_step, recompute=True), inputs)
    assert different(results, again) == [], "recompute=True changed bits"


@pytest.mark.parametrize(("case", "isa", "m_step"), list(cells(with_bfloat16=False)))
def test_shape(case: Case, isa: str, m_step: int) -> None:
    check_cell(case, isa, m_step)


@pytest.mark.parametrize(("case", "isa", "m_step"), list(cells(with_bfloat16=True)))
def test_shape_with_bfloat16_lora(case: Case, isa: str, m_step: int) -> None:
    check_cell(case, isa, m_step)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("isa", [pytest.param(isa, marks=pytest.mark.isa(isa)) for isa in NATIVE])
@pytest.mark.parametrize("case", GROUPS_CASES, ids=str)
def test_cut_into_many_groups(case: Case, isa: str, recompute: bool) -> None:
    """An expert with more rows than a group holds is cut; only the order of the LoRA gradients' sums may change."""
    inputs = make_inputs(replace(case, tokens=200))
    m_step = ISAS[isa].m_steps[0]
    layer = layer_of(inputs, isa, m_step=m_step, recompute=recompute)
    whole = results_of_layer(layer, inputs)

    with supplied(group_bytes=1), launches() as seen:
        cut = results_of_layer(layer, inputs)
    assert len(seen) == 2, "forward and backward plan once each"
    assert all(launch.record["groups"] > case.experts for launch in seen), "no expert was cut"
    assert set(different(whole, cut)).isdisjoint({"out", "x", "weights"})
    check(cut, inputs)


def test_the_matrix_has_ragged_and_small_results() -> None:
    """The kinds of case that the matrix exists for are in it."""
    assert any(case.hidden % 32 and case.intermediate % 32 and case.rank % 32 for case in CASES)
    assert any(case.hidden % 2 and case.intermediate % 2 for case in CASES), "an odd last pair"
    assert any(case.rank > shapes.K_STEP for case in CASES)
    assert any(case.tokens * case.hidden >= SMALL_SIZE for case in CASES)
    assert {case.lora_dtype for case in CASES} == {torch.float32, torch.bfloat16}
