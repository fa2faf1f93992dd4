"""Bytes drawn at random for everything that reads what others wrote: a named error or a right reading, nothing else.

``make fuzz`` draws for long.
"""

import ctypes
import json
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import adapter_of
from helpers import build_kernels, case_named, layer_of, same_bits, usable_isas
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from test_back_end import compile_text
from yardstick import make_inputs

from jitmoe import MoELayer, safetensors_source
from jitmoe.config import MoEConfig
from jitmoe.errors import AdapterError, CaptureError, CheckpointError, JitmoeError
from jitmoe.hf.adapters.choices import Choices
from jitmoe.hf.adapters.convert import read_adapter
from jitmoe.hf.adapters.files import write
from jitmoe.hf.adapters.formats import FORMATS
from jitmoe.hf.train.rows import read_rows
from jitmoe.inspect.recording import read_recording
from jitmoe.memory.model import read_model

ISA = usable_isas()[0]
SMALL = case_named("small")
MODEL = {
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [0],
    "text_config": None,
    "layer_types": ["full_attention"] * 4,
}


@cache
def _layer() -> MoELayer:
    build_kernels([SMALL], [ISA])
    return layer_of(make_inputs(SMALL), ISA)


def make_packed(folder: Path) -> Path:
    _layer().save_packed(folder / "layer.packed")
    return folder / "layer.packed"


def read_packed(path: Path) -> None:
    """Weights are checked where they are verified; what comes through is right."""
    found = MoELayer.from_packed(_layer().config, path).unpack()
    assert all(same_bits(found[name], tensor) for name, tensor in _layer().unpack().items())


def make_capture(folder: Path) -> Path:
    inputs, path = make_inputs(SMALL), folder / "call.pt"
    _layer().capture(path)
    _layer()(inputs.x, inputs.topk_ids, inputs.weights).backward(inputs.dout)
    return path


def make_config(folder: Path) -> Path:
    (folder / "config.json").write_text(json.dumps(MODEL))
    return folder / "config.json"


def make_checkpoint(folder: Path) -> Path:
    save_file({f"experts.{e}.up": torch.randn(6, 4) for e in range(3)}, folder / "model.safetensors")
    return folder / "model.safetensors"


def read_checkpoint(path: Path) -> None:
    read = safetensors_source(path, "experts.{expert}.up")
    MoELayer(MoEConfig(3, 4, 6, 1, isa="ref"), read, read, lambda _: torch.zeros(4, 6, dtype=torch.bfloat16))


def make_index(folder: Path) -> Path:
    index = {"weight_map": {f"experts.{e}.up": "model.safetensors" for e in range(3)}}
    make_checkpoint(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder / "model.safetensors.index.json"


def make_rows(folder: Path) -> Path:
    (folder / "rows.jsonl").write_text(
        '{"text": "one"}\n{"prompt": "two", "completion": "three"}\n{"messages": [{"role": "user", "content": "x"}]}\n'
    )
    return folder / "rows.jsonl"


def adapter_in(layout: str, file: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        write(folder / "source", FORMATS[layout].write(adapter_of(), Choices()), force=True)
        return folder / "source" / file

    return make


def read_adapter_around(path: Path) -> None:
    read_adapter(path if path.name == "source" else path.parent)


READERS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Any]]] = {
    "packed": (make_packed, read_packed),
    "capture": (make_capture, read_recording),
    "config": (make_config, lambda path: MoEConfig(**read_model(path).fields)),
    "checkpoint": (make_checkpoint, read_checkpoint),
    "index of shards": (make_index, read_checkpoint),
    "rows": (make_rows, read_rows),
    "adapter of PEFT": (adapter_in("peft-fused", "adapter_model.safetensors"), read_adapter_around),
    "config of PEFT": (adapter_in("peft-fused", "adapter_config.json"), read_adapter_around),
    "adapter of experts": (adapter_in("peft-per-expert", "adapter_model.safetensors"), read_adapter_around),
    "adapter of the ancestor": (adapter_in("ancestor", "fused_expert_lora.safetensors"), read_adapter_around),
    "adapter of jitmoe": (adapter_in("jitmoe", ""), read_adapter_around),
}
"""What makes a good file, and what reads it."""


@cache
def _root() -> tempfile.TemporaryDirectory[str]:
    """Removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="jitmoe-fuzz-")


def _folder(name: str) -> Path:
    folder = Path(_root().name) / name
    folder.mkdir()
    return folder


@cache
def good(name: str) -> tuple[Path, bytes]:
    """A file of this kind in a directory of its own, and its bytes."""
    path = READERS[name][0](_folder(name))
    return path, path.read_bytes()


PLACES = st.one_of(st.integers(0, 400), st.integers(0, 1 << 20))
"""Headers lie at the beginning."""

CHANGES = st.one_of(
    st.tuples(st.just("set"), PLACES, st.binary(min_size=1, max_size=8)),
    st.tuples(st.just("insert"), PLACES, st.binary(min_size=1, max_size=40)),
    st.tuples(st.just("remove"), PLACES, st.integers(1, 60)),
    st.tuples(st.just("repeat"), PLACES, st.integers(1, 60)),
    st.tuples(st.just("end"), PLACES, st.none()),
    st.tuples(
        st.just("text"), PLACES, st.sampled_from([b"null", b"-1", b"1e999", b"[[[[", b'{"a":', b"\xff", b"\\ud800"])
    ),
)


def changed(content: bytes, changes: list[tuple[str, int, Any]]) -> bytes:
    found = bytearray(content)
    for kind, place, what in changes:
        at = place % (len(found) + 1)
        if kind in ("set", "text"):
            found[at : at + len(what)] = what
        elif kind == "insert":
            found[at:at] = what
        elif kind == "remove":
            del found[at : at + what]
        elif kind == "repeat":
            found[at:at] = found[at : at + what]
        else:
            del found[at:]
    return bytes(found)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def read_or_refused(name: str, content: bytes) -> None:
    """Any error but ours, and any output of one, is the fault."""
    path, whole = good(name)
    path.write_bytes(content)
    try:
        READERS[name][1](path)
    except JitmoeError as error:
        assert str(error)
    finally:
        path.write_bytes(whole)


EITHER = settings(deadline=None, suppress_health_check=list(HealthCheck), database=None)
SHORT = settings(EITHER, max_examples=40, derandomize=True)


@pytest.mark.field("T")
@pytest.mark.parametrize("name", READERS)
def test_changed_bytes(name: str) -> None:
    @settings(SHORT)
    @given(changes=st.lists(CHANGES, min_size=1, max_size=4))
    def changes_are_refused(changes: list[tuple[str, int, Any]]) -> None:
        read_or_refused(name, changed(good(name)[1], changes))

    changes_are_refused()


@pytest.mark.field("T")
@pytest.mark.parametrize("name", READERS)
def test_any_bytes(name: str) -> None:
    @settings(SHORT, max_examples=20)
    @given(content=st.binary(max_size=300) | JSON.map(lambda value: json.dumps(value).encode()))
    def bytes_are_refused(content: bytes) -> None:
        read_or_refused(name, content)

    bytes_are_refused()


@pytest.mark.field("T")
@pytest.mark.parametrize(
    ("name", "content"),
    [
        pytest.param("checkpoint", b"", id="an empty checkpoint"),
        pytest.param("checkpoint", (2).to_bytes(8, "little") + b"{}", id="a checkpoint without tensors"),
        pytest.param("index of shards", b'{"weight_map": {"experts.0.up": "gone"}}', id="a shard that is not there"),
        pytest.param("index of shards", b'{"weight_map": {"experts.0.up": "."}}', id="a shard that is a folder"),
        pytest.param(
            "index of shards", b'{"weight_map": {"experts.0.up": "\\ud800"}}', id="a shard whose name is no text"
        ),
    ],
)
def test_found_before(name: str, content: bytes) -> None:
    """Each was once another error than ours."""
    with pytest.raises(CheckpointError, match="cannot be read from"):
        path, whole = good(name)
        path.write_bytes(content)
        try:
            READERS[name][1](path)
        finally:
            path.write_bytes(whole)


@pytest.mark.field("T")
@pytest.mark.parametrize("text", ["{-", "nullx", "[1]", '{"0": 7}', "[" * 100_000])
@pytest.mark.parametrize(("name", "field"), [("adapter of the ancestor", "prefixes"), ("adapter of jitmoe", "config")])
def test_found_before_in_metadata(name: str, field: str, text: str) -> None:
    path, whole = good(name)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata() | {field: text}
    try:
        save_file(tensors, path, metadata)
        if (field, text) == ("config", '{"0": 7}'):  # a config may have any fields
            READERS[name][1](path)
            return
        with pytest.raises(AdapterError, match=f"{field} in its metadata"):
            READERS[name][1](path)
    finally:
        path.write_bytes(whole)


class Hostile:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("whole", [True, False], ids=["a pickle", "in a whole capture"])
def test_a_capture_runs_no_code(tmp_path: Path, whole: bool) -> None:
    hostile = Hostile(tmp_path / "ran")
    content = hostile if whole else torch.load(good("capture")[0], weights_only=True) | {"lora_alpha": hostile}
    torch.save(content, tmp_path / "call.pt")
    with pytest.raises(CaptureError):
        read_recording(tmp_path / "call.pt")
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "call.pt", weights_only=False)
    assert (tmp_path / "ran").exists(), "it would have run"


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", READERS)
def test_many_changed_bytes(name: str, request: pytest.FixtureRequest) -> None:
    @settings(EITHER, max_examples=10 * request.config.getoption("--examples"))
    @given(changes=st.lists(CHANGES, min_size=1, max_size=6))
    def changes_are_refused(changes: list[tuple[str, int, Any]]) -> None:
        read_or_refused(name, changed(good(name)[1], changes))

    changes_are_refused()


@cache
def _decoder() -> ctypes.CDLL:
    source = (Path(__file__).parent / "emulator_fuzz.cpp").read_text(encoding="utf-8")
    return ctypes.CDLL(str(compile_text(source, "ref", _folder("decoder"))))


@pytest.mark.field("T")
@pytest.mark.parametrize("seed", range(3))
def test_the_decoder_of_the_emulator(seed: int) -> None:
    """A text that it reads beyond ends the process; registers that do not exist are never decoded."""
    fuzz = _decoder().fuzz
    fuzz.argtypes, fuzz.restype = [ctypes.c_uint64, ctypes.c_int64], ctypes.c_int64
    assert fuzz(seed, 300_000) > 1000, "too few were instructions at all, or one was decoded wrongly"
