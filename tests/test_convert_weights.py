"""Checkpoints whose experts are quantised: each weight the nearest code, everything else byte for byte."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from checkpoint_decoder import Raw, check_nearest, check_scales, decode, read, read_folder, value_bytes
from families import config_of, eager_model, tokens
from helpers import killed_at, same_bits
from safetensors.torch import load_file, save_file

import jitmoe
from jitmoe.cli import main
from jitmoe.errors import CheckpointError, CheckpointWriteError, ConfigError
from jitmoe.files import making_folder
from jitmoe.hf.quantizing.convert import REPORT, convert_weights
from jitmoe.hf.quantizing.families import FAMILIES, MIXTRAL, STACKED_ONLY
from jitmoe.hf.quantizing.names import WrittenFormat
from jitmoe.hf.quantizing.plan import Plan

FORMATS: tuple[WrittenFormat, ...] = get_args(WrittenFormat)

SIZES: dict[str, dict[str, int]] = {
    "qwen3_moe": {"hidden_size": 150, "moe_intermediate_size": 140},
    "mixtral": {"hidden_size": 128, "intermediate_size": 64},
    "deepseek_v3": {},
}
"""Squares and groups that are full, and some that are not; DeepSeek has shared experts."""

LEAVES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}

EXPERT = re.compile(r"(.*\.experts\.\d+\.(?:gate_proj|up_proj|down_proj|w1|w2|w3))\.weight")
"""Names of the experts in the sources below; shared experts have another."""

Saved = Callable[..., Path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Makes the checkpoint of a family once, as transformers saves it."""
    made: dict[str, Path] = {}

    def save(family: str, **fields: Any) -> Path:
        key = f"{family}-{fields}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("source") / family
            eager_model(family, **{**SIZES.get(family, {}), **fields}).save_pretrained(made[key])
        return made[key]

    return save


@pytest.fixture
def copied(saved: Saved, tmp_path: Path) -> Saved:
    """A copy of a checkpoint that a test may spoil."""
    return lambda family: Path(shutil.copytree(saved(family), tmp_path / "source"))


def check(source: dict[str, Raw], made: dict[str, Raw], weight_format: str, group: int = 32) -> None:
    """Every expert is the nearest codes; everything else has its bytes; there is nothing else."""
    experts = {found[1]: raw for name, raw in source.items() if (found := EXPERT.fullmatch(name))}
    assert len(experts) == 2 * 7 * 3
    for module, raw in experts.items():
        found = decode(made, module, weight_format, *raw.shape, group)
        check_scales(found, raw.numbers, weight_format, group)
        check_nearest(found, raw.numbers, weight_format)
    plain = {name: raw for name, raw in source.items() if not EXPERT.fullmatch(name)}
    assert {name: made.get(name) for name in plain} == plain
    parts = {"fp8_block": 2, "int8_row": 2, "int4_group": 3}[weight_format]
    assert len(made) == len(plain) + parts * len(experts)


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("family", SIZES)
def test_nearest_codes_and_nothing_else_changes(
    family: str, weight_format: WrittenFormat, saved: Saved, tmp_path: Path
) -> None:
    source, made = saved(family), tmp_path / "made"
    convert_weights(source, made, weight_format)
    tensors = read_folder(source)
    check(tensors, read_folder(made), weight_format)
    if family == "deepseek_v3":
        assert any("shared_experts" in name for name in tensors)
    held = sum(
        value_bytes(weight_format, *raw.shape, 32) if EXPERT.fullmatch(name) else len(raw.data)
        for name, raw in tensors.items()
    )
    content = (made / "model.safetensors").read_bytes()
    assert len(content) - 8 - int.from_bytes(content[:8], "little") == held


@pytest.mark.parametrize("group", [64, 128])
def test_groups(group: int, saved: Saved, tmp_path: Path) -> None:
    convert_weights(saved("mixtral"), tmp_path / "made", "int4_group", group_size=group)
    check(read_folder(saved("mixtral")), read_folder(tmp_path / "made"), "int4_group", group)
    config = json.loads((tmp_path / "made/config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["weights"]["group_size"] == group


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_float_types_are_not_rounded_first(
    dtype: torch.dtype, weight_format: WrittenFormat, copied: Saved, tmp_path: Path
) -> None:
    file = copied("mixtral") / "model.safetensors"
    generator = torch.Generator().manual_seed(0)
    shapes = {name: tensor.shape for name, tensor in load_file(file).items()}
    save_file(
        {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()},
        file,
        {"format": "pt"},
    )
    convert_weights(file.parent, tmp_path / "made", weight_format)
    check(read_folder(file.parent), read_folder(tmp_path / "made"), weight_format)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_parts_of_tensors_make_the_same_files(
    weight_format: WrittenFormat, saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large matrices are read and quantised some rows at a time."""
    convert_weights(saved("qwen3_moe"), tmp_path / "whole", weight_format)
    monkeypatch.setattr("jitmoe.hf.quantizing.jobs.WEIGHTS_AT_ONCE", 1)
    monkeypatch.setattr("jitmoe.hf.quantizing.jobs.COPIED_BYTES", 1000)
    whole = convert_weights(saved("qwen3_moe"), tmp_path / "parts", weight_format)
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert one == other and whole.losses["up_proj"].rms > 0


def test_shards_in_and_out(saved: Saved, tmp_path: Path) -> None:
    source = saved("deepseek_v3")
    eager_model("deepseek_v3").save_pretrained(tmp_path / "shards", max_shard_size="12KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 5
    convert_weights(source, tmp_path / "one")
    convert_weights(tmp_path / "shards", tmp_path / "many", max_shard_size=9000)
    one, many = read_folder(tmp_path / "one"), read_folder(tmp_path / "many")
    assert one == many
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{n + 1:05}-of-{len(files):05}.safetensors" for n in range(len(files))
    ]
    assert len(files) > 5 and all(sum(len(raw.data) for raw in read(file).values()) <= 9000 for file in files)
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(len(raw.data) for raw in many.values())


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_stacked_experts_come_apart(family: str, saved: Saved, tmp_path: Path) -> None:
    """As a state dict of transformers has them: the same checkpoint as from tensors of single experts."""
    (tmp_path / "stacked").mkdir()
    state = {name: tensor.contiguous() for name, tensor in eager_model(family, **SIZES[family]).state_dict().items()}
    assert "model.layers.0.mlp.experts.gate_up_proj" in state
    save_file(state, tmp_path / "stacked/model.safetensors", {"format": "pt"})
    shutil.copy(saved(family) / "config.json", tmp_path / "stacked")
    for name, source in (("one", saved(family)), ("other", tmp_path / "stacked")):
        convert_weights(source, tmp_path / name, "fp8_block")
    assert read_folder(tmp_path / "one") == read_folder(tmp_path / "other")


def modules(tensors: dict[str, Raw]) -> set[str]:
    """Modules with a plain matrix."""
    wide = {name for name, raw in tensors.items() if len(raw.shape) > 1 and raw.dtype == "BF16"}
    return {name.removesuffix(".weight") for name in wide if name.endswith(".weight")}


@pytest.mark.parametrize("weight_format", FORMATS)
def test_what_config_says(weight_format: WrittenFormat, saved: Saved, tmp_path: Path) -> None:
    source = saved("deepseek_v3", tie_word_embeddings=True)  # no tensor is called lm_head
    convert_weights(source, tmp_path / "made", weight_format)
    config = json.loads((tmp_path / "made/config.json").read_text())
    found = config.pop("quantization_config")
    assert config == json.loads((source / "config.json").read_text())
    plain = found.pop("modules_to_not_convert" if weight_format == "fp8_block" else "ignore")
    assert set(plain) == modules(read_folder(tmp_path / "made")) | {"lm_head"}
    assert {"model.layers.1.mlp.gate", "model.layers.1.mlp.shared_experts.up_proj"} <= set(plain)
    if weight_format == "fp8_block":
        assert found == {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]
        }  # fmt: skip
        return
    weights = found["config_groups"]["group_0"]["weights"]
    grouped = weight_format == "int4_group"
    assert (found["quant_method"], found["format"]) == (
        "compressed-tensors", "pack-quantized" if grouped else "int-quantized"
    )  # fmt: skip
    assert (weights["num_bits"], weights["type"], weights["symmetric"], weights["strategy"], weights["group_size"]) == (
        (4, "int", True, "group", 32) if grouped else (8, "int", True, "channel", None)
    )


def test_files_beside_the_weights(copied: Saved, tmp_path: Path) -> None:
    """Through links, as in a snapshot of the hub; other weights are named and stay behind."""
    blobs, source = copied("mixtral"), tmp_path / "snapshot"
    (blobs / "tokenizer.json").write_text("{}")
    (blobs / "additional_chat_templates").mkdir()
    (blobs / "additional_chat_templates/tool.jinja").write_text("{{ x }}")
    (blobs / "optimizer.pt").write_bytes(b"state")
    (blobs / ".gitattributes").touch()
    source.mkdir()
    for entry in blobs.iterdir():
        (source / entry.name).symlink_to(os.path.relpath(entry, source))
    done = convert_weights(source, tmp_path / "made")
    made = {str(path.relative_to(tmp_path / "made")): path for path in (tmp_path / "made").rglob("*") if path.is_file()}
    beside = {"tokenizer.json", "additional_chat_templates/tool.jinja", "generation_config.json"}
    assert made.keys() == beside | {"config.json", "model.safetensors", REPORT}
    assert all(made[name].read_bytes() == (blobs / name).read_bytes() for name in beside)
    assert not any(path.is_symlink() for path in (tmp_path / "made").rglob("*"))
    assert "LEFT OUT: optimizer.pt" in done.notes


@pytest.mark.parametrize("weight_format", FORMATS)
def test_the_report(weight_format: WrittenFormat, saved: Saved, tmp_path: Path) -> None:
    plan = Plan(saved("mixtral"), weight_format, 32, 10**9)
    done = convert_weights(saved("mixtral"), tmp_path / "made", weight_format)
    source, made = read_folder(saved("mixtral")), read_folder(tmp_path / "made")
    for projection, leaf in LEAVES.items():
        errors = {}
        for name in source:
            if name.endswith(f".{leaf}.weight"):
                module, raw = name.removesuffix(".weight"), source[name]
                w = raw.numbers
                errors[module] = w, decode(made, module, weight_format, *raw.shape, 32).weights - w
        all_w, all_e = (np.concatenate([pair[i].ravel() for pair in errors.values()]) for i in (0, 1))
        each = {module: np.sqrt((e**2).sum() / (w**2).sum()) for module, (w, e) in errors.items()}
        found = done.losses[projection]  # type: ignore[index]
        assert np.isclose(found.rms, np.sqrt((all_e**2).sum() / (all_w**2).sum()), rtol=1e-9)
        assert np.isclose(found.largest, np.abs(all_e).max() / np.abs(all_w).max(), rtol=1e-9)
        assert found.module == max(each, key=each.__getitem__) and np.isclose(
            found.worst, each[found.module], rtol=1e-9
        )
        assert found.module in str(done)
    content = json.loads((tmp_path / "made" / REPORT).read_text())
    assert content["losses"]["up_proj"] == vars(done.losses["up_proj"]) and content["weight_format"] == weight_format
    beside = sum((tmp_path / "made" / name).stat().st_size for name in ("model.safetensors", "generation_config.json"))
    assert plan.bytes_after == content["bytes_after"] == beside


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_transformers_loads_fp8(family: str, tmp_path: Path) -> None:
    """It expands FP8 where there is no GPU: the logits are those of the model on W'."""
    narrow = {"intermediate_size" if family == "mixtral" else "moe_intermediate_size": 128}
    model = eager_model(family, hidden_size=256, **narrow)
    model.save_pretrained(tmp_path / "source")
    convert_weights(tmp_path / "source", tmp_path / "made", "fp8_block")
    load = type(model).from_pretrained
    loaded = load(tmp_path / "made", dtype=torch.bfloat16, experts_implementation="eager")
    tensors = load_file(tmp_path / "source/model.safetensors")
    made = read_folder(tmp_path / "made")
    for name, tensor in tensors.items():
        if found := EXPERT.fullmatch(name):
            weights = decode(made, found[1], "fp8_block", *tensor.shape, 32).weights
            tensors[name] = torch.from_numpy(weights).bfloat16()
    save_file(tensors, tmp_path / "source/model.safetensors", {"format": "pt"})
    plain = load(tmp_path / "source", dtype=torch.bfloat16, experts_implementation="eager")
    with torch.no_grad():
        one, other, before = (each(tokens()).logits for each in (loaded, plain, model))
    assert same_bits(one, other) and not torch.equal(one, before)


@pytest.mark.parametrize(
    ("family", "weight_format"), [("qwen3_moe", "int4_group"), ("mixtral", "int8_row"), ("deepseek_v3", "fp8_block")]
)
def test_jitmoe_computes_with_what_it_wrote(family: str, weight_format: WrittenFormat, tmp_path: Path) -> None:
    """Experts in the new format, which hold the weights that the files decode to by an independent decoder."""
    eager_model(family).save_pretrained(tmp_path / "source")
    convert_weights(tmp_path / "source", tmp_path / "made", weight_format)
    made = read_folder(tmp_path / "made")
    tensors = load_file(tmp_path / "source/model.safetensors")
    for name, tensor in tensors.items():
        if found := EXPERT.fullmatch(name):
            weights = decode(made, found[1], weight_format, *tensor.shape, 32).weights
            tensors[name] = torch.from_numpy(weights).bfloat16()
    save_file(tensors, tmp_path / "source/model.safetensors", {"format": "pt"})
    ours, plain = (jitmoe.hf.from_pretrained(tmp_path / folder) for folder in ("made", "source"))
    assert f"packed {weight_format}" in jitmoe.hf.report(ours)
    with torch.no_grad():
        assert same_bits(*(model(tokens()).logits for model in (ours, plain)))


def test_families_have_the_names_of_transformers() -> None:
    """transformers stacks tensors of these names, gate before up."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping as mapping_of

    for kind, family in FAMILIES.items():
        if kind == "kimi_k2":  # remote code of DeepSeek's
            continue
        found = [
            [pattern.removeprefix("mlp").removeprefix(".experts.*.").removesuffix(".weight") for pattern in sources]
            for conversion in mapping_of(kind)
            if (sources := conversion._original_source_patterns)[0].endswith(".weight") and "experts" in sources[0]
        ]
        gate, up, down = family.leaves
        assert found == [[gate, up], [down]], kind
        assert (".block_sparse_moe." in str(mapping_of(kind)[0].source_patterns)) == (family is MIXTRAL), kind
    assert not any(mapping_of(kind) for kind in ("gpt_oss",)) and not set(FAMILIES) & set(STACKED_ONLY)


class TestKilled:
    """DST is whole or not there, and the next call makes it."""

    def test_at_any_step(self, saved: Saved, tmp_path: Path) -> None:
        source, made = saved("mixtral"), tmp_path / "made"
        convert_weights(source, tmp_path / "right", max_shard_size=50_000)
        expected = {path.name: path.read_bytes() for path in (tmp_path / "right").iterdir()}
        assert len(expected) > 6
        left = set()
        for step in itertools.chain(range(0, 60, 12), range(60, 10_000, 401)):
            killed = killed_at(
                step, lambda: convert_weights(source, made, max_shard_size=50_000), ("/files.py", "/write.py")
            )
            if made.exists():
                assert {path.name: path.read_bytes() for path in made.iterdir()} == expected
                shutil.rmtree(made)
            left |= {path.name for path in tmp_path.iterdir()}
            if not killed:
                break
        assert not killed and ".made.part" in left
        killed_at(700, lambda: convert_weights(source, made, max_shard_size=50_000), ("/files.py", "/write.py"))
        assert list((tmp_path / ".made.part").iterdir()) and not made.exists()
        convert_weights(source, made, max_shard_size=50_000)
        assert {path.name: path.read_bytes() for path in made.iterdir()} == expected
        assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "right"]

    def test_an_error_in_the_middle_leaves_nothing(self, copied: Saved, tmp_path: Path) -> None:
        source = copied("mixtral")
        spoil(source, "model.layers.1.block_sparse_moe.experts.6.w3.weight", lambda tensor: tensor.fill_(torch.nan))
        with pytest.raises(CheckpointError):
            convert_weights(source, tmp_path / "made")
        assert [path.name for path in tmp_path.iterdir()] == ["source"]


class TestDestination:
    @pytest.mark.parametrize("kind", ["folder", "file", "link to nothing"])
    def test_what_exists_is_left_alone(self, kind: str, saved: Saved, tmp_path: Path) -> None:
        made = tmp_path / "made"
        {"folder": made.mkdir, "file": made.touch, "link to nothing": lambda: made.symlink_to("nothing")}[kind]()
        with pytest.raises(CheckpointWriteError, match=r"made.* exists"):
            convert_weights(saved("mixtral"), made)
        assert [path.name for path in tmp_path.iterdir()] == ["made"]

    def test_what_appears_meanwhile_is_left_alone(self, tmp_path: Path) -> None:
        made = tmp_path / "made"
        with pytest.raises(FileExistsError, match="made"), making_folder(made):
            made.mkdir()
        assert list(tmp_path.rglob("*")) == [made]

    def test_inside_the_source(self, copied: Saved) -> None:
        source = copied("mixtral")
        with pytest.raises(CheckpointWriteError, match="lies in the checkpoint"):
            convert_weights(source, source / "int8")

    def test_no_room(self, saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10_000))
        with pytest.raises(CheckpointWriteError, match=r"will have \d+ kB, and .* has 10 kB left"):
            convert_weights(saved("mixtral"), tmp_path / "made")
        assert not list(tmp_path.iterdir())

    def test_a_place_that_cannot_be_written(self, saved: Saved, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(CheckpointWriteError, match="cannot be written"):
            convert_weights(saved("mixtral"), tmp_path / "file" / "made")


def spoil(source: Path, name: str, change: Callable[[torch.Tensor], object], other: str | None = None) -> None:
    """Change a tensor of a checkpoint, and its name, or remove it where ``change`` returns None."""
    file = source / "model.safetensors"
    tensors = load_file(file)
    changed = change(tensors.pop(name))
    save_file(tensors | ({other or name: changed} if isinstance(changed, torch.Tensor) else {}), file, {"format": "pt"})


def configure(source: Path, **fields: Any) -> None:
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


W2 = "model.layers.1.block_sparse_moe.experts.4.w2.weight"


def with_infinity(tensor: torch.Tensor) -> torch.Tensor:
    tensor[63, 5] = -torch.inf
    return tensor


REFUSALS: dict[str, tuple[Callable[[Path], object], str]] = {
    "infinity": (lambda p: spoil(p, W2, with_infinity), rf"{re.escape(W2)}\[63, 5\] is -inf"),
    "no projection": (lambda p: spoil(p, W2, lambda _: None), r"expert 4 of .*layers\.1.* has no down_proj"),
    "shape": (lambda p: spoil(p, W2, lambda t: t.T.contiguous()), r"experts\.4\.w2 is \[64, 128\], and \[128, 64\]"),
    "vector": (lambda p: spoil(p, W2, lambda t: t.flatten()), "2 dimensions"),
    "dtype": (lambda p: spoil(p, W2, lambda t: t.to(torch.int8)), r"w2\.weight is I8, .*BF16"),
    "more experts": (lambda p: configure(p, num_local_experts=8), "expert 7 of .* has no gate_proj"),
    "fewer experts": (lambda p: configure(p, num_local_experts=6), "an expert 6, and config.json says .* 6"),
    "quantised": (lambda p: configure(p, quantization_config={"quant_method": "fp8"}), "are quantised"),
    "quantised tensors": (
        lambda p: spoil(p, "lm_head.weight", lambda t: t, "lm_head.weight_scale"),
        r"are quantised: there is a lm_head\.weight_scale",
    ),
    "unknown family": (lambda p: configure(p, model_type="llama"), "model_type 'llama' .* known: .*mixtral"),
    "nested config": (lambda p: (p / "config.json").write_text("[" * 100_000), "cannot be read"),
    "stacked family": (lambda p: configure(p, model_type="gpt_oss"), "experts of gpt_oss are shipped stacked"),
    "other names": (lambda p: configure(p, model_type="qwen3_moe"), r"has no experts: .* like model\.layers\.0\.mlp"),
    "damaged": (lambda p: os.truncate(p / "model.safetensors", 5000), "cannot be read"),
    "no config": (lambda p: (p / "config.json").unlink(), r"config\.json cannot be read"),
    "no safetensors": (
        lambda p: (p / "model.safetensors").rename(p / "pytorch_model.bin"),
        r"neither model\.safetensors nor .*it has pytorch_model\.bin",
    ),
    "index": (
        lambda p: (
            (p / "model.safetensors").rename(p / "a.safetensors"),
            (p / "model.safetensors.index.json").write_text('{"weight_map": {"lost": "a.safetensors"}}'),
        ),
        "says that lost is in a.safetensors, and it is not",
    ),
    "twice": (
        lambda p: (
            shutil.copy(p / "model.safetensors", p / "b.safetensors"),
            (p / "model.safetensors").rename(p / "a.safetensors"),
            (p / "model.safetensors.index.json").write_text(
                '{"weight_map": {"lm_head.weight": "a.safetensors", "model.norm.weight": "b.safetensors"}}'
            ),
        ),
        r"is in .*a\.safetensors and in .*b\.safetensors",
    ),
    "dangling link": (lambda p: (p / "tokenizer.json").symlink_to("nowhere"), "tokenizer.json is no regular file"),
    "no folder": (shutil.rmtree, "is no folder"),
}  # fmt: skip


class TestRefused:
    @pytest.mark.parametrize("reason", REFUSALS)
    def test_by_name(self, reason: str, copied: Saved, tmp_path: Path) -> None:
        source = copied("mixtral")
        change, message = REFUSALS[reason]
        change(source)
        with pytest.raises(CheckpointError, match=message):
            convert_weights(source, tmp_path / "made")
        assert not (tmp_path / "made").exists() and not list(tmp_path.glob(".made*"))

    def test_a_stacked_weight_without_a_code(self, saved: Saved, tmp_path: Path) -> None:
        state = {name: tensor.contiguous() for name, tensor in eager_model("qwen3_moe").state_dict().items()}
        name = "model.layers.1.mlp.experts.gate_up_proj"
        state[name][5, 30, 45] = torch.nan
        save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
        config_of("qwen3_moe").save_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match=re.escape(f"{name}[5, 30, 45] is nan")):
            convert_weights(tmp_path, tmp_path.parent / "made")

    def test_stacked_and_single(self, copied: Saved, tmp_path: Path) -> None:
        file = copied("qwen3_moe") / "model.safetensors"
        name = "model.layers.0.mlp.experts.down_proj"
        save_file(load_file(file) | {name: torch.ones(7, 150, 140).bfloat16()}, file, {"format": "pt"})
        with pytest.raises(CheckpointError, match=r"experts\.\d\.down_proj twice"):
            convert_weights(file.parent, tmp_path / "made")

    @pytest.mark.parametrize(
        "wrong",
        [{"weight_format": "int3"}, {"group_size": 48}, {"max_shard_size": 0}],
        ids=lambda wrong: next(iter(wrong)),
    )
    def test_wrong_arguments(self, wrong: dict[str, Any], saved: Saved, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=str(next(iter(wrong.values())))):
            convert_weights(saved("mixtral"), tmp_path / "made", **wrong)


class TestCommand:
    def test_a_conversion(self, saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ["convert-weights", str(saved("qwen3_moe")), str(tmp_path / "made"), "--format", "fp8_block"]
        assert main(arguments) == 0
        out, err = capsys.readouterr()
        assert out.startswith("42 matrices of experts to fp8_block: ") and "NOTE: RAGGED SIZES: 140, 150" in out
        assert "gate_proj  " in out and "worst matrix" in out and "jitmoe: tensor" in err
        check(read_folder(saved("qwen3_moe")), read_folder(tmp_path / "made"), "fp8_block")
        assert main(arguments) == 1
        assert "exists" in capsys.readouterr().err

    def test_no_format(self, tmp_path: Path) -> None:
        assert main(["convert-weights", str(tmp_path), str(tmp_path / "made")]) == 2

    def test_the_public_name(self) -> None:
        assert jitmoe.hf.convert_weights is convert_weights


MEMORY = r"""
import re, sys
from pathlib import Path
from jitmoe.hf.quantizing.convert import convert_weights
def peak():
    # getrusage has the peak of the process that started this one, too.
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
before = peak()
convert_weights(*sys.argv[1:])
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("weight_format", FORMATS)
def test_memory_is_that_of_a_part_of_a_tensor(weight_format: WrittenFormat, tmp_path: Path) -> None:
    """A stacked tensor of 268 MB, matrices of 67 MB, an embedding of 268 MB: 200 MB hold none of them as float32."""
    experts, out, in_ = 2, 8192, 4096
    source = tmp_path / "source"
    config_of("qwen3_moe", num_experts=experts).save_pretrained(source)
    block = "model.layers.0.mlp.experts."
    tensors = {
        f"{block}gate_up_proj": torch.ones(experts, 2 * out, in_).bfloat16(),
        f"{block}down_proj": torch.ones(experts, in_, out).bfloat16(),
        "model.embed_tokens.weight": torch.ones(32768, in_).bfloat16(),
    }
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    command = [sys.executable, "-c", MEMORY, str(source), str(tmp_path / "made"), weight_format]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert int(done.stdout) < 200e6
