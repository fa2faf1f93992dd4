"""Names of transformers and PEFT that jitmoe.hf leans on, one test each: a failure here says what has moved."""

import inspect
from typing import Any

import pytest
from families import EXPERTS, eager_model, experts_of

peft = pytest.importorskip("peft")
moe = pytest.importorskip("transformers.integrations.moe")
loading = pytest.importorskip("transformers.core_model_loading")
quantizers = pytest.importorskip("transformers.quantizers.base")


def parameters_of(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def experts() -> Any:
    return next(iter(experts_of(eager_model("qwen3_moe")).values()))


def test_experts_are_registered_and_found() -> None:
    assert {"register", "get_interface"} <= set(dir(moe.ALL_EXPERTS_FUNCTIONS))


@pytest.mark.parametrize(
    ("fact", "value"),
    [
        ("has_gate", True),
        ("has_bias", False),
        ("is_transposed", False),
        ("is_concatenated", True),
        ("has_post_expert_norm", False),
        ("num_experts", EXPERTS),
    ],
)
def test_facts_of_an_experts_module(fact: str, value: Any) -> None:
    assert getattr(experts(), fact) == value


def test_the_forward_of_the_class_is_kept() -> None:
    assert parameters_of(type(experts()).forward.__wrapped__) == [
        "self",
        "hidden_states",
        "top_k_index",
        "top_k_weights",
    ]


def test_the_gate_can_be_asked() -> None:
    assert parameters_of(experts()._apply_gate) == ["gate_up_out"]


def test_the_choice_is_on_the_config() -> None:
    assert experts().config._experts_implementation == "eager"


def test_wrappers_of_parameters() -> None:
    wrapper = peft.tuners.lora.layer.ParamWrapper
    assert parameters_of(wrapper._activate_lora) == ["self", "active_adapters"]
    source = inspect.getsource(wrapper.forward)
    assert "with self._activate_lora(self.active_adapters):" in source


@pytest.mark.parametrize(
    "name",
    ["parameter_name", "lora_A", "lora_B", "scaling", "r", "active_adapters", "disable_adapters", "merged_adapters"],
)
def test_attributes_of_a_wrapper(name: str) -> None:
    model = peft.get_peft_model(
        eager_model("qwen3_moe"), peft.LoraConfig(target_parameters=["mlp.experts.gate_up_proj"])
    )
    wrapper = next(m for m in model.modules() if hasattr(m, "parameter_name"))
    assert hasattr(wrapper, name) and wrapper.get_base_layer() in experts_of(model).values()


@pytest.mark.parametrize(
    "name",
    ["_original_source_patterns", "_original_target_patterns", "scope_prefix", "base_model_prefix", "operations"],
)
def test_attributes_of_a_conversion(name: str) -> None:
    assert hasattr(loading.WeightConverter(["a"], ["b"], [loading.MergeModulelist()]), name)


def test_a_conversion_is_told_of_tensors_and_converts() -> None:
    assert parameters_of(loading.WeightConverter.add_tensor) == [
        "self",
        "target_key",
        "source_key",
        "source_pattern",
        "future",
    ]
    assert parameters_of(loading.WeightConverter.convert) == [
        "self",
        "layer_name",
        "model",
        "config",
        "hf_quantizer",
        "loading_info",
    ]


def test_names_of_a_checkpoint_are_renamed_and_converted() -> None:
    """The first parameters alone are given by place."""
    found = parameters_of(loading.rename_source_key)
    assert found[:5] == ["source_key", "weight_renamings", "weight_converters", "base_model_prefix", "meta_state_dict"]
    assert parameters_of(loading.apply_renamings) == ["source_key", "weight_renamings"]
    assert parameters_of(loading.WeightRenaming.rename_source_key) == ["self", "source_key"]
    assert issubclass(loading.WeightRenaming, loading.WeightTransform)
    assert not loading.WeightRenaming("a", "b").was_used()


def test_conversions_of_a_model_can_be_asked_for() -> None:
    mapping = pytest.importorskip("transformers.conversion_mapping")
    assert parameters_of(mapping.get_model_conversion_mapping)[0] == "model"
    assert callable(eager_model("qwen3_moe").get_parameter_or_buffer)


@pytest.mark.parametrize(
    "name",
    [
        "preprocess_model",
        "update_weight_conversions",
        "param_needs_quantization",
        "get_quantize_ops",
        "postprocess_model",
        "remove_quantization_config",
    ],
)
def test_methods_of_a_quantizer(name: str) -> None:
    assert callable(getattr(quantizers.HfQuantizer, name))


def test_implementations_of_expert_parallelism_are_registered() -> None:
    ep = pytest.importorskip("transformers.distributed.expert_parallel")
    assert "register" in dir(ep.EPImplementationInterface)
    assert parameters_of(ep.EPImplementation.__init__) == ["self", "experts", "ep_mesh", "tp_mesh"]
    assert parameters_of(ep.EPImplementation.__call__) == ["self", "hidden_states", "top_k_index", "top_k_weights"]


def test_a_peft_model_shows_attributes_and_names_of_its_model() -> None:
    model = eager_model("qwen3_moe")
    model._ddp_params_and_buffers_to_ignore = ["x"]
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    assert wrapped._ddp_params_and_buffers_to_ignore == ["x"]
    assert "base_model.model.lm_head.weight" in dict(wrapped.named_parameters())
