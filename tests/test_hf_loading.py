"""Models loaded with experts that are packed as they are read: the same model, in no more memory than it has."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import EVERY_FAMILY, eager_model, experts_of, on_jitmoe, tokens
from helpers import same_bits
from safetensors.torch import load_file, save_file
from torch import Tensor

import jitmoe
from jitmoe.errors import CheckpointError, PackedFileError, UnsupportedExpertsError
from jitmoe.hf.weight import PackedWeight


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(tokens()).logits
    return found


def saved(family: str, folder: Path, **kwargs: Any) -> Any:
    model = eager_model(family)
    model.save_pretrained(folder, **kwargs)
    return model


def all_packed(model: Any) -> bool:
    weights = [getattr(m, name) for m in experts_of(model).values() for name in ("gate_up_proj", "down_proj")]
    return len(weights) == 4 and all(isinstance(weight, PackedWeight) for weight in weights)


@EVERY_FAMILY
@pytest.mark.parametrize("shards", ["5GB", "12KB"], ids=["one-file", "shards"])
def test_it_is_the_model_that_transformers_loads(family: str, shards: str, tmp_path: Path) -> None:
    eager = saved(family, tmp_path, max_shard_size=shards)
    model = jitmoe.hf.from_pretrained(tmp_path)
    assert type(model) is type(eager) and not model.training and all_packed(model)
    assert all(map(same_bits, (p.contiguous() for p in model.parameters()), eager.parameters()))
    assert same_bits(logits(model), logits(on_jitmoe(eager)))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_nothing_of_the_loading_stays_on_the_model(family: str, tmp_path: Path) -> None:
    saved(family, tmp_path / "a")
    model = jitmoe.hf.from_pretrained(tmp_path / "a")
    assert not getattr(model, "is_quantized", False) and not hasattr(model, "hf_quantizer")
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path / "b")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert first.keys() == second.keys() and all(same_bits(first[name], second[name]) for name in first)
    assert json.loads((tmp_path / "a/config.json").read_text()) == json.loads((tmp_path / "b/config.json").read_text())


def test_other_float_types_become_bfloat16(tmp_path: Path) -> None:
    eager = eager_model("qwen3_moe")
    eager.float().save_pretrained(tmp_path)
    model = jitmoe.hf.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16} and all_packed(model)
    eager.bfloat16()
    assert all(map(same_bits, (p.contiguous() for p in model.parameters()), eager.parameters()))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_packed_folder_is_written_once_and_mapped(family: str, tmp_path: Path) -> None:
    eager = saved(family, tmp_path / "model")
    folder = tmp_path / "packed"
    expected = logits(on_jitmoe(eager))
    assert same_bits(logits(jitmoe.hf.from_pretrained(tmp_path / "model", packed=folder)), expected)
    files = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(files) == 3 and "jitmoe.json" in files
    model = jitmoe.hf.from_pretrained(tmp_path / "model", packed=folder)
    assert same_bits(logits(model), expected) and all_packed(model)
    assert files == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    mapped = Path("/proc/self/maps").read_text()
    assert all(str(path) in mapped for path in folder.glob("*.packed"))


def test_a_folder_without_its_index_is_begun_anew(tmp_path: Path) -> None:
    eager = saved("qwen3_moe", tmp_path / "model")
    folder = tmp_path / "packed"
    jitmoe.hf.from_pretrained(tmp_path / "model", packed=folder)
    (folder / "jitmoe.json").unlink()  # as after a kill
    next(folder.glob("*.packed")).write_bytes(b"half")
    model = jitmoe.hf.from_pretrained(tmp_path / "model", packed=folder)
    assert same_bits(logits(model), logits(on_jitmoe(eager))) and (folder / "jitmoe.json").exists()


def test_a_folder_of_another_checkpoint_is_refused(tmp_path: Path) -> None:
    saved("qwen3_moe", tmp_path / "model")
    folder = tmp_path / "packed"
    jitmoe.hf.from_pretrained(tmp_path / "model", packed=folder)
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.experts.3.up_proj.weight"] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(PackedFileError, match="holds the packed experts of another checkpoint"):
        jitmoe.hf.from_pretrained(tmp_path / "model", packed=folder)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_damaged_packed_file_is_an_error(tmp_path: Path) -> None:
    saved("qwen3_moe", tmp_path / "model")
    folder = tmp_path / "packed"
    jitmoe.hf.from_pretrained(tmp_path / "model", packed=folder)
    path = next(folder.glob("*.packed"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(PackedFileError, match="damaged"):
        jitmoe.hf.from_pretrained(tmp_path / "model", packed=folder)


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    saved("qwen3_moe", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.experts.4.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers.1.mlp.experts.gate_up_proj is made of 7 .*checkpoint has 6"):
        jitmoe.hf.from_pretrained(tmp_path)


def test_a_missing_layer_is_named(tmp_path: Path) -> None:
    saved("qwen3_moe", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if "layers.1.mlp.experts" not in name}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers.1.mlp.experts.gate_up_proj, .* were not in the checkpoint"):
        jitmoe.hf.from_pretrained(tmp_path)


def test_a_matrix_of_another_shape_is_named(tmp_path: Path) -> None:
    saved("qwen3_moe", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.experts.4.down_proj.weight"
    tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(jitmoe.InputError, match=r"down_proj\[4\].*must have shape \[46, 27\], got \[46, 26\]"):
        jitmoe.hf.from_pretrained(tmp_path)


def test_models_that_are_not_understood_are_refused_before_reading(tmp_path: Path) -> None:
    saved("qwen3_moe", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["hidden_act"] = "gelu"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedExpertsError, match="GELU"):
        jitmoe.hf.from_pretrained(tmp_path, packed=tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_a_wrong_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere is no folder"):
        jitmoe.hf.from_pretrained(tmp_path / "nowhere")


def test_the_stock_call_packs_at_the_first_call(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    jitmoe.hf.register()
    eager = saved("qwen3_moe", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, experts_implementation="jitmoe")
    assert same_bits(logits(model), logits(on_jitmoe(eager))) and all_packed(model)


WITHOUT_TRANSFORMERS = """
import sys
sys.modules["transformers"] = None
import jitmoe
try:
    jitmoe.hf.register()
except ImportError as error:
    print(error)
"""


def test_without_transformers_it_says_what_to_install() -> None:
    said = subprocess.run([sys.executable, "-c", WITHOUT_TRANSFORMERS], capture_output=True, text=True, check=True)
    assert "pip install 'jitmoe[hf]'" in said.stdout
