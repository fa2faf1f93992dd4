"""The estimate against what the layer really holds, and against the figures that it was made for."""

import json
import random

import pytest
import torch

import jitmoe
from jitmoe import cli, estimate
from jitmoe.config import MoEConfig
from jitmoe.errors import ConfigError
from jitmoe.estimate import Load

SMALL = MoEConfig(num_experts=4, hidden_size=33, intermediate_size=50, top_k=2, lora_rank=5, isa="ref")
W6 = MoEConfig(num_experts=256, hidden_size=7168, intermediate_size=2048, top_k=8, lora_rank=16, isa="avx512")


def bytes_of(load: Load, kind: str) -> int:
    return sum(item.total for item in estimate.estimate(load).items if item.kind == kind)


@pytest.mark.parametrize("lora_dtype", ["float32", "bfloat16"])
def test_weights_and_parameters_are_those_of_the_layer(lora_dtype):
    config = MoEConfig(4, 33, 50, 2, lora_rank=5, lora_dtype=lora_dtype, isa="ref")
    layer = jitmoe.MoELayer(
        config, *(torch.zeros(4, *shape, dtype=torch.bfloat16) for shape in ((50, 33), (50, 33), (33, 50)))
    )
    assert bytes_of(Load(config, tokens=8), "weights") == sum(buffer.nbytes for buffer in layer.buffers())
    parameters = sum(parameter.nbytes for parameter in layer.parameters())
    assert bytes_of(Load(config, tokens=8), "parameters") == parameters
    assert bytes_of(Load(config, tokens=8), "gradients") == parameters

    optimizer = torch.optim.AdamW(layer.parameters())
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = [state for parameter in layer.parameters() for state in optimizer.state[parameter].values()]
    held = sum(state.nbytes for state in states if state.ndim)
    assert bytes_of(Load(config, tokens=8), "optimizer") == held


def test_saved_is_four_bytes_a_padded_column_and_slot_and_nothing_with_recompute():
    load = Load(SMALL, tokens=100, layers=3)
    names = {item.name: item for item in estimate.estimate(load).items}
    gate_and_up = names["gate and up before the activation"]
    assert (gate_and_up.each, gate_and_up.total) == (4 * 64 * 200, 3 * 4 * 64 * 200)  # 50 columns lie in 2 strips of 32
    savings = estimate.estimate(load).savings
    extra = estimate.estimate(Load(recomputing(SMALL), tokens=100, layers=3))
    assert savings["recompute=True"] == estimate.estimate(load).total - extra.total
    assert "recompute=True" not in extra.savings


def recomputing(config: MoEConfig) -> MoEConfig:
    return MoEConfig(**(vars(config) | {"recompute": True}))


def test_the_ancestors_memory_case():
    saved_and_scratch = bytes_of(Load(W6, 25600, threads=60), "scratch") + bytes_of(
        Load(W6, 25600, threads=60), "saved"
    )
    assert saved_and_scratch <= 4.0e9
    load = Load(recomputing(W6), 25600, threads=60)
    assert bytes_of(load, "scratch") + bytes_of(load, "saved") <= 2.2e9


def test_inference_holds_weights_results_and_scratch_alone():
    found = estimate.estimate(Load(SMALL, tokens=16, training=False))
    assert [item.kind for item in found.items] == ["weights", "parameters", "results", "scratch"]
    assert found.total < estimate.estimate(Load(SMALL, tokens=16)).total


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("tokens", [3, 700, 5000])
def test_no_routing_needs_more_than_the_worst(tokens, training):
    load = Load(MoEConfig(16, 256, 192, 4, isa="avx512"), tokens, threads=2, training=training)
    worst, chance = estimate._worst_scratch(load), random.Random(tokens)
    assert estimate._even_scratch(load) <= worst
    for _ in range(20):
        cuts = sorted(chance.randrange(load.slots + 1) for _ in range(chance.randrange(16)))
        offsets = sorted({0, *cuts, load.slots})
        assert estimate._scratch(load, offsets) <= worst * 1.05


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tokens": 0}, "tokens must"),
        ({"tokens": 2**40}, "tokens must"),
        ({"layers": 0}, "layers"),
        ({"threads": 0}, "threads"),
    ],
)
def test_numbers_that_make_no_call(wrong, message):
    with pytest.raises(ConfigError, match=message):
        Load(**({"config": SMALL, "tokens": 1} | wrong))


MODELS = {
    "Qwen3-30B-A3B": (
        {"num_experts": 128, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
         "num_experts_per_tok": 8, "num_hidden_layers": 48, "decoder_sparse_step": 1, "mlp_only_layers": []},
        (128, 2048, 768, 8, 48),
    ),
    "DeepSeek-V3": (
        {"n_routed_experts": 256, "n_shared_experts": 1, "hidden_size": 7168, "intermediate_size": 18432,
         "moe_intermediate_size": 2048, "num_experts_per_tok": 8, "num_hidden_layers": 61,
         "first_k_dense_replace": 3, "moe_layer_freq": 1},
        (256, 7168, 2048, 8, 58),
    ),
    "DeepSeek-V2-Lite": (
        {"n_routed_experts": 64, "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408,
         "num_experts_per_tok": 6, "num_hidden_layers": 27, "first_k_dense_replace": 1, "moe_layer_freq": 1},
        (64, 2048, 1408, 6, 26),
    ),
    "Mixtral": (
        {"num_local_experts": 8, "hidden_size": 4096, "intermediate_size": 14336, "num_experts_per_tok": 2,
         "num_hidden_layers": 32},
        (8, 4096, 14336, 2, 32),
    ),
    "OLMoE": (
        {"num_experts": 64, "hidden_size": 2048, "intermediate_size": 1024, "num_experts_per_tok": 8,
         "num_hidden_layers": 16},
        (64, 2048, 1024, 8, 16),
    ),
    "every second layer": (
        {"num_experts": 8, "hidden_size": 64, "moe_intermediate_size": 32, "num_experts_per_tok": 2,
         "num_hidden_layers": 10, "decoder_sparse_step": 2, "mlp_only_layers": [1]},
        (8, 64, 32, 2, 4),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_models_config_json(name, tmp_path):
    content, (experts, hidden, intermediate, top_k, layers) = MODELS[name]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content))
    model = estimate.read_model(path)
    assert model.layers == layers
    config = MoEConfig(**model.fields)
    assert (config.num_experts, config.hidden_size, config.intermediate_size, config.top_k) == (
        experts, hidden, intermediate, top_k,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"), [("{", "cannot be read"), ("[]", "JSON object"), ('{"hidden_size": 8}', "num_experts")]
)
def test_not_a_models_config_json(content, message, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        estimate.read_model(path)


def test_the_command(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(MODELS["Qwen3-30B-A3B"][0]))
    assert (
        cli.main(["estimate", str(path), "--tokens", "2048", "--lora-rank", "4", "--recompute", "--isa", "avx2"]) == 0
    )
    out = capsys.readouterr().out
    rows = {line.split()[0]: line for line in out.splitlines()[1:]}
    assert "58 GB" in rows["weights"]
    assert "48 layers, 2048 tokens a call" in rows["total"]
    assert {"machine", "saving", "scratch", "optimizer"} <= set(rows)
    assert cli.main(["estimate", "--tokens", "8"]) == 1
    assert "--num-experts" in capsys.readouterr().err
