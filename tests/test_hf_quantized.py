"""Quantised checkpoints in the layouts of public ones: experts stay as they are, and the bits are those of bfloat16."""

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import eager_model, experts_of, freeze_experts, tokens
from helpers import same_bits
from safetensors.torch import load_file, save_file
from shipped import LAYOUTS, Layout, Written, cells, compressed, quantise, save, stack, write
from torch import Tensor
from training import byte_tokenizer, tiny_model

import jitmoe
from jitmoe.cli import main
from jitmoe.errors import CheckpointError, InputError, PackedFileError, UnsupportedExpertsError
from jitmoe.hf.checkpoint import Checkpoint
from jitmoe.hf.shipped.source import Source
from jitmoe.hf.train.estimate import estimate
from jitmoe.hf.train.sketch import sketch
from jitmoe.hf.weight import PackedWeight
from jitmoe.oracle.formats import dequantize
from jitmoe.quantization_config import Scheme, read_schemes

pytest.importorskip("peft", reason="adapters need PEFT")

WEIGHTS = ("gate_up_proj", "down_proj")
TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
EVERY_CELL = pytest.mark.parametrize(("layout", "sizes"), list(cells("int4-64", "fp8-deepseek", "gptq-v2")))
ONE_OF_EACH_FORMAT = pytest.mark.parametrize("name", ["fp8-qwen3", "int4-kimi", "int8-channel", "mxfp4"])


@pytest.fixture(scope="module", autouse=True)
def on_scalar_kernels() -> Iterator[None]:
    """They compile fastest; those of each instruction set have their own tests on every format."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JITMOE_ISA", "ref")
        jitmoe.hf.register()
        yield


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Written]:
    """Both checkpoints of a layout, written once; not to be changed."""
    found: dict[Any, Written] = {}

    def get(layout: Layout, sizes: tuple[int, int] = (0, 0)) -> Written:
        key = (id(layout), sizes if sizes[0] else layout.sizes[0])
        if key not in found:
            found[key] = write(layout, tmp_path_factory.mktemp("model"), key[1])
        return found[key]

    return get


def with_lora(model: Any) -> Any:
    """PEFT's LoRA on the experts, with values in B."""
    from peft import LoraConfig, get_peft_model

    freeze_experts(model)
    made = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, target_parameters=TARGETS))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return made


def step(model: Any) -> dict[str, Tensor]:
    """Loss, logits and all gradients of a call."""
    ids = tokens()
    out = model(ids, labels=ids)
    model.zero_grad()
    out.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": out.loss.detach(), "logits": out.logits.detach(), **gradients}


def experts(model: Any) -> Any:
    return next(iter(experts_of(model).values()))


def plain(weight: Tensor) -> Tensor:
    return weight.unpack() if isinstance(weight, PackedWeight) else weight


@EVERY_CELL
def test_it_computes_what_the_bfloat16_model_does(
    layout: Layout, sizes: tuple[int, int], written: Callable[..., Written]
) -> None:
    folders = written(layout, sizes)
    ours, other = (jitmoe.hf.from_pretrained(path) for path in (folders.quantised, folders.plain))
    weights = [getattr(module, name) for module in experts_of(ours).values() for name in WEIGHTS]
    assert {weight.packed.packing.format.name for weight in weights} == {layout.weight_format}
    assert all(map(same_bits, map(plain, ours.parameters()), map(plain, other.parameters())))
    found, expected = step(with_lora(ours)), step(with_lora(other))
    assert found.keys() == expected.keys() and sum("lora_" in name for name in found) == 8
    assert [name for name in found if not same_bits(found[name], expected[name])] == []
    assert all(value.count_nonzero() for value in found.values())


@EVERY_CELL
def test_training_lowers_the_loss(layout: Layout, sizes: tuple[int, int], written: Callable[..., Written]) -> None:
    model = with_lora(jitmoe.hf.from_pretrained(written(layout, sizes).quantised))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(4):
        losses.append(step(model)["loss"].item())
        optimizer.step()
    assert losses[-1] < losses[0]


@EVERY_CELL
def test_values_and_scales_come_back_bit_for_bit(
    layout: Layout, sizes: tuple[int, int], written: Callable[..., Written]
) -> None:
    """Dequantised by the oracle they are W', so no code is in another one's place; and they are those of the file."""
    folders = written(layout, sizes)
    for module in experts_of(jitmoe.hf.from_pretrained(folders.quantised)).values():
        for leaf in WEIGHTS:
            weight = getattr(module, leaf)
            found = weight.quantized()
            for part, both in found.items():
                whole = dequantize(weight.packed.packing, both.values, both.scales, *weight.packed.layout.extent(part))
                assert same_bits(
                    whole, weight.packed.layout.split(plain(weight), weight.parts)[list(found).index(part)]
                )
                assert same_bits(weight[3].quantized()[part].values, both.values[3])
            assert all(is_shipped(folders, both.scales[0]) for both in found.values())


def is_shipped(folders: Written, scales: Tensor) -> bool:
    """Whether a tensor of the checkpoint holds exactly these scales: of one matrix, or as its gate's or up's rows."""
    for tensor in folders.tensors.values():
        stacked = tensor[0].squeeze() if tensor.dtype == torch.uint8 else tensor
        ways = [tensor, tensor.mT, stacked, stacked[0::2], stacked[1::2]] if tensor.dim() > 1 else []
        if any(way.numel() == scales.numel() and same_bits(way.reshape(scales.shape), scales) for way in ways):
            return True
    return False


@pytest.mark.parametrize(("name", "sizes"), [("int8-channel", (46, 27)), ("fp8-qwen3", (256, 128))])
def test_stacked_experts_are_those_of_each_expert(name: str, sizes: tuple[int, int], tmp_path: Path) -> None:
    folders = write(LAYOUTS[name], tmp_path, sizes)
    expected = jitmoe.hf.from_pretrained(folders.quantised)
    stack(folders)
    save(folders, LAYOUTS[name].config)
    found = jitmoe.hf.from_pretrained(folders.quantised)
    assert all(map(same_bits, map(plain, found.parameters()), map(plain, expected.parameters())))
    for ours, other in zip(experts_of(found).values(), experts_of(expected).values(), strict=True):
        one, two = (module.gate_up_proj.quantized() for module in (ours, other))
        assert all(same_bits(one[part].values, two[part].values) for part in ("gate", "up"))


def test_squares_across_gate_and_up_are_refused(tmp_path: Path) -> None:
    folders = write(LAYOUTS["fp8-qwen3"], tmp_path)
    stack(folders)
    for name in [name for name in folders.tensors if name.endswith("experts.gate_up_proj_scale_inv")]:
        folders.tensors[name] = folders.tensors[name][:, :3].contiguous()  # 260 rows have three squares
    save(folders, LAYOUTS["fp8-qwen3"].config)
    with pytest.raises(UnsupportedExpertsError, match="squares of one scale lie across gate and up"):
        jitmoe.hf.from_pretrained(folders.quantised)


@pytest.mark.parametrize("name", ["fp8-qwen3", "int4-kimi", "gptq", "mxfp4"])
def test_the_loader_misses_nothing_and_has_nothing_left(name: str, written: Callable[..., Written]) -> None:
    _, info = jitmoe.hf.from_pretrained(written(LAYOUTS[name]).quantised, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))


def test_scales_of_activations_are_left_and_named(tmp_path: Path) -> None:
    """Activations are never quantised here; the weights mean the same."""
    folders = write(LAYOUTS["int8-channel"], tmp_path)
    extra = "model.layers.0.self_attn.q_proj.input_scale"
    save(
        Written(folders.quantised, folders.plain, {**folders.tensors, extra: torch.ones(1)}),
        LAYOUTS["int8-channel"].config,
    )
    model, info = jitmoe.hf.from_pretrained(folders.quantised, output_loading_info=True)
    assert set(info["unexpected_keys"]) == {extra}
    other = jitmoe.hf.from_pretrained(folders.plain)
    assert all(map(same_bits, map(plain, model.parameters()), map(plain, other.parameters())))


def test_the_report_names_the_format(written: Callable[..., Written], capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("fp8-qwen3", "int4-kimi", "mxfp4"):
        model = jitmoe.hf.from_pretrained(written(LAYOUTS[name]).quantised)
        lines = jitmoe.hf.report(model).splitlines()
        assert len(lines) == 2 and all(f"packed {LAYOUTS[name].said}" in line for line in lines)
        memory = experts(model).down_proj.packed
        assert 0.2 < float(lines[0].partition(" of bfloat16")[0].split()[-1]) < 0.6 and memory.nbytes


@ONE_OF_EACH_FORMAT
def test_a_packed_folder_keeps_the_format(name: str, written: Callable[..., Written], tmp_path: Path) -> None:
    folder = written(LAYOUTS[name]).quantised
    expected = jitmoe.hf.from_pretrained(folder)
    first = jitmoe.hf.from_pretrained(folder, packed=tmp_path / "packed")
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "packed").iterdir()}
    again = jitmoe.hf.from_pretrained(folder, packed=tmp_path / "packed")
    assert times == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "packed").iterdir()} and len(times) == 3
    for model in (first, again):
        assert all(map(same_bits, map(plain, model.parameters()), map(plain, expected.parameters())))
        assert experts(model).down_proj.packed.packing == experts(expected).down_proj.packed.packing


def test_packed_files_of_another_format_are_refused(written: Callable[..., Written], tmp_path: Path) -> None:
    one, other = written(LAYOUTS["int8-channel"]).quantised, written(LAYOUTS["int8-channel"]).plain
    for folder, name in ((one, "a"), (other, "b")):
        jitmoe.hf.from_pretrained(folder, packed=tmp_path / name)
    for path in (tmp_path / "b").glob("*.packed"):
        path.rename(tmp_path / "a" / path.name)
    with pytest.raises(PackedFileError, match="weights of another format: weight_format bfloat16, the config's are"):
        jitmoe.hf.from_pretrained(one, packed=tmp_path / "a")


def test_a_state_dict_expands_nothing_and_loads_without_loss(
    written: Callable[..., Written], recwarn: pytest.WarningsRecorder
) -> None:
    folders = written(LAYOUTS["int8-channel"])
    model, other = (jitmoe.hf.from_pretrained(folders.quantised) for _ in range(2))
    state = model.state_dict()
    assert sum(isinstance(value, PackedWeight) for value in state.values()) == 4
    before = {part: both.values.clone() for part, both in experts(model).gate_up_proj.quantized().items()}
    other.load_state_dict(state)
    model.load_state_dict({name: plain(value) for name, value in state.items()})
    for one in (model, other, copy.deepcopy(model)):
        found = experts(one).gate_up_proj.quantized()
        assert all(same_bits(found[part].values, before[part]) for part in before)
    assert not [str(warning.message) for warning in recwarn if "is kept in" in str(warning.message)]


def test_what_is_saved_is_the_bfloat16_model_and_says_so(written: Callable[..., Written], tmp_path: Path) -> None:
    folders = written(LAYOUTS["fp8-qwen3"])
    model = jitmoe.hf.from_pretrained(folders.quantised)
    with pytest.warns(UserWarning, match="kept in fp8_block are written out as bfloat16"):
        model.save_pretrained(tmp_path)
    found, expected = (load_file(path / "model.safetensors") for path in (tmp_path, folders.plain))
    assert found.keys() == expected.keys() and all(same_bits(found[name], expected[name]) for name in found)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_adapters_are_saved_without_a_word(
    written: Callable[..., Written], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    model = with_lora(jitmoe.hf.from_pretrained(written(LAYOUTS["int8-channel"]).quantised))
    model.save_pretrained(tmp_path)
    assert not [str(warning.message) for warning in recwarn if "written out" in str(warning.message)]
    assert all("lora_" in name for name in load_file(tmp_path / "adapter_model.safetensors"))


@ONE_OF_EACH_FORMAT
def test_a_merge_says_what_it_loses(name: str, written: Callable[..., Written]) -> None:
    model = with_lora(jitmoe.hf.from_pretrained(written(LAYOUTS[name]).quantised))
    module = experts(model)
    layout = module.down_proj.packed.layout
    old = {leaf: plain(getattr(module, leaf)).float() for leaf in WEIGHTS}
    deltas = {m.parameter_name: m.get_delta_weight("default") for m in reversed(list(model.modules()))
              if hasattr(m, "parameter_name") and m.get_base_layer() is module}  # fmt: skip
    with pytest.warns(UserWarning, match="To unmerge does not give the old weights back") as warned:
        model.merge_adapter()
    said = [str(warning.message) for warning in warned if "is kept in" in str(warning.message)]
    assert len(said) == 4  # two weights in two layers
    for leaf in WEIGHTS:
        text = next(one for one in said if one.startswith(leaf))
        parts = getattr(module, leaf).parts
        target = layout.split((old[leaf] + deltas[leaf].float()), parts)
        for part, exact, new in zip(parts, target, layout.split(plain(getattr(module, leaf)), parts), strict=True):
            lost = new.double() - exact.double()
            rms = (lost.square().sum() / exact.double().square().sum()).sqrt()
            largest = lost.abs().max() / exact.double().abs().max()
            line = next(row for row in text.splitlines() if row.split()[:1] == [part])
            assert f"{rms:.2e}" in line and f"{largest:.2e}" in line and 0 < rms < 0.2
    with pytest.warns(UserWarning, match="is kept in"):
        model.unmerge_adapter()


def test_values_that_have_no_code_are_refused_and_nothing_is_written(written: Callable[..., Written]) -> None:
    weight = experts(jitmoe.hf.from_pretrained(written(LAYOUTS["int8-channel"]).quantised)).down_proj
    before = plain(weight)
    new = before.clone()
    new[5, 1, 2] = torch.inf
    with pytest.raises(InputError, match=r"down_proj \(down\)\[5, 1, 2\] is inf"), torch.no_grad():
        weight.copy_(new)
    assert same_bits(plain(weight), before)
    with pytest.raises(InputError, match="packed in bfloat16 and has no scales"):
        experts(jitmoe.hf.from_pretrained(written(LAYOUTS["int8-channel"]).plain)).down_proj.quantized()


def test_plain_experts_under_a_config_that_says_otherwise_are_named(
    written: Callable[..., Written], tmp_path: Path
) -> None:
    folders = written(LAYOUTS["int8-channel"])
    shutil.copytree(folders.plain, tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    quantised = json.loads((folders.quantised / "config.json").read_text())
    config["quantization_config"] = quantised["quantization_config"]
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="says int8_row, and the experts of model.layers.*packed in bfloat16"):
        jitmoe.hf.from_pretrained(tmp_path / "model")


def test_unpacked_experts_are_plain(written: Callable[..., Written]) -> None:
    folders = written(LAYOUTS["mxfp4"])
    model = jitmoe.hf.from_pretrained(folders.quantised)
    jitmoe.hf.unpack(model)
    expected = {name: tensor for name, tensor in load_file(folders.plain / "model.safetensors").items()}
    assert all(same_bits(parameter, expected[name]) for name, parameter in model.named_parameters() if name in expected)
    assert not any(isinstance(parameter, PackedWeight) for parameter in model.parameters())


def test_a_module_in_two_formats_is_refused(written: Callable[..., Written]) -> None:
    model = jitmoe.hf.from_pretrained(written(LAYOUTS["int8-channel"]).quantised)
    module = experts(model)
    module._parameters["down_proj"] = torch.nn.Parameter(plain(module.down_proj), requires_grad=False)
    with pytest.raises(UnsupportedExpertsError, match=r"gate_up_proj is packed in int8_row, .*down_proj in bfloat16"):
        model(tokens())


@pytest.mark.parametrize(("name", "sizes"), [("fp8-qwen3", (256, 128)), ("mxfp4", (64, 32))])
def test_it_is_what_transformers_expands(name: str, sizes: tuple[int, int], written: Callable[..., Written]) -> None:
    """Of sizes that it can do: it tells the size of blocks from their number."""
    from transformers import AutoModelForCausalLM

    folder = written(LAYOUTS[name], sizes).quantised
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    ours = dict(jitmoe.hf.from_pretrained(folder).named_parameters())
    assert [name for name, p in stock.named_parameters() if not same_bits(plain(ours[name]), p)] == []


@pytest.mark.parametrize(
    ("layout", "scales"), [("fp8", "float32"), ("compressed", "float16"), ("compressed", "bfloat16")]
)
def test_a_large_matrix_is_expanded_in_pieces(layout: str, scales: str, tmp_path: Path) -> None:
    """Scales of a dtype that the format does not have become float32, which changes no value."""
    out, in_ = 2100, 140
    generator = torch.Generator().manual_seed(0)
    block = layout == "fp8"
    end, shape = ("scale_inv", (17, 2)) if block else ("scale", (out, 1))
    values = torch.randn(out, in_, generator=generator) * 30
    codes = values.to(torch.float8_e4m3fn if block else torch.int8)
    factors = (0.5 + torch.rand(shape, generator=generator)).to(getattr(torch, scales))
    save_file({"a.weight": codes, f"a.weight_{end}": factors}, tmp_path / "a.safetensors")
    form = "fp8_block" if block else "int8_row"
    source = Source(Checkpoint([str(tmp_path / "a.safetensors")]), [Scheme(layout, form)])
    wide = (
        factors.float().repeat_interleave(128, 0)[:out].repeat_interleave(128, 1)[:, :in_] if block else factors.float()
    )
    assert same_bits(source.expand("a.weight", (out, in_)), (codes.float() * wide).bfloat16())
    assert source.packing("a.weight").scale == "float32"


def test_training_is_estimated_in_the_format(written: Callable[..., Written]) -> None:
    found = {}
    for name in ("int8-channel", "fp8-qwen3"):
        folders = written(LAYOUTS[name])
        for path in (folders.quantised, folders.plain):
            schemes = read_schemes(LAYOUTS[name].config) if path == folders.quantised else ()
            found[path] = sketch(path, [path / "model.safetensors"], schemes)
            (only,) = found[path].experts
            assert only.packing.format.name == (LAYOUTS[name].weight_format if schemes else "bfloat16")
            memory = dict(estimate(found[path], "", 3, 64, 1, None).items)
            model = jitmoe.hf.from_pretrained(path)
            held = [getattr(module, leaf).packed.nbytes for module in experts_of(model).values() for leaf in WEIGHTS]
            assert memory["experts, packed"] == sum(held)


def test_the_command_estimates_the_format(written: Callable[..., Written], capsys: pytest.CaptureFixture[str]) -> None:
    for name, words in (("int8-channel", "int8_row, as the checkpoint has them"), ("int4-and-fp8", "several formats")):
        assert main(["estimate", str(written(LAYOUTS[name]).quantised / "config.json")]) == 0
        assert words in capsys.readouterr().out


def test_the_command_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = Written(tmp_path / "quantised", tmp_path / "plain")
    tiny_model("eager").save_pretrained(folders.plain)
    byte_tokenizer().save_pretrained(folders.plain)
    quantise(LAYOUTS["gptq"], folders)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"row {row} " * 5}) + "\n" for row in range(6)))
    for name in ("quantised", "plain"):
        options = ("--steps", "2", "--batch-size", "2", "--output", str(tmp_path / f"{name}-lora"))
        assert main(["train", str(tmp_path / name), str(tmp_path / "rows.jsonl"), *options]) == 0
        out = capsys.readouterr().out
        said = "Experts stay as the checkpoint has them (int4_group, groups of 32, float16 scales)" in out
        assert said == (name == "quantised") == ("packed int4_group" in out)
    one, other = (
        load_file(tmp_path / f"{name}-lora/adapter/adapter_model.safetensors") for name in ("quantised", "plain")
    )
    assert all(same_bits(one[name], other[name]) for name in other)


INT4 = {"type": "int", "num_bits": 4, "strategy": "group", "group_size": 32}
BYTE = {"type": "int", "num_bits": 8, "strategy": "channel"}
GPTQ = LAYOUTS["gptq"].config
FP8 = LAYOUTS["fp8-qwen3"].config

REFUSED_CONFIGS: dict[str, tuple[Any, str]] = {
    "awq": ({"quant_method": "awq", "bits": 4}, "quant_method 'awq' is none that jitmoe knows"),
    "nf4": ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "quant_method 'bitsandbytes' is none"),
    "blocks": ({**FP8, "weight_block_size": [64, 128]}, r"weight_block_size \[64, 128\]"),
    "tensor": ({**FP8, "weight_block_size": None}, "weight_block_size None"),
    "e5m2": ({**FP8, "fmt": "e5m2"}, "fmt 'e5m2'"),
    "asymmetric": (compressed("pack-quantized", {**INT4, "symmetric": False}), "asymmetric: its weights have zero"),
    "group": (compressed("pack-quantized", {**INT4, "group_size": 16}), "group_size 16"),
    "actorder": (compressed("pack-quantized", {**INT4, "actorder": "group"}), "actorder 'group'"),
    "bits": (compressed("pack-quantized", {**INT4, "num_bits": 8}), "num_bits 8, strategy 'group'"),
    "dynamic": (compressed("int-quantized", {**BYTE, "dynamic": True}), "dynamic True"),
    "per-tensor": (compressed("float-quantized", {**BYTE, "type": "float", "strategy": "tensor"}), "strategy 'tensor'"),
    "nvfp4": (compressed("nvfp4-pack-quantized", {**INT4, "type": "float"}), "nvfp4-pack-quantized"),
    "sparse": (
        {**compressed("int-quantized", BYTE), "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse weights",
    ),
    "rotated": (
        {**compressed("int-quantized", BYTE), "transform_config": {"config_groups": {"u": {}}}}, "weights are rotated",
    ),
    "activations": (
        {**compressed("int-quantized", BYTE), "config_groups": {"g": {"weights": None}}}, "activations alone",
    ),
    "frozen": ({**compressed("int-quantized", BYTE), "quantization_status": "frozen"}, "status 'frozen'"),
    "gptq-asymmetric": ({**GPTQ, "sym": False}, "asymmetric"),
    "gptq-act-order": ({**GPTQ, "desc_act": True}, "act-order"),
    "gptq-bits": ({**GPTQ, "bits": 8}, "bits 8"),
    "gptq-groups": ({**GPTQ, "group_size": -1}, "group_size -1"),
    "gptq-marlin": ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
    "gptq-dynamic": ({**GPTQ, "dynamic": {"-:.*attn.*": {}}}, r"options for some modules \(dynamic\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED_CONFIGS)
def test_other_methods_and_options_are_refused_by_name(case: str, tmp_path: Path) -> None:
    """From the config alone: there are no files of weights to be read."""
    config, words = REFUSED_CONFIGS[case]
    eager_model("qwen3_moe").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    content = {**json.loads((tmp_path / "config.json").read_text()), "quantization_config": config}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UnsupportedExpertsError, match=rf"(?s){words}.*Take the checkpoint of this model in bfloat16"):
        jitmoe.hf.from_pretrained(tmp_path)


EXPERT = "model.layers.1.mlp.experts.4."


def plain_projection(tensors: dict[str, Tensor]) -> None:
    tensors[f"{EXPERT}down_proj.weight"] = torch.zeros(46, 27).bfloat16()
    del tensors[f"{EXPERT}down_proj.weight_scale"]


def no_scales(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{EXPERT}up_proj.weight_scale"]


def narrow_scales(tensors: dict[str, Tensor]) -> None:
    tensors[f"{EXPERT}up_proj.weight_scale"] = torch.ones(26, 1)


def zero_point(tensors: dict[str, Tensor]) -> None:
    tensors[f"{EXPERT}up_proj.weight_zero_point"] = torch.zeros(27, 1, dtype=torch.int8)


def other_codes(tensors: dict[str, Tensor]) -> None:
    tensors[f"{EXPERT}up_proj.weight"] = torch.zeros(27, 46, dtype=torch.uint8)


def no_expert(tensors: dict[str, Tensor]) -> None:
    for end in ("", "_scale"):
        del tensors[f"{EXPERT}up_proj.weight{end}"]


def other_attention(tensors: dict[str, Tensor]) -> None:
    for end in ("", "_scale"):
        name = f"model.layers.0.self_attn.o_proj.weight{end}"
        tensors[name] = tensors[name][:-1].contiguous()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (plain_projection, UnsupportedExpertsError, "in more than one format .*down_proj.weight in bfloat16"),
        (no_scales, UnsupportedExpertsError, "4.up_proj.weight is int8 and has no scales"),
        (narrow_scales, CheckpointError, r"4.up_proj.weight is not int8_row .*_scale float32 \[26, 1\]"),
        (zero_point, UnsupportedExpertsError, "has zero points"),
        (other_codes, CheckpointError, "4.up_proj.weight is not int8_row .*: it is .* uint8"),
        (no_expert, CheckpointError, "gate_up_proj is made of 7 tensors .* the checkpoint has 6"),
        (other_attention, CheckpointError, "o_proj.weight is quantised and has not the shape"),
    ],
)
def test_damaged_checkpoints_are_named(
    change: Callable[[dict[str, Tensor]], None], error: type[Exception], words: str, tmp_path: Path
) -> None:
    folders = write(LAYOUTS["int8-channel"], tmp_path)
    change(folders.tensors)
    save(folders, LAYOUTS["int8-channel"].config)
    with pytest.raises(error, match=words):
        jitmoe.hf.from_pretrained(folders.quantised, packed=tmp_path / "packed")
    if error is UnsupportedExpertsError:
        assert not (tmp_path / "packed").exists()  # nothing was read


def act_order(tensors: dict[str, Tensor]) -> None:
    name = "model.layers.1.block_sparse_moe.experts.4.w1.g_idx"
    tensors[name] = tensors[name].flip(0)


@pytest.mark.parametrize(
    ("config", "change", "words"),
    [
        ({**GPTQ, "checkpoint_format": "gptq_v2"}, lambda _: None, "qzeros of GPTQ are not all 8"),
        (GPTQ, act_order, r"experts.4.w1.weight: g_idx of GPTQ is not in order"),
    ],
)
def test_contents_that_the_config_denies_are_refused(
    config: dict[str, Any], change: Callable[[dict[str, Tensor]], None], words: str, tmp_path: Path
) -> None:
    folders = write(LAYOUTS["gptq"], tmp_path)
    change(folders.tensors)
    save(folders, config)
    with pytest.raises(UnsupportedExpertsError, match=words):
        jitmoe.hf.from_pretrained(folders.quantised)
