"""torch.compile over models on jitmoe: one graph without a break, and the bits of the model that is not compiled."""

from typing import Any

import pytest
import torch
from families import eager_model, experts_of, freeze_experts, on_jitmoe, tokens
from helpers import same_bits
from test_hf_peft import lora_config, peft_models
from torch import Tensor

import jitmoe
from jitmoe.errors import FrozenWeightsError, InputError

SAME_OPERATORS = "aot_eager"
"""A backend that traces everything and fuses nothing: other operators keep their bits."""


@pytest.fixture(autouse=True)
def fresh() -> Any:
    jitmoe.hf.register()
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients(model: Any, run: Any, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    out = run(input_ids=ids, labels=ids)
    out.loss.backward()
    return out.logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("lora", [False, True], ids=["", "lora"])
def test_a_compiled_model_has_the_same_bits(family: str, lora: bool) -> None:
    if lora:
        model = peft_models(family, lora_config())[1]
    else:
        model = on_jitmoe(eager_model(family))
        freeze_experts(model)
    assert jitmoe.hf.pack(model) == len(experts_of(model))
    ids = tokens()
    expected = gradients(model, model, ids)
    found = gradients(model, torch.compile(model, fullgraph=True, backend=SAME_OPERATORS), ids)
    assert same_bits(expected[0], found[0])
    assert expected[1].keys() == found[1].keys() and any("lora" in name for name in found[1]) == lora
    assert [name for name in found[1] if not same_bits(expected[1][name], found[1][name])] == []


def test_the_experts_alone_compile_with_inductor() -> None:
    model = on_jitmoe(eager_model("qwen3_moe"))
    freeze_experts(model)
    jitmoe.hf.pack(model)
    experts = next(iter(experts_of(model).values()))
    call = (torch.randn(9, 46).bfloat16(), torch.randint(0, 7, (9, 3)), torch.rand(9, 3))
    assert same_bits(torch.compile(experts, fullgraph=True)(*call), experts(*call))


def test_what_is_not_packed_is_said_before_it_is_compiled() -> None:
    model = on_jitmoe(eager_model("qwen3_moe"))
    with pytest.raises((InputError, torch._dynamo.exc.TorchDynamoException), match=r"jitmoe.hf.pack\(model\) before"):
        torch.compile(model, fullgraph=True, backend=SAME_OPERATORS)(tokens())


def test_base_weights_that_want_a_gradient_are_an_error_in_a_graph_too() -> None:
    model = on_jitmoe(eager_model("qwen3_moe"))
    jitmoe.hf.pack(model)
    experts = next(iter(experts_of(model).values()))
    call = (torch.randn(9, 46).bfloat16(), torch.randint(0, 7, (9, 3)), torch.rand(9, 3))
    with pytest.raises((FrozenWeightsError, torch._dynamo.exc.TorchDynamoException), match="requires_grad=True"):
        torch.compile(experts, fullgraph=True, backend=SAME_OPERATORS)(*call)
