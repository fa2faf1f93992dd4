"""Adapters of experts that are damaged or cannot be said in another layout, and what happens to files."""

import json
from dataclasses import replace

import pytest
import torch
from adapters import adapter_of, assert_same, edit_config, edit_tensors

from jitmoe import AdapterError
from jitmoe.hf.adapters.choices import Choices
from jitmoe.hf.adapters.convert import convert, read_adapter
from jitmoe.hf.adapters.files import CONFIG, FUSED, MODEL, Tensors, write
from jitmoe.hf.adapters.formats import FORMATS
from jitmoe.hf.adapters.value import LayerAdapter, Pair

FIRST = "base_model.model.model.layers.0.mlp.experts"
QUERY = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
OTHERS = {QUERY.format("A"): torch.ones(3, 24), QUERY.format("B"): torch.ones(16, 3)}
FILES = {"peft-fused": MODEL, "peft-per-expert": MODEL, "sglang": MODEL, "ancestor": FUSED, "jitmoe": ""}
AN_A = {
    "peft-fused": f"{FIRST}.lora_A.weight",
    "peft-per-expert": f"{FIRST}.2.down_proj.lora_A.weight",
    "sglang": f"{FIRST}.down_proj.lora_A.weight",
    "ancestor": "layers.0.experts.down_lora_a",
    "jitmoe": f"{FIRST}.down_lora_a",
}
"""A of down in each layout."""


@pytest.fixture
def source(tmp_path):
    """Write an adapter, whole by default, in a layout; gives its path."""

    def call(layout, adapter=None):
        write(tmp_path / "source", FORMATS[layout].write(adapter or adapter_of(), Choices()), force=False)
        return tmp_path / "source"

    return call


def remove(tensors, name):
    del tensors[name]


def add_unknown(tensors, name):
    tensors[name.replace("down", "sideways").replace("experts.lora_A", "experts.lora_C")] = tensors[name].clone()


def transpose(tensors, name):
    tensors[name] = tensors[name].transpose(-1, -2).contiguous()


def cut(tensors, name):
    tensors[name] = tensors[name][..., :-1].contiguous()


def other_dtype(tensors, name):
    tensors[name] = tensors[name].to(torch.bfloat16)


def whole_numbers(tensors, name):
    tensors[name] = tensors[name].to(torch.int32)


class TestDamaged:
    @pytest.mark.parametrize("damage", [remove, add_unknown, transpose, cut, other_dtype, whole_numbers])
    @pytest.mark.parametrize("layout", FORMATS)
    def test_a_tensor(self, source, tmp_path, layout, damage):
        path = source(layout)
        edit_tensors(path / FILES[layout], lambda tensors: damage(tensors, AN_A[layout]))
        with pytest.raises(AdapterError, match=r"layers?[. ]0|experts"):
            convert(path, tmp_path / "there", "jitmoe", layout)
        assert not (tmp_path / "there").exists()

    @pytest.mark.parametrize("layout", ["sglang", "ancestor", "jitmoe"])
    def test_the_number_of_experts(self, source, layout):
        path = source(layout)

        def change(tensors):
            tensors[AN_A[layout]] = tensors[AN_A[layout]][1:].contiguous()

        edit_tensors(path / FILES[layout], change)
        with pytest.raises(AdapterError, match=r"numbers of experts in A and B differ .*down: 4 and 5"):
            read_adapter(path, layout)

    def test_the_number_of_experts_in_matrices(self, source):
        path = source("peft-fused")

        def change(tensors):
            for side, dim in (("A", 0), ("B", 1)):
                name = f"{FIRST}.lora_{side}.weight"
                tensors[name] = tensors[name].narrow(dim, 0, 12).contiguous()

        edit_tensors(path / MODEL, change)
        with pytest.raises(AdapterError, match="down: 4 and 4, gate: 5 and 5"):
            read_adapter(path)

    def test_one_expert_is_missing(self, source):
        path = source("peft-per-expert")
        edit_tensors(path / MODEL, lambda tensors: remove(tensors, f"{FIRST}.3.up_proj.lora_B.weight"))
        with pytest.raises(AdapterError, match=rf"{FIRST} lacks 3\.up_proj\.lora_B"):
            read_adapter(path)

    @pytest.mark.parametrize("layout", ["peft-fused", "peft-per-expert", "sglang", "ancestor"])
    def test_another_rank_than_the_config_says(self, source, layout):
        path = source(layout)
        edit_config(path, r=4)
        with pytest.raises(AdapterError, match="rank"):
            read_adapter(path)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"r": None}, "has r None"),
            ({"r": 0}, "has r 0"),
            ({"lora_alpha": "16"}, "has lora_alpha '16'"),
            ({"peft_type": "IA3"}, "is of IA3"),
            ({"init_lora_weights": "pissa_niter_4"}, "changes the base weights"),
        ],
    )
    @pytest.mark.parametrize("layout", ["peft-fused", "peft-per-expert", "sglang", "ancestor"])
    def test_the_config(self, source, layout, fields, message):
        path = source(layout)
        edit_config(path, **fields)
        with pytest.raises(AdapterError, match=message):
            read_adapter(path)

    @pytest.mark.parametrize(
        "fields", [{"rank_pattern": {"down_proj": 0}}, {"alpha_pattern": {"down_proj": "16"}}], ids=str
    )
    @pytest.mark.parametrize("layout", ["peft-fused", "peft-per-expert"])
    def test_the_patterns(self, source, layout, fields):
        path = source(layout)
        edit_config(path, **fields)
        with pytest.raises(AdapterError, match=r"gives model\.layers\.0\.mlp\.experts.*down_proj rank"):
            read_adapter(path)

    @pytest.mark.parametrize("layout", ["sglang", "ancestor"])
    def test_rslora_where_nobody_computes_it(self, source, layout):
        path = source(layout)
        edit_config(path, use_rslora=True)
        with pytest.raises(AdapterError, match="rsLoRA"):
            read_adapter(path)

    @pytest.mark.parametrize("layout", FORMATS)
    def test_no_safetensors(self, source, layout):
        path = source(layout)
        (path / FILES[layout]).write_bytes(b"not this")
        with pytest.raises(AdapterError, match="cannot be read as safetensors"):
            read_adapter(path)

    def test_nothing_to_convert(self, tmp_path):
        with pytest.raises(AdapterError, match="has neither"):
            read_adapter(tmp_path)
        write(tmp_path / "attention", {CONFIG: {}, MODEL: Tensors(OTHERS)}, force=False)
        with pytest.raises(AdapterError, match="of no layout that is known"):
            read_adapter(tmp_path / "attention")
        with pytest.raises(AdapterError, match="other layouts, name the folder"):
            read_adapter(tmp_path / "attention" / MODEL)

    def test_two_layouts_at_a_time(self, source):
        path = source("peft-fused")
        edit_tensors(path / MODEL, lambda tensors: tensors.update({AN_A["sglang"]: torch.ones(5, 3, 10)}))
        with pytest.raises(AdapterError, match="of peft-fused and sglang at a time"):
            read_adapter(path)

    def test_experts_beside_those_of_ktransformers(self, source):
        path = source("ancestor", replace(adapter_of(), others=OTHERS, config={"r": 3, "lora_alpha": 6}))
        edit_tensors(path / MODEL, lambda tensors: tensors.update({AN_A["sglang"]: torch.ones(5, 3, 10)}))
        with pytest.raises(AdapterError, match="which of them counts"):
            read_adapter(path)

    def test_the_same_tensor_twice(self, source):
        path = source("sglang")
        for side, shape in (("A", (5, 3, 24)), ("B", (5, 20, 3))):
            name = f"{FIRST}.gate_up_proj.lora_{side}.weight"
            edit_tensors(
                path / MODEL, lambda tensors, name=name, shape=shape: tensors.update({name: torch.ones(shape)})
            )
        with pytest.raises(AdapterError, match="has A of gate twice"):
            read_adapter(path)

    def test_sizes_of_different_layers(self):
        pair, wide = (
            Pair(torch.ones(2, 1, 4), torch.ones(2, 3, 1), 1.0),
            Pair(torch.ones(2, 1, 5), torch.ones(2, 3, 1), 1.0),
        )
        with pytest.raises(AdapterError, match=r"hidden sizes \[4, 5\]"):
            LayerAdapter("experts", pair, wide, Pair(torch.ones(2, 1, 3), torch.ones(2, 4, 1), 1.0))


class TestNoPlace:
    def test_other_modules_in_our_file(self, source, tmp_path):
        config = {"r": 3, "lora_alpha": 6, "modules_to_save": ["lm_head"]}
        path = source("peft-fused", replace(adapter_of(), others=OTHERS, config=config))
        with pytest.raises(AdapterError, match=r"2 tensors outside the experts, such as .*q_proj.* --drop-others"):
            convert(path, tmp_path / "there", "jitmoe")
        done = convert(path, tmp_path / "there", "jitmoe", drop_others=True)
        assert "DROPPED: 2 tensors" in done.notes[0]
        found = read_adapter(tmp_path / "there")
        assert_same(found, replace(done.adapter, others={}))
        assert found.config["modules_to_save"] is None

    def test_other_modules_with_another_scale(self, source, tmp_path):
        adapter = replace(adapter_of(), others=OTHERS, config={"r": 3, "lora_alpha": 12})
        path = source("peft-fused", adapter)
        with pytest.raises(AdapterError, match=r"one rank and alpha, and .*q_proj has others"):
            convert(path, tmp_path / "there", "sglang")
        convert(path, tmp_path / "there", "ancestor")
        convert(tmp_path / "there", tmp_path / "back", "peft-fused")
        assert_same(read_adapter(tmp_path / "back"), adapter)
        config = json.loads((tmp_path / "back" / CONFIG).read_text())
        assert config["lora_alpha"] == 6 and config["alpha_pattern"] == {"model.layers.0.self_attn.q_proj": 12}

    @pytest.mark.parametrize("layout", ["peft-fused", "peft-per-expert", "sglang", "ancestor"])
    def test_a_layer_without_a_name(self, source, tmp_path, layout):
        path = source("jitmoe", replace(adapter_of(), layers=(replace(adapter_of().layers[0], prefix=""),)))
        assert read_adapter(path).layers[0].prefix == ""
        with pytest.raises(AdapterError, match=r"belong to no module|one group of experts"):
            convert(path, tmp_path / "there", layout)

    def test_two_groups_of_experts_in_a_layer(self, source, tmp_path):
        one, other = adapter_of().layers
        layers = (one, replace(other, prefix=one.prefix.replace("mlp", "vision")))
        path = source("peft-fused", replace(adapter_of(), layers=layers))
        with pytest.raises(AdapterError, match=r"vision\.experts.*one group of experts"):
            convert(path, tmp_path / "there", "ancestor")

    def test_alpha_that_nobody_says(self, source):
        path = source("ancestor")
        (path / CONFIG).unlink()
        with pytest.raises(AdapterError, match="give --lora-alpha"):
            read_adapter(path)
        assert_same(read_adapter(path, choices=Choices(lora_alpha=6.0)), adapter_of())
