"""The estimate against what the layer really holds, and against the figures that it was made for."""

import json
from dataclasses import replace

import pytest
import torch
from helpers import frozen_of

import jitmoe
from jitmoe.cli import main
from jitmoe.config import MoEConfig
from jitmoe.errors import ConfigError
from jitmoe.memory import estimate
from jitmoe.memory.estimate import Load
from jitmoe.memory.model import read_model
from jitmoe.plan import groups

SMALL = MoEConfig(num_experts=4, hidden_size=33, intermediate_size=50, top_k=2, lora_rank=5, isa="ref")


def bytes_of(load: Load, kind: str) -> int:
    return sum(item.total for item in estimate.estimate(load).items if item.kind == kind)


@pytest.mark.parametrize("lora_dtype", ["float32", "bfloat16"])
def test_weights_and_parameters_are_those_of_the_layer(lora_dtype):
    config = MoEConfig(4, 33, 50, 2, lora_rank=5, lora_dtype=lora_dtype, isa="ref")
    layer = jitmoe.MoELayer(
        config, *(torch.zeros(4, *shape, dtype=torch.bfloat16) for shape in ((50, 33), (50, 33), (33, 50)))
    )
    assert bytes_of(Load(config, tokens=8), "packed weight") == sum(t.nbytes for t in frozen_of(layer).values())
    parameters = sum(parameter.nbytes for parameter in layer.parameters())
    assert bytes_of(Load(config, tokens=8), "parameter") == parameters
    assert bytes_of(Load(config, tokens=8), "gradient") == parameters

    optimizer = torch.optim.AdamW(layer.parameters())
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = [state for parameter in layer.parameters() for state in optimizer.state[parameter].values()]
    held = sum(state.nbytes for state in states if state.ndim)
    assert bytes_of(Load(config, tokens=8), "optimizer") == held


def recomputing(config: MoEConfig) -> MoEConfig:
    return replace(config, recompute=True)


def test_what_every_layer_holds_and_what_one_at_a_time_does():
    one, three = (estimate.estimate(Load(SMALL, tokens=100, layers=layers)) for layers in (1, 3))
    for kind in ("packed weight", "parameter", "gradient", "optimizer", "saved"):
        assert bytes_of(three.load, kind) == 3 * bytes_of(one.load, kind) > 0
    for kind in ("input", "result", "transient", "scratch"):
        assert bytes_of(three.load, kind) == bytes_of(one.load, kind) > 0
    assert one.total == one.plan.nbytes + bytes_of(one.load, "optimizer")


def test_savings_are_what_the_changed_estimate_says():
    load = Load(SMALL, tokens=100, layers=3)
    found = estimate.estimate(load)
    changed = {
        "recompute=True": replace(load, config=recomputing(SMALL)),
        "half as many tokens a call": replace(load, tokens=50),
        'lora_dtype="bfloat16"': replace(load, config=replace(SMALL, lora_dtype="bfloat16")),
    }
    for change, other in changed.items():
        assert found.savings[change] == found.total - estimate.estimate(other).total > 0
    gate_and_up = 4 * 64 * 200  # 50 columns lie in 2 strips of 32
    low_rank = 3 * 4 * 5 * 200
    kept = bytes_of(changed["recompute=True"], "saved")
    assert bytes_of(load, "saved") - kept == 3 * (gate_and_up + low_rank)
    assert "recompute=True" not in estimate.estimate(changed["recompute=True"]).savings


def test_smaller_groups_save_where_groups_are_full():
    load = Load(MoEConfig(16, 256, 192, 4, isa="avx512"), tokens=100_000)
    saving = next(saved for change, saved in estimate.estimate(load).savings.items() if "GROUP_BYTES" in change)
    assert 0.4 * groups.GROUP_BYTES <= saving <= 1.1 * groups.GROUP_BYTES


def test_a_smaller_weight_format_saves_packed_weights():
    savings = estimate.estimate(Load(SMALL, 8)).savings
    for name in ("int8_row", "int4_group"):
        held = bytes_of(Load(replace(SMALL, weight_format=name), 8), "packed weight")
        assert savings[f'weight_format="{name}"'] == bytes_of(Load(SMALL, 8), "packed weight") - held > 0
    quantised = estimate.estimate(Load(replace(SMALL, weight_format="mxfp4"), 8))
    assert not [change for change in quantised.savings if "format" in change]


def test_inference_holds_no_gradients_nor_saved_tensors():
    found = estimate.estimate(Load(SMALL, tokens=16, training=False))
    kinds = ["packed weight", "parameter", "input", "result", "transient", "scratch"]
    assert [item.kind for item in found.items] == kinds
    assert found.total < estimate.estimate(Load(SMALL, tokens=16)).total


def test_the_largest_call_is_a_number_too():
    found = estimate.estimate(Load(replace(SMALL, num_experts=1 << 40), tokens=1 << 40, layers=1 << 20))
    slots = SMALL.top_k << 40
    assert bytes_of(found.load, "saved") >= (1 << 20) * 4 * 64 * slots, "exact: no size is rounded or wraps"
    assert "TB too much" in str(found)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tokens": 0}, "tokens must"),
        ({"tokens": 2**40 + 1}, "tokens must"),
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
    "fields without a value": (
        {"num_experts": 8, "hidden_size": 64, "moe_intermediate_size": 32, "num_experts_per_tok": 2,
         "num_hidden_layers": 10, "decoder_sparse_step": None, "mlp_only_layers": None, "first_k_dense_replace": None},
        (8, 64, 32, 2, 10),
    ),
    "text and images": (
        {"num_hidden_layers": 3, "text_config": {"num_experts": 8, "hidden_size": 64, "moe_intermediate_size": 32,
         "num_experts_per_tok": 2, "num_hidden_layers": 10}},
        (8, 64, 32, 2, 10),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_models_config_json(name, tmp_path):
    content, (experts, hidden, intermediate, top_k, layers) = MODELS[name]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content))
    model = read_model(path)
    assert model.layers == layers and model.notes == ()
    config = MoEConfig(**model.fields)
    assert (config.num_experts, config.hidden_size, config.intermediate_size, config.top_k) == (
        experts, hidden, intermediate, top_k,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "layers", "packed", "adapters", "saved"),
    [
        # 128 x 3 x 2048 x 768 bf16; 3 x 128 x 16 x 2816 f32;
        # 4096 x 8 slots x 768 gate and up, 3 x 16 f32, 4096 x 2048 x
        ("Qwen3-30B-A3B", 48, 1.208e9, 69.2e6, 100.7e6 + 6.3e6 + 16.8e6),
        # 256 x 3 x 7168 x 2048 bf16; 3 x 256 x 16 x 9216 f32;
        # 4096 x 8 slots x 2048 gate and up, 3 x 16 f32, 4096 x 7168 x
        ("DeepSeek-V3", 58, 22.55e9, 453.0e6, 268.4e6 + 6.3e6 + 58.7e6),
    ],
)
def test_figures_of_published_models(name, layers, packed, adapters, saved, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(MODELS[name][0]))
    model = read_model(path)
    load = Load(MoEConfig(**model.fields, lora_rank=16, isa="avx512_bf16"), 4096, model.layers, threads=32)
    for kind, nbytes in (("packed weight", packed), ("parameter", adapters), ("optimizer", 2 * adapters)):
        assert bytes_of(load, kind) == pytest.approx(layers * nbytes, rel=1e-3)
    routing = 4096 * 8 * (4 + 8)
    assert bytes_of(load, "saved") == pytest.approx(layers * (saved + routing), rel=1e-3)


@pytest.mark.parametrize(
    ("name", "training", "gigabytes"),
    [
        # 48 x (1.208 packed, 69 MB each of LoRA, its gradients and two moments, 125 MB saved) and one layer at work
        ("Qwen3-30B-A3B", True, 77.47),
        ("Qwen3-30B-A3B", False, 61.38),
        # 58 x (22.55 packed, 453 MB each of the same, 334 MB saved) and one layer at work
        ("DeepSeek-V3", True, 1433.6),
        ("DeepSeek-V3", False, 1334.3),
    ],
)
def test_totals_of_published_models(name, training, gigabytes, tmp_path):
    """4096 tokens a call, rank 16: all but scratch by hand to the byte, and scratch is little more than its sums."""
    path = tmp_path / "config.json"
    content, (experts, hidden, intermediate, top_k, layers) = MODELS[name]
    path.write_text(json.dumps(content))
    model = read_model(path)
    tokens, rank, threads = 4096, 16, 32
    config = MoEConfig(**model.fields, lora_rank=rank, isa="avx512_bf16")
    found = estimate.estimate(Load(config, tokens, model.layers, threads, training))

    wide, slots = 2 * tokens * hidden, tokens * top_k  # bytes of x, out and their gradients; rows of all experts
    packed = 2 * 3 * experts * hidden * intermediate
    lora = 4 * 3 * experts * rank * (hidden + intermediate)
    ids, routes, routing_weights, row_weights = 8 * slots, 2 * 8 * slots, 4 * slots, 4 * slots
    if training:
        saved = wide + routing_weights + ids + slots * (2 * 2 * intermediate + 3 * 4 * rank)
        every = packed + (1 + 1 + 2) * lora + saved
        working = (ids + wide) + (2 * wide + routing_weights) + (routes + row_weights + lora)
    else:
        every = packed + lora
        working = (wide + routing_weights + ids) + wide + (routes + row_weights)
    scratch = bytes_of(found.load, "scratch")
    assert found.total - scratch == layers * every + working
    sums, of_a_thread = 4 * tokens * hidden, 4 << 20
    assert sums < scratch < sums + groups.GROUP_BYTES + threads * of_a_thread
    assert found.total == pytest.approx(1e9 * gigabytes, rel=1e-3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "JSON object"),
        ('{"hidden_size": 8}', "num_experts"),
        (json.dumps(MODELS["OLMoE"][0] | {"hidden_size": True}), "hidden_size"),
        (json.dumps(MODELS["OLMoE"][0] | {"decoder_sparse_step": 0}), "decoder_sparse_step 0"),
        (json.dumps(MODELS["OLMoE"][0] | {"moe_layer_freq": [0, 1]}), r"moe_layer_freq \[0, 1\]"),
    ],
)
def test_not_a_models_config_json(content, message, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_model(path)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "gpt_oss", "hidden_act": "silu"}, "gpt-oss has biases, which are not counted"),
        ({"hidden_act": "gelu_pytorch_tanh"}, "the activation of this model is gelu_pytorch_tanh"),
    ],
)
def test_experts_that_are_not_ours_are_said_to_be(fields, words, tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(MODELS["Mixtral"][0] | fields))
    assert main(["estimate", str(path), "--tokens", "8"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"Note: {words}") and last.endswith(".")


def test_the_command(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(MODELS["Qwen3-30B-A3B"][0]))
    assert main(["estimate", str(path), "--tokens", "2048", "--lora-rank", "4", "--recompute", "--isa", "avx2"]) == 0
    out = capsys.readouterr().out
    title = "128 experts of 2048 x 768, top 8, LoRA of rank 4 in float32, 2048 tokens, "
    assert out.startswith(f"One layer and its call: {title}") and "training, isa avx2\n" in out
    buffers, model = out.split("The model:")
    assert "gate.grad_panel" in buffers and "gate.saved" not in buffers, "each buffer of one layer, which recomputes"
    rows = {line.split()[0]: line for line in model.splitlines() if line}
    assert "48 layers, 2048 tokens a call" in rows["total"]
    assert rows["packed"].split()[-5:] == ["1.21", "GB", "48", "58", "GB"]
    assert {"machine", "saving", "scratch", "optimizer"} <= set(rows) and "budget" not in rows
    arguments = ["--num-experts", "4", "--hidden-size", "33", "--intermediate-size", "50", "--top-k", "2"]
    assert main(["estimate", *arguments, "--memory-budget", "1000"]) == 0
    assert "memory_budget of a layer: does not fit" in capsys.readouterr().out
    assert main(["estimate", "--tokens", "8"]) == 1
    assert "--num-experts" in capsys.readouterr().err
    for option in ("--layers", "--threads", "--tokens"):
        assert main(["estimate", str(path), option, "0"]) == 1
        assert option.strip("-") in capsys.readouterr().err
