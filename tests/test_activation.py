"""Activations and biases: the error rule on both passes, their state, and what is refused."""

import dataclasses
from typing import Any

import pytest
import torch
from helpers import EVERY_ISA, case_named, config_of, layer_of, same_bits, usable_isas
from yardstick import check, make_inputs, results_of_layer

from jitmoe import MoEConfig, MoELayer
from jitmoe.config import ACTIVATIONS
from jitmoe.errors import ConfigError, InputError, InputTypeError

ISA = usable_isas()[0]
CLAMPED, BIASED = case_named("clamped"), case_named("gpt_oss")


@EVERY_ISA
@pytest.mark.parametrize("case", [CLAMPED, BIASED], ids=str)
def test_both_passes_keep_the_error_rule(isa: str, case: Any) -> None:
    inputs = make_inputs(case)
    check(results_of_layer(layer_of(inputs, isa), inputs), inputs)


def test_the_cases_reach_both_sides_of_each_clamp() -> None:
    for case in (CLAMPED, BIASED):
        inputs = make_inputs(case)
        gate = inputs.x.double() @ inputs.gate_proj[0].double().T
        for value in (gate, -gate):
            assert (value > 1.01 * case.activation.limit).any()
        assert (gate.abs() < 0.9 * case.activation.limit).any()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_nan_is_not_clamped_away(name: str) -> None:
    """Tokens that hold a NaN are NaN in the result, and no other."""
    inputs = make_inputs(case_named("small"))
    layer = MoELayer(dataclasses.replace(config_of(inputs.case, ISA), activation=name), **inputs.base())
    x = inputs.x.clone()
    x[3, 5] = torch.nan
    out = layer(x, inputs.topk_ids, inputs.weights)
    assert out[3].isnan().all() and out[:3].isfinite().all() and out[4:].isfinite().all()


def test_biases_are_state_and_survive_a_cast() -> None:
    inputs = make_inputs(BIASED)
    layer, other = layer_of(inputs, ISA), layer_of(make_inputs(dataclasses.replace(BIASED, seed=1)), ISA)
    state = layer.state_dict()
    assert same_bits(state["down_bias"], inputs.biases.down)
    other.load_state_dict(state)
    call = (inputs.x, inputs.topk_ids, inputs.weights)
    assert same_bits(other(*call), layer(*call))
    other.gate_bias = other.gate_bias.double()
    assert same_bits(other(*call), layer(*call)), "a bias of another dtype is read as float32"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"up_bias": None}, InputError, "up_bias is missing"),
        ({"up_bias": torch.zeros(5, 64)}, InputError, r"up_bias must have shape \[..., 65\]"),
        ({"up_bias": torch.zeros(4, 65)}, InputError, r"up_bias must have shape \[5, 65\]"),
        ({"up_bias": torch.zeros(5, 65).long()}, InputTypeError, "up_bias must be float32 or bfloat16"),
    ],
)
def test_a_bias_that_does_not_fit_is_refused(changes: dict[str, Any], error: type, message: str) -> None:
    inputs = make_inputs(BIASED)
    with pytest.raises(error, match=message):
        MoELayer(config_of(BIASED, ISA), **(inputs.base() | changes))


def test_a_bias_that_the_config_does_not_know_is_refused() -> None:
    inputs = make_inputs(case_named("small"))
    with pytest.raises(InputError, match="gate_bias is given, and the config has no biases"):
        MoELayer(config_of(inputs.case, ISA), **inputs.base(), gate_bias=torch.zeros(4, 96))


@pytest.mark.parametrize(
    ("field", "value"),
    [("activation", "relu"), ("activation_limit", 0.0), ("activation_alpha", float("nan")), ("bias", 1)],
)
def test_fields_that_make_no_layer(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        MoEConfig(4, 64, 96, 2, **{field: value})
