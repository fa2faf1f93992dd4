"""Adapters of experts in all layouts: round trips bit for bit, other ranks with the same delta, and what is refused."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from adapters import SIZES, adapter_of, assert_same, assert_same_deltas, edit_tensors, with_numbers
from safetensors.torch import load_file

from jitmoe import AdapterError, MoEConfig, MoELayer
from jitmoe.hf.adapters.choices import Choices
from jitmoe.hf.adapters.convert import convert, read_adapter
from jitmoe.hf.adapters.files import CONFIG, MODEL, read_config, write
from jitmoe.hf.adapters.formats import FORMATS, detect
from jitmoe.hf.adapters.scaling import alpha_of, rescaled, scale_of, with_shared_a
from jitmoe.hf.adapters.value import LayerAdapter, Pair, same_bits

OTHERS = {
    "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(3, 24),
    "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": torch.ones(16, 3),
}

PAIRS = list(product(FORMATS, FORMATS))
UNSHARED = [pair for pair in PAIRS if "peft-fused" not in pair]


@pytest.fixture
def save(tmp_path):
    """Write an adapter in a layout; gives its path."""

    def call(adapter, layout, name="source"):
        write(tmp_path / name, FORMATS[layout].write(adapter, Choices()), force=True)
        return tmp_path / name

    return call


class TestRoundTrips:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("sizes", SIZES)
    @pytest.mark.parametrize(("there", "here"), PAIRS)
    def test_every_layout_to_every_other_and_back(self, save, tmp_path, here, there, sizes, dtype):
        adapter = adapter_of(sizes, dtype=dtype)
        source = save(adapter, here)
        assert detect(source) == here
        convert(source, tmp_path / "there", there)
        assert detect(tmp_path / "there") == there
        assert_same(read_adapter(tmp_path / "there"), adapter)
        back = convert(tmp_path / "there", tmp_path / "back", here)
        assert_same(read_adapter(tmp_path / "back"), adapter)
        assert back.notes == ()

    @pytest.mark.parametrize("sizes", SIZES)
    @pytest.mark.parametrize(("there", "here"), UNSHARED)
    def test_unshared_a_stays_unshared_where_it_can(self, save, tmp_path, here, there, sizes):
        adapter = adapter_of(sizes, shared=False)
        convert(save(adapter, here), tmp_path / "there", there)
        assert_same(read_adapter(tmp_path / "there"), adapter)

    @pytest.mark.parametrize("rslora", [False, True])
    @pytest.mark.parametrize("here", [name for name in FORMATS if name != "peft-fused"])
    def test_unshared_a_doubles_the_rank_of_gate_up(self, save, tmp_path, here, rslora):
        adapter = with_numbers(adapter_of(shared=False, rslora=rslora))
        done = convert(save(adapter, here), tmp_path / "fused", "peft-fused")
        assert "RANK DOUBLED" in done.notes[0] and "2 layer(s)" in done.notes[0] and "3 + 3" in done.notes[0]
        fused = read_adapter(tmp_path / "fused")
        assert {layer.gate.rank for layer in fused.layers} == {6} and {layer.down.rank for layer in fused.layers} == {3}
        assert_same_deltas(fused, adapter)
        config = read_config(tmp_path / "fused" / CONFIG)
        assert (config["r"], config["rank_pattern"]) == (6, {"mlp.experts.down_proj": 3})

    def test_equal_a_in_tensors_of_their_own_keeps_the_rank(self, save, tmp_path):
        adapter = adapter_of()
        done = convert(save(adapter, "peft-per-expert"), tmp_path / "fused", "peft-fused")
        assert done.notes == () and read_config(tmp_path / "fused" / CONFIG)["r"] == 3

    @pytest.mark.parametrize(("there", "here"), list(product(["peft-fused", "peft-per-expert"], repeat=2)))
    def test_ranks_and_scales_of_their_own(self, save, tmp_path, here, there):
        adapter = adapter_of(ranks=(4, 3))
        layers = list(adapter.layers)
        layers[1] = replace(layers[1], down=replace(layers[1].down, scale=7 / 3))
        adapter = replace(adapter, layers=tuple(layers), others=OTHERS, config={"r": 3, "lora_alpha": 12})
        convert(save(adapter, here), tmp_path / "there", there)
        assert_same(read_adapter(tmp_path / "there"), adapter)
        config = read_config(tmp_path / "there" / CONFIG)
        assert (config["r"], config["lora_alpha"]) == (3, 12), "those of q_proj, which has no pattern"

    def test_other_projections_keep_their_place(self, save, tmp_path):
        config = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
        source = save(replace(adapter_of(), others=OTHERS, config=config), "peft-fused")
        for layout in ("peft-per-expert", "sglang", "ancestor", "peft-fused"):
            convert(source, tmp_path / layout, layout)
            assert_same(read_adapter(tmp_path / layout), read_adapter(source))
            source = tmp_path / layout
        written = read_config(source / CONFIG)
        assert (written["target_modules"], written["task_type"]) == (["q_proj"], "CAUSAL_LM")
        assert written["target_parameters"] == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]

    @pytest.mark.parametrize("here", ["peft-fused", "peft-per-expert", "jitmoe"])
    def test_rslora(self, save, tmp_path, here):
        adapter = adapter_of(rslora=True, scale=16 / math.sqrt(3))
        source = save(adapter, here)
        convert(source, tmp_path / "fused", "peft-fused")
        config = read_config(tmp_path / "fused" / CONFIG)
        assert (config["lora_alpha"], config["use_rslora"]) == (16, True)
        convert(source, tmp_path / "plain", "sglang")
        assert read_config(tmp_path / "plain" / CONFIG)["use_rslora"] is False
        assert_same(read_adapter(tmp_path / "plain"), adapter)

    def test_rows_that_alternate(self, save, tmp_path):
        adapter = replace(adapter_of(), config={"auto_mapping": {"base_model_class": "GptOssForCausalLM"}})
        rows = load_file(save(adapter, "peft-fused") / MODEL)[
            "base_model.model.model.layers.0.mlp.experts.base_layer.lora_B.weight"
        ]
        gate, up = adapter.layers[0].gate.b, adapter.layers[0].up.b
        assert same_bits(rows[2].view(3, 5).T, gate[:, 1]) and same_bits(rows[3].view(3, 5).T, up[:, 1])
        convert(tmp_path / "source", tmp_path / "there", "jitmoe")
        convert(tmp_path / "there", tmp_path / "back", "peft-fused")
        assert_same(read_adapter(tmp_path / "back"), adapter)

    def test_names_of_mixtral(self, save, tmp_path):
        layers = tuple(
            replace(layer, prefix=layer.prefix.replace("mlp", "block_sparse_moe")) for layer in adapter_of().layers
        )
        source = save(replace(adapter_of(), layers=layers), "peft-per-expert")
        assert f"{layers[0].prefix}.4.w3.lora_B.weight" in load_file(source / MODEL)
        convert(source, tmp_path / "there", "ancestor")
        assert_same(read_adapter(tmp_path / "there"), replace(adapter_of(), layers=layers))

    def test_our_file_loads_into_the_layer(self, save):
        experts, rank, hidden, intermediate = SIZES["unequal"]
        adapter = adapter_of(shared=False)
        file = load_file(save(adapter, "jitmoe"))
        config = MoEConfig(experts, hidden, intermediate, top_k=1, lora_rank=rank, lora_alpha=6.0, isa="ref")
        gate, up = torch.zeros(2, experts, intermediate, hidden).bfloat16()
        layer = MoELayer(config, gate, up, torch.zeros(experts, hidden, intermediate).bfloat16())
        prefix = f"{adapter.layers[0].prefix}."
        mine = {name.removeprefix(prefix): tensor for name, tensor in file.items() if name.startswith(prefix)}
        assert layer.load_state_dict(mine, strict=False).unexpected_keys == []
        for name, pair in adapter.layers[0].pairs():
            assert same_bits(getattr(layer, f"{name}_lora_a").data, pair.a)
            assert same_bits(getattr(layer, f"{name}_lora_b").data, pair.b)

    @pytest.mark.parametrize("repeated", [False, True])
    def test_sglang_with_gate_and_up_together(self, save, repeated):
        adapter = adapter_of(shared=not repeated)
        source = save(adapter, "sglang")

        def join(tensors):
            for layer in adapter.layers:
                for side in "AB":
                    names = [f"{layer.prefix}.{leaf}.lora_{side}.weight" for leaf in ("gate_proj", "up_proj")]
                    gate, up = (tensors.pop(name) for name in names)
                    joined = gate if side == "A" and not repeated else torch.cat([gate, up], dim=1)
                    tensors[f"{layer.prefix}.gate_up_proj.lora_{side}.weight"] = joined

        edit_tensors(source / MODEL, join)
        assert_same(read_adapter(source), adapter)


class TestOneRank:
    @pytest.mark.parametrize("layout", ["sglang", "ancestor", "jitmoe"])
    def test_ranks_are_padded(self, save, tmp_path, layout):
        adapter = with_numbers(adapter_of(ranks=(4, 3)))
        done = convert(save(adapter, "peft-per-expert"), tmp_path / "there", layout)
        assert "ranks [3, 4] became rank 4" in done.notes[0]
        found = read_adapter(tmp_path / "there")
        assert {pair.rank for layer in found.layers for _, pair in layer.pairs()} == {4}
        assert_same_deltas(found, adapter)

    @pytest.mark.parametrize("layout", ["sglang", "ancestor", "jitmoe"])
    def test_scales_by_powers_of_two(self, save, tmp_path, layout):
        adapter = with_numbers(adapter_of())
        layers = tuple(replace(layer, down=replace(layer.down, scale=0.5)) for layer in adapter.layers)
        adapter = replace(adapter, layers=layers)
        done = convert(save(adapter, "peft-per-expert"), tmp_path / "there", layout)
        assert "scales [0.5, 2.0] became 2.0" in done.notes[0]
        assert_same_deltas(read_adapter(tmp_path / "there"), adapter)

    @pytest.mark.parametrize("layout", ["sglang", "ancestor", "jitmoe"])
    def test_other_scales_are_refused(self, save, tmp_path, layout):
        layers = tuple(replace(layer, down=replace(layer.down, scale=1.5)) for layer in adapter_of().layers)
        source = save(replace(adapter_of(), layers=layers), "peft-per-expert")
        with pytest.raises(AdapterError, match=r"down of .*layers\.0.* scale 1\.5 differs from 2\.0"):
            convert(source, tmp_path / "there", layout)
        assert not (tmp_path / "there").exists()

    def test_a_scale_that_would_leave_the_range(self):
        pair = Pair(torch.ones(1, 1, 1), torch.full((1, 1, 1), 2e-45), 1.0)
        with pytest.raises(AdapterError, match="without rounding"):
            rescaled(pair, 4.0, "down")

    @pytest.mark.parametrize("rslora", [False, True])
    def test_alpha_of_every_scale(self, rslora):
        for rank, alpha in product(range(1, 70), (1, 7, 16, 0.1, 1e-9)):
            scale = scale_of(alpha, rank, rslora)
            assert scale_of(alpha_of(scale, rank, rslora), rank, rslora) == scale
            doubled = scale_of(alpha_of(scale, 2 * rank, rslora), 2 * rank, rslora)
            assert abs(doubled - scale) <= math.ulp(scale)

    def test_shared_a_is_recognised_by_bits(self):
        zero, minus = torch.zeros(2, 2, 4), -torch.zeros(2, 2, 4)
        b, down = torch.ones(2, 3, 2), Pair(torch.ones(2, 2, 3), torch.ones(2, 4, 2), 1.0)
        layer = LayerAdapter("experts", Pair(zero, b, 1.0), Pair(minus, b, 1.0), down)
        assert not layer.shares_a and with_shared_a(layer).gate.rank == 4
        assert replace(layer, up=Pair(zero.clone(), b, 1.0)).shares_a
