"""Faults from the field in ``jitmoe estimate``: fields that are not understood (D), numbers of the host (H)."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from jitmoe.cli import main
from jitmoe.errors import ConfigError
from jitmoe.memory import model as models
from jitmoe.memory.model import read_model

BASE = {"num_experts": 8, "hidden_size": 64, "moe_intermediate_size": 32, "num_experts_per_tok": 2,
        "num_hidden_layers": 10}  # fmt: skip


def written(folder: Path, content: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(content))
    return path


FAMILIES: dict[str, tuple[dict[str, Any], tuple[int, int, int, int]]] = {
    "llama4 Maverick": (
        {"model_type": "llama4", "text_config": {
            "model_type": "llama4_text", "num_hidden_layers": 48, "interleave_moe_layer_step": 2, "hidden_size": 5120,
            "intermediate_size": 8192, "num_local_experts": 128, "num_experts_per_tok": 1}},
        (24, 128, 5120, 8192),
    ),
    "jamba": (
        {"model_type": "jamba", "num_hidden_layers": 32, "expert_layer_period": 2, "expert_layer_offset": 1,
         "hidden_size": 4096, "intermediate_size": 14336, "num_experts": 16, "num_experts_per_tok": 2},
        (16, 16, 4096, 14336),
    ),
    "lfm2": (
        {"model_type": "lfm2_moe", "num_hidden_layers": 24, "num_dense_layers": 2, "hidden_size": 2048,
         "moe_intermediate_size": 1792, "num_experts": 32, "num_experts_per_tok": 4,
         "layer_types": ["conv"] * 18 + ["full_attention"] * 6},
        (22, 32, 2048, 1792),
    ),
    "ernie": (
        {"model_type": "ernie4_5_moe", "num_hidden_layers": 28, "moe_layer_start_index": 1, "moe_layer_end_index": 27,
         "moe_layer_interval": 1, "hidden_size": 2560, "moe_intermediate_size": 1536, "moe_num_experts": 64,
         "moe_k": 6},
        (27, 64, 2560, 1536),
    ),
    "kimi linear": (
        {"model_type": "kimi_linear", "num_hidden_layers": 27, "first_k_dense_replace": 1, "hidden_size": 2304,
         "moe_intermediate_size": 1024, "num_experts": 256, "num_experts_per_token": 8},
        (26, 256, 2304, 1024),
    ),
    "hunyuan": (
        {"model_type": "hunyuan_v1_moe", "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 3072,
         "num_experts": 64, "moe_topk": 8},
        (32, 64, 4096, 3072),
    ),
    "dbrx": (
        {"model_type": "dbrx", "n_layers": 40, "d_model": 6144,
         "ffn_config": {"moe_num_experts": 16, "moe_top_k": 4, "ffn_hidden_size": 10752}},
        (40, 16, 6144, 10752),
    ),
    "qwen3 omni": (
        {"model_type": "qwen3_omni_moe", "thinker_config": {"text_config": {
            "num_hidden_layers": 48, "hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128,
            "num_experts_per_tok": 8, "decoder_sparse_step": 1, "mlp_only_layers": []}}},
        (48, 128, 2048, 768),
    ),
    "a dense prefix": (
        {"model_type": "glm4_moe", "num_hidden_layers": 46, "first_k_dense_replace": 1, "hidden_size": 4096,
         "moe_intermediate_size": 1408, "n_routed_experts": 128, "num_experts_per_tok": 8},
        (45, 128, 4096, 1408),
    ),
    "one word a layer": (
        BASE | {"mlp_layer_types": ["dense"] * 3 + ["sparse"] * 7},
        (7, 8, 64, 32),
    ),
    "one flag a layer": (BASE | {"moe_layer_freq": [0, 1] * 5}, (5, 8, 64, 32)),
    "numbers of the layers": (BASE | {"moe_layers": [1, 3, 5]}, (3, 8, 64, 32)),
    "one letter a layer": (BASE | {"hybrid_override_pattern": "MEME*E-MEM"}, (4, 8, 64, 32)),
}  # fmt: skip
"""A config.json, and layers, experts, hidden and intermediate size that are right."""


@pytest.mark.field("D")
@pytest.mark.parametrize("installed", [True, False], ids=["transformers", "no_transformers"])
@pytest.mark.parametrize("name", FAMILIES)
def test_d_families_are_counted_right(name: str, installed: bool, tmp_path: Path, monkeypatch) -> None:
    if installed:
        pytest.importorskip("transformers")
    else:
        monkeypatch.setattr(models.importlib.util, "find_spec", lambda _: None)
    content, expected = FAMILIES[name]
    model = read_model(written(tmp_path, content))
    fields = model.fields
    assert (model.layers, fields["num_experts"], fields["hidden_size"], fields["intermediate_size"]) == expected


@pytest.mark.field("D")
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"moe_every_other_layer": True}, r"does not understand: moe_every_other_layer \(True\).*--layers"),
        ({"num_dense_blocks": 3}, r"num_dense_blocks \(3\)"),
        ({"zero_expert_num": 4, "expert_sets": [1]}, r"expert_sets \(\[1\]\), zero_expert_num \(4\)"),
        ({"per_layer_config": {"03": {"num_local_experts": 4}}}, "per_layer_config"),
        ({"mlp_layer_types": ["dense"] * 9 + ["switch"]}, "mlp_layer_types .*says nothing about its 10 layers"),
        ({"mlp_layer_types": ["sparse"] * 9}, "mlp_layer_types .*says nothing"),
        ({"hybrid_override_pattern": "MEXE*E-MEM"}, "hybrid_override_pattern .*says nothing"),
        ({"num_experts": [8, 4]}, r"num_experts \[8, 4\], expected an int"),
        ({"hidden_act": "relu2"}, "experts of two matrices"),
        ({"mlp_hidden_act": "relu2", "moe_latent_size": 16}, "two matrices"),
        ({"moe_latent_size": 16}, "another width than the model"),
        ({"enable_moe_block": False}, "no layer with experts"),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else "",
)
def test_d_what_is_not_understood_is_an_error_by_name(fields: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        read_model(written(tmp_path, BASE | fields))


@pytest.mark.field("D")
def test_d_fields_about_other_things_do_not_disturb(tmp_path: Path) -> None:
    harmless = {"num_shared_experts": 2, "shared_expert_intermediate_size": 64, "norm_topk_prob": True,
                "router_aux_loss_coef": 0.1, "layer_types": ["full_attention"] * 10, "layer_norm_eps": 1e-5,
                "mlp_bias": True, "max_window_layers": 4, "num_nextn_predict_layers": 1,
                "per_layer_config": {"03": {"head_dim": 4}}}  # fmt: skip
    assert read_model(written(tmp_path, BASE | harmless)).layers == 10


@pytest.mark.field("D")
class TestOptionsBesideAFile:
    def run(self, capsys, *arguments: str) -> tuple[int, str, str]:
        status = main(["estimate", *arguments, "--tokens", "8", "--isa", "ref"])
        said = capsys.readouterr()
        return status, said.out, said.err

    def test_d_options_fill_gaps(self, tmp_path: Path, capsys) -> None:
        lacking = {name: value for name, value in BASE.items() if name != "num_experts_per_tok"}
        path = str(written(tmp_path, lacking))
        status, _, err = self.run(capsys, path)
        assert status == 1 and "give --top-k" in err
        status, out, _ = self.run(capsys, path, "--top-k", "3")
        assert status == 0 and "top 3" in out and "replaces" not in out

    def test_d_what_replaces_a_field_is_said(self, tmp_path: Path, capsys) -> None:
        status, out, _ = self.run(capsys, str(written(tmp_path, BASE)), "--num-experts", "4")
        assert status == 0 and "4 experts of 64 x 32" in out
        assert "Note: --num-experts 4 replaces the model's 8." in out

    def test_d_layers_count_where_the_file_says_nothing(self, tmp_path: Path, capsys) -> None:
        lacking = {name: value for name, value in BASE.items() if name != "num_hidden_layers"}
        path = str(written(tmp_path, lacking))
        status, _, err = self.run(capsys, path)
        assert status == 1 and "give --layers" in err
        status, out, _ = self.run(capsys, path, "--layers", "7")
        assert status == 0 and "7 layers, 8 tokens a call" in out

    def test_d_all_sizes_as_options_settle_an_unknown_field(self, tmp_path: Path, capsys) -> None:
        path = str(written(tmp_path, BASE | {"expert_riddle": 1}))
        assert self.run(capsys, path)[0] == 1
        sizes = ["--num-experts", "8", "--intermediate-size", "32", "--top-k", "2"]
        assert self.run(capsys, path, *sizes, "--layers", "3")[0] == 0

    def test_d_experts_of_another_part_are_mentioned(self, tmp_path: Path, capsys) -> None:
        content = {"text_config": BASE, "talker_config": {"text_config": BASE | {"num_experts": 5}}}
        status, out, _ = self.run(capsys, str(written(tmp_path, content)))
        assert status == 0 and "Note: talker_config has experts too (5), which are not counted." in out


def built_experts(config: Any) -> list[tuple[int, ...]]:
    """Shape of ``down_proj`` of each block of fused experts in the model of ``config``, without memory."""
    import transformers as t

    with torch.device("meta"):
        model = None
        for auto in (t.AutoModelForCausalLM, t.AutoModelForImageTextToText, t.AutoModel):
            try:
                model = auto.from_config(config)
                break
            except Exception:  # transformers has no class of this kind for it, or its own defaults make no model
                continue
    modules = model.modules() if model is not None else ()
    found = (dict(module.named_parameters(recurse=False)).get("down_proj") for module in modules)
    return [tuple(p.shape) for p in found if p is not None and p.dim() == 3]


def model_types() -> Iterator[str]:
    from transformers import CONFIG_MAPPING

    for name in CONFIG_MAPPING:
        try:
            content = CONFIG_MAPPING[name]().to_dict()
        except Exception:  # needs arguments, or a library that is not here
            continue
        if re.search("expert", json.dumps(content, default=str)):
            yield name


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.field("D")
@pytest.mark.filterwarnings("ignore")
def test_d_transformers_is_the_judge(tmp_path: Path) -> None:
    """Every class of transformers with experts: counted as its model is built, or refused."""
    pytest.importorskip("transformers")
    from transformers import CONFIG_MAPPING

    wrong, right = {}, 0
    for name in model_types():
        config = CONFIG_MAPPING[name]()
        try:
            model = read_model(written(tmp_path, json.loads(json.dumps(config.to_dict(), default=str))))
        except ConfigError:
            continue
        sizes = model.fields
        shapes = [shape for shape in built_experts(config) if shape[0] == sizes["num_experts"]]
        expected = {sizes["hidden_size"], sizes["intermediate_size"]}
        if shapes and (len(shapes) != model.layers or set(shapes[0][1:]) != expected):
            wrong[name] = (model, len(shapes), shapes[0])
        right += bool(shapes)
    assert wrong == {}
    assert right > 40, "most of them must have been built and counted"
