"""The layer as a user sees it: shapes and dtypes of the contract, state, copies, casts."""

import copy
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import build_kernels, case_named, config_of, different, layer_of, same_bits, usable_isas
from safetensors.torch import load_file, save_file
from torch import nn
from yardstick import Case, Inputs, check, make_inputs, results_of_layer

from jitmoe import MoEConfig, MoELayer
from jitmoe.errors import InputError, InputTypeError, IsaError, WeightsChangedError
from jitmoe.oracle.reference import LoraTensors

ISA = usable_isas()[0]
SMALL = case_named("small")
BASES = ["gate_proj", "up_proj", "down_proj"]
STATE_KEYS = [f"base_{name}" for name in BASES]


@pytest.fixture(scope="module", autouse=True)
def kernels_are_built() -> None:
    build_kernels([SMALL, case_named("no_lora"), case_named("bfloat16_lora")], [ISA])


@pytest.fixture
def inputs() -> Inputs:
    return make_inputs(SMALL)


@pytest.fixture
def layer(inputs: Inputs) -> MoELayer:
    return layer_of(inputs, ISA)


def call(layer: nn.Module, inputs: Inputs) -> torch.Tensor:
    with torch.no_grad():
        return layer(inputs.x, inputs.topk_ids, inputs.weights)


class TestContract:
    def test_leading_dimensions_are_flattened_and_restored(self, layer: MoELayer, inputs: Inputs) -> None:
        flat = call(layer, inputs)
        lead = (2, 3, 4)
        tensors = (inputs.x, inputs.topk_ids, inputs.weights)
        x, ids, weights = (tensor.reshape(*lead, -1) for tensor in tensors)
        x.requires_grad_()
        out = layer(x, ids, weights)
        out.backward(inputs.dout.reshape(out.shape))
        assert out.shape == (*lead, SMALL.hidden) and same_bits(out.reshape(flat.shape), flat)
        assert x.grad.shape == x.shape
        assert same_bits(x.grad.reshape(flat.shape), results_of_layer(layer, inputs)["x"])

    def test_one_token_without_a_token_axis(self, layer: MoELayer, inputs: Inputs) -> None:
        out = layer(inputs.x[0], inputs.topk_ids[0], inputs.weights[0])
        assert same_bits(out, layer(inputs.x[:1], inputs.topk_ids[:1], inputs.weights[:1])[0])

    def test_keywords(self, layer: MoELayer, inputs: Inputs) -> None:
        out = layer(weights=inputs.weights, x=inputs.x, topk_ids=inputs.topk_ids)
        assert same_bits(out, layer(inputs.x, inputs.topk_ids, inputs.weights))

    def test_int32_ids(self, layer: MoELayer, inputs: Inputs) -> None:
        out = layer(inputs.x, inputs.topk_ids.int(), inputs.weights)
        assert same_bits(out, layer(inputs.x, inputs.topk_ids, inputs.weights))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_result_and_gradient_have_the_dtype_of_x(self, layer: MoELayer, inputs: Inputs, dtype: torch.dtype) -> None:
        x = inputs.x.to(dtype).requires_grad_()
        weights = inputs.weights.clone().requires_grad_()
        out = layer(x, inputs.topk_ids, weights)
        out.backward(inputs.dout.to(dtype))
        assert out.dtype == x.grad.dtype == dtype and weights.grad.dtype == torch.float32
        assert layer.gate_lora_a.grad.dtype == torch.float32

    def test_float32_result_is_the_bfloat16_one_before_its_rounding(self, layer: MoELayer, inputs: Inputs) -> None:
        wide = layer(inputs.x.float(), inputs.topk_ids, inputs.weights)
        assert same_bits(wide.bfloat16(), call(layer, inputs))
        assert not torch.equal(wide.bfloat16().float(), wide), "it was rounded to bfloat16"

    def test_fresh_layer_equals_its_base(self, inputs: Inputs) -> None:
        """B starts at zero and A as PEFT has it: uniform within 1 / sqrt(in)."""
        layer = MoELayer(config_of(SMALL, ISA), inputs.gate_proj, inputs.up_proj, inputs.down_proj)
        base = MoELayer(config_of(replace(SMALL, rank=0), ISA), inputs.gate_proj, inputs.up_proj, inputs.down_proj)
        assert torch.equal(call(layer, inputs), call(base, inputs))
        for name in LoraTensors._fields:
            parameter = layer.get_parameter(name)
            if name.endswith("_b"):
                assert not parameter.any()
            else:
                bound = parameter.shape[-1] ** -0.5
                assert 0.9 * bound < parameter.abs().max() <= bound and parameter.std() > 0.5 * bound

    def test_without_lora_there_are_no_parameters(self) -> None:
        inputs = make_inputs(case_named("no_lora"))
        layer = layer_of(inputs, ISA)
        assert list(layer.parameters()) == []
        assert sorted(layer.state_dict()) == sorted(STATE_KEYS)

    @pytest.mark.parametrize("use_rslora", [False, True])
    def test_scale(self, inputs: Inputs, use_rslora: bool) -> None:
        config = replace(config_of(SMALL, ISA), lora_alpha=3.0, use_rslora=use_rslora)
        scale = 3.0 / (SMALL.rank**0.5 if use_rslora else SMALL.rank)
        assert config.lora_scale == scale
        scaled = replace(inputs, case=replace(SMALL, scale=scale), scale=scale)
        layer = MoELayer(config, inputs.gate_proj, inputs.up_proj, inputs.down_proj)
        check(results_of_layer(layer, scaled), scaled)

    def test_names_and_shapes_of_parameters(self, layer: MoELayer) -> None:
        e, h, i, r = SMALL.experts, SMALL.hidden, SMALL.intermediate, SMALL.rank
        assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
            "gate_lora_a": (e, r, h), "up_lora_a": (e, r, h), "down_lora_a": (e, r, i),
            "gate_lora_b": (e, i, r), "up_lora_b": (e, i, r), "down_lora_b": (e, h, r),
        }  # fmt: skip
        assert all(p.requires_grad for p in layer.parameters())

    def test_print_shows_sizes_and_instruction_set(self, layer: MoELayer) -> None:
        assert f"hidden_size={SMALL.hidden}" in repr(layer) and f"isa={ISA}" in repr(layer)

    def test_an_isa_that_cannot_run_here_is_refused(self, inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            "jitmoe.jit.cpu.detect", lambda: type("Cpu", (), {"model": "old", "features": frozenset()})()
        )
        with pytest.raises(IsaError, match="avx2"):
            layer_of(inputs, "avx2")


def loaded_into(layer: MoELayer, state: dict[str, torch.Tensor]) -> MoELayer:
    result = layer.load_state_dict(state)
    assert not result.missing_keys and not result.unexpected_keys
    return layer


def other_inputs(case: Case = SMALL) -> Inputs:
    return make_inputs(replace(case, seed=case.seed + 1000))


class TestState:
    """Fault 28: canonical tensors only, so what one machine saves another one loads."""

    def test_state_dict_is_canonical(self, layer: MoELayer, inputs: Inputs) -> None:
        state = layer.state_dict()
        assert sorted(state) == sorted([*STATE_KEYS, *LoraTensors._fields])
        for name in BASES:
            assert same_bits(state[f"base_{name}"], getattr(inputs, name))
        for name, value in inputs.lora._asdict().items():
            assert same_bits(state[name], value)

    @pytest.mark.parametrize("isa", usable_isas())
    @pytest.mark.parametrize("options", [{}, {"batch_invariant": True}, {"recompute": True}], ids=str)
    def test_it_loads_under_another_config(self, layer: MoELayer, inputs: Inputs, isa: str, options: dict) -> None:
        other = loaded_into(layer_of(other_inputs(), isa, **options), layer.state_dict())
        assert (
            different(results_of_layer(other, inputs), results_of_layer(layer_of(inputs, isa, **options), inputs)) == []
        )

    def test_through_safetensors_inside_a_model(self, layer: MoELayer, inputs: Inputs, tmp_path: Path) -> None:
        save_file(nn.Sequential(nn.Identity(), layer).state_dict(), tmp_path / "model.safetensors")
        state = load_file(tmp_path / "model.safetensors")
        assert "1.base_gate_proj" in state and "1.gate_lora_a" in state
        other = nn.Sequential(nn.Identity(), layer_of(other_inputs(), ISA))
        other.load_state_dict(state)
        assert same_bits(call(other[1], inputs), call(layer, inputs))

    def test_adapter_alone_with_strict_false(self, layer: MoELayer, inputs: Inputs) -> None:
        adapter = {name: value for name, value in layer.state_dict().items() if "lora" in name}
        other = MoELayer(layer.config, inputs.gate_proj, inputs.up_proj, inputs.down_proj)
        result = other.load_state_dict(adapter, strict=False)
        assert not result.unexpected_keys
        assert same_bits(call(other, inputs), call(layer, inputs))

    def test_missing_base_is_named(self, layer: MoELayer) -> None:
        state = layer.state_dict()
        del state["base_up_proj"]
        with pytest.raises(RuntimeError, match=r"Missing key.*base_up_proj"):
            layer.load_state_dict(state)

    @pytest.mark.parametrize(
        ("change", "words"),
        [(lambda t: t.float(), "up_proj must be bfloat16"), (lambda t: t[1:], "up_proj must have shape")],
        ids=["dtype", "shape"],
    )
    def test_a_wrong_base_changes_none_of_the_base(self, layer: MoELayer, inputs: Inputs, change, words: str) -> None:
        state = layer_of(other_inputs(), ISA).state_dict()
        state["base_up_proj"] = change(state["base_up_proj"])
        with pytest.raises(RuntimeError, match=words):
            layer.load_state_dict(state)
        for name, value in layer.unpack().items():
            assert same_bits(value, getattr(inputs, name))

    def test_a_base_loaded_between_forward_and_backward_is_an_error(self, layer: MoELayer, inputs: Inputs) -> None:
        out = layer(inputs.x, inputs.topk_ids, inputs.weights)
        state = layer_of(other_inputs(), ISA).state_dict()
        layer.load_state_dict({name: state[name] for name in STATE_KEYS}, strict=False)
        with pytest.raises(WeightsChangedError, match="between forward and backward"):
            out.backward(inputs.dout)
        assert layer.gate_lora_a.grad is None

    def test_a_load_that_fails_halfway_cannot_be_used(self, layer: MoELayer, monkeypatch, inputs: Inputs) -> None:
        packed: list[str] = []

        def fail_at_second(kernels: object, name: str, *rest: object) -> None:
            packed.append(name)
            if len(packed) == 2:
                raise MemoryError("seeded")
            original(kernels, name, *rest)

        import jitmoe.experts.layer as module

        original = module.pack_parts
        state = layer_of(other_inputs(), ISA).state_dict()
        monkeypatch.setattr(module, "pack_parts", fail_at_second)
        with pytest.raises(MemoryError):
            layer.load_state_dict(state)
        monkeypatch.undo()
        layer.load_state_dict(layer_of(inputs, ISA).state_dict())
        assert same_bits(call(layer, inputs), call(layer_of(inputs, ISA), inputs))


class TestCopiesAndCasts:
    @pytest.mark.parametrize(
        "duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"]
    )
    def test_a_copy_computes_the_same_on_its_own(self, layer: MoELayer, inputs: Inputs, duplicate) -> None:
        expected = results_of_layer(layer, inputs)
        twin = duplicate(layer)
        assert different(results_of_layer(twin, inputs), expected) == []
        twin.load_state_dict(layer_of(other_inputs(), ISA).state_dict())
        with torch.no_grad():
            layer.gate_lora_b.add_(0.0)
        assert different(results_of_layer(layer, inputs), expected) == []
        assert not same_bits(call(twin, inputs), call(layer, inputs))

    def test_cast_to_bfloat16(self, layer: MoELayer, inputs: Inputs) -> None:
        """The LoRA parameters become bfloat16; the packed base keeps its bits."""
        layer.to(torch.bfloat16)
        assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
        assert layer.packed_gate.dtype == torch.int16
        cast = replace(inputs, case=replace(SMALL, lora_dtype=torch.bfloat16))
        cast = replace(cast, lora=LoraTensors(*(value.bfloat16() for value in inputs.lora)))
        results = results_of_layer(layer, cast)
        assert results["gate_lora_a"].dtype == torch.bfloat16
        assert different(results, results_of_layer(layer_of(cast, ISA), cast)) == []

    def test_cast_there_and_back(self, layer: MoELayer, inputs: Inputs) -> None:
        expected = results_of_layer(layer_of(inputs, ISA), inputs)
        assert different(results_of_layer(layer.to(torch.bfloat16).to(torch.float32), inputs), expected) == []

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
    def test_cast_to_another_dtype_is_refused_at_the_call(self, layer: MoELayer, inputs: Inputs, dtype) -> None:
        with pytest.raises(InputTypeError, match=rf"gate_lora_a must be float32 or bfloat16.*{dtype}"):
            call(layer.to(dtype), inputs)

    def test_mixed_lora_dtypes_are_refused(self, layer: MoELayer, inputs: Inputs) -> None:
        layer.up_lora_b = nn.Parameter(layer.up_lora_b.bfloat16())
        with pytest.raises(InputTypeError, match="up_lora_b"):
            call(layer, inputs)

    def test_lora_of_another_shape_is_refused(self, layer: MoELayer, inputs: Inputs) -> None:
        layer.up_lora_b = nn.Parameter(layer.up_lora_b[:, :, 1:].contiguous())
        with pytest.raises(InputError, match="up_lora_b"):
            call(layer, inputs)

    def test_strided_lora_is_right(self, layer: MoELayer, inputs: Inputs) -> None:
        expected = call(layer, inputs)
        for name in LoraTensors._fields:
            value = layer.get_parameter(name).detach()
            setattr(layer, name, nn.Parameter(value.transpose(1, 2).contiguous().transpose(1, 2)))
        assert same_bits(call(layer, inputs), expected)

    @pytest.mark.parametrize("name", ["small", "no_lora"])
    def test_moved_away_from_the_cpu_it_is_refused(self, name: str) -> None:
        inputs = make_inputs(case_named(name))
        layer = layer_of(inputs, ISA)
        expected = {base: tensor.clone() for base, tensor in layer.unpack().items()}
        layer.to("meta")
        assert different(layer.unpack(), expected) == [], "the base is no buffer: it stays where it is"
        moved = replace(inputs, x=inputs.x.to("meta"))
        with pytest.raises(InputError, match="CPU"):
            call(layer, inputs if inputs.lora else moved)

    def test_a_default_device_does_not_matter(self, layer: MoELayer, inputs: Inputs) -> None:
        expected = results_of_layer(layer, inputs)
        with torch.device("meta"):
            assert different(results_of_layer(layer, inputs), expected) == []
            assert same_bits(layer.unpack()["up_proj"], inputs.up_proj)

    def test_inference_mode(self, inputs: Inputs) -> None:
        """Made, copied and called where torch counts no versions."""
        expected = call(layer_of(inputs, ISA), inputs)
        with torch.inference_mode():
            layer = layer_of(inputs, ISA)
            assert same_bits(layer(inputs.x, inputs.topk_ids, inputs.weights), expected)
            assert same_bits(copy.deepcopy(layer)(inputs.x, inputs.topk_ids, inputs.weights), expected)
        assert same_bits(call(layer, inputs), expected)
        layer.packed_gate.zero_()
        with pytest.raises(WeightsChangedError):
            call(layer, inputs)


def test_config_is_a_value() -> None:
    assert MoEConfig(4, 64, 96, 2) == MoEConfig(4, 64, 96, 2) and hash(MoEConfig(4, 64, 96, 2))
