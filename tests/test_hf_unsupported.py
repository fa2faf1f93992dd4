"""Experts that jitmoe does not understand: refused by class and reason, or left to transformers where asked for."""

import copy
from typing import Any

import pytest
import torch
from families import EXPERTS, HIDDEN, eager_model, experts_of, on_jitmoe, tokens
from helpers import same_bits
from torch import nn

import jitmoe
from jitmoe.errors import ConfigError, UnsupportedExpertsError
from jitmoe.hf.understand import understand
from jitmoe.jit.capability import describe, resolve_isa

ALL_EXPERTS_FUNCTIONS = pytest.importorskip("transformers.integrations.moe").ALL_EXPERTS_FUNCTIONS


@pytest.fixture(autouse=True)
def registered() -> Any:
    jitmoe.hf.register()
    yield
    jitmoe.hf.register()


def first_experts(family: str = "qwen3_moe") -> Any:
    return next(iter(experts_of(on_jitmoe(eager_model(family))).values()))


def with_gelu(module: Any) -> None:
    module.act_fn = nn.GELU()


def without_gate(module: Any) -> None:
    module.has_gate = False


def with_norm(module: Any) -> None:
    module.has_post_expert_norm = True


def with_a_scale(module: Any) -> None:
    module.per_expert_scale = nn.Parameter(torch.ones(EXPERTS))


def with_float32(module: Any) -> None:
    module.float()


def with_float64(module: Any) -> None:
    module.double()


def on_meta(module: Any) -> None:
    module.to("meta")


def with_other_sizes(module: Any) -> None:
    module.down_proj = nn.Parameter(torch.zeros(EXPERTS, HIDDEN, 5, dtype=torch.bfloat16))


def with_two_axes(module: Any) -> None:
    module.down_proj = nn.Parameter(torch.zeros(EXPERTS, HIDDEN, dtype=torch.bfloat16))


class Wrapped(torch.Tensor):
    """A tensor subclass that we know nothing about."""


def with_a_subclass(module: Any) -> None:
    module.down_proj = nn.Parameter(module.down_proj.data.as_subclass(Wrapped))


def with_a_gate_that_fails(module: Any) -> None:
    module.act_fn = nn.Unflatten(1, (999,))


def off_the_interface(module: Any) -> None:
    del module.is_concatenated


CHANGES = {
    with_gelu: r"activation \(GELU\) is none of silu, clamped silu and gpt-oss's",
    without_gate: "its experts have no gate",
    with_norm: "it normalises the outputs",
    with_a_scale: "its parameters are down_proj, gate_up_proj, per_expert_scale, expected down_proj, gate_up_proj",
    with_float32: r"gate_up_proj is float32: load with dtype=torch.bfloat16",
    with_float64: r"gate_up_proj is float64: load with dtype=torch.bfloat16",
    on_meta: "gate_up_proj is on meta, expected the CPU",
    with_other_sizes: r"its gate_up_proj has shape \[7, 54, 46\], expected \[7, 10, 46\]",
    with_two_axes: "expected three axes",
    with_a_subclass: "its down_proj is a Wrapped, expected a plain parameter",
    with_a_gate_that_fails: r"its gate cannot be asked what it computes \(RuntimeError",
    off_the_interface: r"not on transformers' experts interface \(it has no is_concatenated\)",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_is_not_understood_is_refused_by_name(change: Any) -> None:
    module = first_experts()
    change(module)
    before = {name: (id(parameter), parameter._version) for name, parameter in module.named_parameters()}
    x = torch.zeros(2, HIDDEN, dtype=torch.bfloat16)
    with pytest.raises(UnsupportedExpertsError, match=f"Qwen3MoeExperts cannot run on jitmoe: .*{CHANGES[change]}"):
        module(x, torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1))
    assert before == {name: (id(parameter), parameter._version) for name, parameter in module.named_parameters()}


def test_where_asked_for_they_are_left_to_transformers_with_a_warning() -> None:
    eager = eager_model("qwen3_moe")
    for module in experts_of(eager).values():
        with_gelu(module)
    ids = tokens()
    jitmoe.hf.register(unsupported="eager")
    ours = on_jitmoe(eager)
    with torch.no_grad(), pytest.warns(UserWarning, match=r"Qwen3MoeExperts cannot run on jitmoe: .*GELU.*left to"):
        found = ours(ids).logits
    with torch.no_grad():
        assert same_bits(found, eager(ids).logits)


def test_the_choice_must_be_one_of_two() -> None:
    with pytest.raises(ConfigError, match="unsupported must be 'error' or 'eager', got 'skip'"):
        jitmoe.hf.register(unsupported="skip")  # type: ignore[arg-type]


def test_clamped_silu_of_deepseek_v4_is_understood() -> None:
    modeling = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    module = first_experts()
    module.limit = 3.0
    module._apply_gate = modeling.DeepseekV4Experts._apply_gate.__get__(module)
    understood = understand(module)
    assert (understood.activation, understood.limit) == ("silu_clamped", 3.0)


def test_a_limit_that_the_gate_does_not_use_is_not_believed() -> None:
    module = first_experts()
    module.limit = 3.0
    assert understand(module).activation == "silu"


def test_the_report_has_a_line_for_each_module(capsys: pytest.CaptureFixture[str]) -> None:
    ours = on_jitmoe(eager_model("qwen3_moe"))
    with_gelu(list(experts_of(ours).values())[1])
    said = jitmoe.hf.report(ours)
    assert capsys.readouterr().out == said + "\n"
    first, second = said.splitlines()
    isa = describe(resolve_isa("auto"))
    assert first == (
        f"model.layers.0.mlp.experts: jitmoe, 7 experts 46x27, silu, {isa}, packed at the first call, no adapters"
    )
    assert "model.layers.1.mlp.experts: NOT on jitmoe: Qwen3MoeExperts cannot run" in second


def test_the_report_says_what_is_packed_active_and_missing() -> None:
    peft = pytest.importorskip("peft")
    eager = eager_model("gpt_oss")
    assert "NOT on jitmoe: its experts implementation is 'eager'" in jitmoe.hf.report(eager)
    ours = on_jitmoe(eager)
    jitmoe.hf.pack(ours)
    config = peft.LoraConfig(r=2, target_parameters=["mlp.experts.down_proj"])
    model = peft.get_peft_model(ours, config)
    line = jitmoe.hf.report(model).splitlines()[0]
    assert "gpt_oss, biases" in line and "packed bfloat16" in line
    assert "down_proj[default] rank 2 float32 active; no adapter on gate_up_proj" in line
    with model.disable_adapter():
        assert "rank 2 float32 inactive" in jitmoe.hf.report(model)
    model.merge_adapter()
    assert "rank 2 float32 merged" in jitmoe.hf.report(model)


def test_a_model_without_experts_is_said_to_have_none() -> None:
    assert jitmoe.hf.report(nn.Linear(2, 2)) == "Linear has no experts modules that transformers knows"


def test_registering_twice_changes_nothing() -> None:
    peft = pytest.importorskip("peft")
    wrapper = peft.tuners.lora.layer.ParamWrapper
    before = (wrapper._activate_lora, ALL_EXPERTS_FUNCTIONS["jitmoe"])
    jitmoe.hf.register()
    assert before == (wrapper._activate_lora, ALL_EXPERTS_FUNCTIONS["jitmoe"])


def test_a_copy_of_the_model_is_independent() -> None:
    ours = on_jitmoe(eager_model("qwen3_moe"))
    ids = tokens()
    with torch.no_grad():
        expected = ours(ids).logits
        copied = copy.deepcopy(ours)
        for module in experts_of(copied).values():
            module.down_proj.data += 1.0
        assert same_bits(ours(ids).logits, expected)
        assert not same_bits(copied(ids).logits, expected)
