"""LoRA where its owner keeps it: parameters and gradients of any strides give the bits of contiguous ones."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from helpers import (
    EVERY_ISA,
    build_kernels,
    case_named,
    changed_by,
    copied,
    different,
    layer_of,
    same_bits,
    usable_isas,
)
from torch import Tensor
from yardstick import Case, Inputs, make_inputs, results_of_layer

from jitmoe import MoELayer
from jitmoe.experts.observer import Launch
from jitmoe.experts.supplies import supplied
from jitmoe.plan.projections import LORA_NAMES

RAGGED = case_named("ragged_65")
BFLOAT16 = replace(RAGGED, name="ragged_65_bf16", lora_dtype=torch.bfloat16)
NAN = float("nan")
BESIDE = 7.0
"""What lies beside a view, and must still lie there after a gradient was written."""


@pytest.fixture(scope="module", autouse=True)
def kernels_are_built() -> None:
    build_kernels([RAGGED, BFLOAT16])


def transposed(experts: int, rows: int, columns: int, dtype: torch.dtype, fill: float) -> Tensor:
    return torch.full((experts, columns, rows), fill, dtype=dtype).transpose(1, 2)


def experts_fastest(experts: int, rows: int, columns: int, dtype: torch.dtype, fill: float) -> Tensor:
    """As PEFT keeps B: ``b.view(out, r, experts)[:, :, e]``; no axis of a matrix has neighbours."""
    return torch.full((rows, columns, experts), fill, dtype=dtype).permute(2, 0, 1)


def with_gaps(experts: int, rows: int, columns: int, dtype: torch.dtype, fill: float) -> Tensor:
    """A part of larger matrices, of which one matrix is left out after each."""
    return torch.full((experts, 2, rows + 1, columns + 3), fill, dtype=dtype)[:, 0, 1:, 2:-1]


def every_other(experts: int, rows: int, columns: int, dtype: torch.dtype, fill: float) -> Tensor:
    return torch.full((experts, rows, columns, 2), fill, dtype=dtype)[..., 1]


Layout = Callable[[int, int, int, torch.dtype, float], Tensor]
LAYOUTS = (transposed, experts_fastest, with_gaps, every_other)
EVERY_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)


def view_of(tensor: Tensor, layout: Layout) -> Tensor:
    """The same values laid out so, between NaNs."""
    view = layout(*tensor.shape, tensor.dtype, NAN)
    assert view.shape == tensor.shape and not view.is_contiguous()
    return view.copy_(tensor)


def with_views(layer: MoELayer, layout: Layout) -> MoELayer:
    for name in LORA_NAMES:
        setattr(layer, name, torch.nn.Parameter(view_of(layer.get_parameter(name).detach(), layout)))
    return layer


def absent_expert(inputs: Inputs) -> Inputs:
    """No token chooses expert 0."""
    return replace(inputs, topk_ids=inputs.topk_ids.clamp(min=1))


def check_values(isa: str, case: Case, layout: Layout) -> None:
    inputs = make_inputs(case)
    expected = copied(results_of_layer(layer_of(inputs, isa), inputs))
    layer = with_views(layer_of(inputs, isa), layout)
    strides = {name: layer.get_parameter(name).stride() for name in LORA_NAMES}
    x, weights = inputs.x.clone().requires_grad_(), inputs.weights.clone().requires_grad_()
    out = layer(x, inputs.topk_ids, weights)
    out.backward(inputs.dout)
    found = {"out": out.detach(), "x": x.grad, "weights": weights.grad}
    found |= {name: layer.get_parameter(name).grad for name in LORA_NAMES}
    assert different(found, expected) == []
    assert strides == {name: layer.get_parameter(name).stride() for name in LORA_NAMES}, "nothing was copied"


def check_gradients(isa: str, case: Case, layout: Layout, cut: bool) -> None:
    """Backward writes to views instead of to the gradients that it made, which stay as they were."""
    inputs = absent_expert(make_inputs(replace(case, tokens=200) if cut else case))
    active = case.experts - 1
    layer = layer_of(inputs, isa)
    views = {name: layout(*layer.get_parameter(name).shape, torch.float32, BESIDE) for name in LORA_NAMES}

    def redirect(launch: Launch) -> None:
        if launch.pass_name == "backward":
            assert not cut or launch.record["groups"] > active, "no expert was cut"
            for name, view in views.items():
                field = name.replace("_lora_", ".") + "_grad"
                launch.record[field] = view.data_ptr()
                for axis, stride in zip(("expert", "row", "column"), view.stride(), strict=True):
                    launch.record[f"{field}.{axis}"] = stride

    with supplied(group_bytes=1) if cut else nullcontext():
        expected = copied(results_of_layer(layer, inputs))
        with changed_by(redirect):
            results_of_layer(layer, inputs)
    for name, view in views.items():
        assert same_bits(view[1:].to(case.lora_dtype), expected[name][1:]), name
        assert (view[0] == BESIDE).all(), f"{name}: an expert without rows was written"
        view.fill_(BESIDE)
        storage = torch.empty(0).set_(view.untyped_storage())
        assert (storage == BESIDE).all(), f"{name}: something beside the view was written"


@EVERY_ISA
@EVERY_LAYOUT
@pytest.mark.parametrize("case", [RAGGED, BFLOAT16], ids=str)
def test_values_of_any_strides(isa: str, case: Case, layout: Layout) -> None:
    check_values(isa, case, layout)


@EVERY_ISA
@EVERY_LAYOUT
@pytest.mark.parametrize("cut", [False, True], ids=["one_group", "many_groups"])
def test_gradients_of_any_strides(isa: str, layout: Layout, cut: bool) -> None:
    check_gradients(isa, RAGGED, layout, cut)


def test_one_a_for_gate_and_up() -> None:
    """As where an owner shares it; each gets a gradient of its own."""
    inputs = make_inputs(RAGGED)
    assert inputs.lora
    inputs = replace(inputs, lora=inputs.lora._replace(up_lora_a=inputs.lora.gate_lora_a))
    layer = layer_of(inputs, usable_isas()[0])
    expected = copied(results_of_layer(layer, inputs))

    def share(launch: Launch) -> None:
        launch.record["up.a"] = launch.record["gate.a"]

    with changed_by(share):
        assert different(results_of_layer(layer, inputs), expected) == []
