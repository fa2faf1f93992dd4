"""Packed weights in a file: same bits, one copy for all processes, and a clear error for what is no such file."""

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import (
    build_kernels,
    case_named,
    config_of,
    different,
    killed_at,
    layer_of,
    run_python,
    same_bits,
    set_lora,
    usable_isas,
)
from yardstick import Inputs, check, make_inputs, results_of_layer

from jitmoe import MoELayer
from jitmoe.errors import PackedFileError, WeightsChangedError
from jitmoe.experts import packed_file
from jitmoe.files import replacing
from jitmoe.plan.shapes import PACKED_LAYOUT

ISA = usable_isas()[0]
RAGGED = case_named("ragged_65")


@pytest.fixture(scope="module", autouse=True)
def kernels_are_built() -> None:
    build_kernels([RAGGED], [ISA])


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return make_inputs(RAGGED)


@pytest.fixture
def saved(inputs: Inputs, tmp_path: Path) -> Path:
    layer_of(inputs, ISA).save_packed(tmp_path / "layer.packed")
    return tmp_path / "layer.packed"


def mapped(inputs: Inputs, path: Path, **options: bool) -> MoELayer:
    layer = MoELayer.from_packed(config_of(inputs.case, ISA), path, **options)
    set_lora(layer, inputs)
    return layer


def in_the_file(path: Path) -> bytes:
    return path.read_bytes()


class TestRoundTrip:
    @pytest.mark.filterwarnings("error")
    @pytest.mark.parametrize("verify", [True, False])
    def test_results_have_the_same_bits(self, inputs: Inputs, saved: Path, verify: bool) -> None:
        results = results_of_layer(mapped(inputs, saved, verify=verify), inputs)
        assert different(results, results_of_layer(layer_of(inputs, ISA), inputs)) == []
        check(results, inputs)

    def test_canonical_weights_come_back(self, inputs: Inputs, saved: Path) -> None:
        layer = mapped(inputs, saved)
        weights, state = layer.unpack(), layer.state_dict()
        for name in ("gate_proj", "up_proj", "down_proj"):
            assert same_bits(weights[name], getattr(inputs, name))
            assert same_bits(state[f"base_{name}"], getattr(inputs, name))

    def test_lora_is_new_and_loadable(self, inputs: Inputs, saved: Path) -> None:
        layer = MoELayer.from_packed(config_of(RAGGED, ISA), saved)
        assert not layer.up_lora_b.any() and layer.up_lora_a.any() and layer.up_lora_a.requires_grad
        adapter = {name: value for name, value in layer_of(inputs, ISA).state_dict().items() if "lora" in name}
        assert not layer.load_state_dict(adapter, strict=False).unexpected_keys
        assert different(results_of_layer(layer, inputs), results_of_layer(layer_of(inputs, ISA), inputs)) == []

    def test_a_mapped_layer_can_be_saved_over_its_own_file(self, inputs: Inputs, saved: Path) -> None:
        before, layer = in_the_file(saved), mapped(inputs, saved)
        layer.save_packed(saved)
        assert in_the_file(saved) == before
        assert same_bits(layer.unpack()["up_proj"], inputs.up_proj)

    def test_a_link_stays_a_link(self, inputs: Inputs, saved: Path, tmp_path: Path) -> None:
        link = tmp_path / "link"
        link.symlink_to(saved)
        other = make_inputs(replace(RAGGED, seed=7))
        layer_of(other, ISA).save_packed(link)
        assert link.is_symlink() and same_bits(mapped(inputs, saved).unpack()["up_proj"], other.up_proj)


class TestFrozen:
    def test_a_write_is_noticed_and_stays_out_of_the_file(self, inputs: Inputs, saved: Path) -> None:
        before, layer = in_the_file(saved), mapped(inputs, saved)
        layer.packed_up[0, 0] += 1
        with pytest.raises(WeightsChangedError, match="packed up weights"):
            layer(inputs.x, inputs.topk_ids, inputs.weights)
        with pytest.raises(WeightsChangedError, match="packed up weights"):
            layer.save_packed(saved)
        assert in_the_file(saved) == before

    def test_loading_a_base_makes_a_copy_of_our_own(self, inputs: Inputs, saved: Path) -> None:
        before, layer, twin = in_the_file(saved), mapped(inputs, saved), mapped(inputs, saved)
        other = make_inputs(replace(RAGGED, seed=7))
        layer.load_state_dict(layer_of(other, ISA).state_dict())
        assert different(results_of_layer(layer, other), results_of_layer(layer_of(other, ISA), other)) == []
        assert in_the_file(saved) == before and same_bits(twin.unpack()["gate_proj"], inputs.gate_proj)


def golden_file(path: Path) -> str:
    """SHA-256 of the file of a layer whose weights count from 0."""
    experts, hidden, intermediate = RAGGED.experts, RAGGED.hidden, RAGGED.intermediate
    counting = torch.arange(experts * hidden * intermediate, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    base = [counting.view(experts, *extent) for extent in [(intermediate, hidden)] * 2 + [(hidden, intermediate)]]
    MoELayer(config_of(RAGGED, ISA), *base).save_packed(path)
    return hashlib.sha256(in_the_file(path)).hexdigest()


GOLDEN = {1: "c71ce8da867a3f1dc290da9d2b8f8a8ab05fc908b50a191c4c9fcea0799ae5c2"}
"""Of each layout version: a file that differs must have another version, or old files would be read wrongly."""


def test_the_layout_has_not_changed_without_its_version(tmp_path: Path) -> None:
    assert golden_file(tmp_path / "counting") == GOLDEN[PACKED_LAYOUT], "raise PACKED_LAYOUT and add its digest here"


def flip(path: Path, offset: int) -> None:
    content = bytearray(in_the_file(path))
    content[offset] ^= 0x10
    path.write_bytes(content)


def places() -> dict[str, tuple[int, int]]:
    return packed_file._places(config_of(RAGGED, ISA))


class TestDamage:
    @pytest.mark.parametrize("offset", [0, 7, 8, 39, 40, 200, packed_file.HEADER_BYTES - 1])
    def test_a_flipped_bit_in_the_header_is_always_found(self, inputs: Inputs, saved: Path, offset: int) -> None:
        flip(saved, offset)
        with pytest.raises(PackedFileError, match=re.escape(str(saved))):
            mapped(inputs, saved, verify=False)

    @pytest.mark.parametrize("name", ["gate", "up", "down"])
    @pytest.mark.parametrize("at_end", [False, True])
    def test_a_flipped_bit_in_the_weights(self, inputs: Inputs, saved: Path, name: str, at_end: bool) -> None:
        offset, nbytes = places()[name]
        flip(saved, offset + (nbytes - 1 if at_end else 0))
        with pytest.raises(PackedFileError, match=f"damaged: the {name} weights"):
            mapped(inputs, saved)
        mapped(inputs, saved, verify=False)  # the price of not reading it

    @pytest.mark.parametrize("left", [0, 5, 39, 40, 4095, 4096, 1 << 21, -1])
    @pytest.mark.parametrize("verify", [True, False])
    def test_truncated(self, inputs: Inputs, saved: Path, left: int, verify: bool) -> None:
        os.truncate(saved, left if left >= 0 else saved.stat().st_size + left)
        with pytest.raises(PackedFileError, match=re.escape(str(saved))):
            mapped(inputs, saved, verify=verify)

    def test_too_long(self, inputs: Inputs, saved: Path) -> None:
        os.truncate(saved, saved.stat().st_size + 1)
        with pytest.raises(PackedFileError, match="damaged: it has"):
            mapped(inputs, saved, verify=False)

    def test_another_layout_version(self, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(packed_file, "PACKED_LAYOUT", PACKED_LAYOUT + 1)
        layer_of(inputs, ISA).save_packed(tmp_path / "new")
        monkeypatch.undo()
        with pytest.raises(PackedFileError, match=rf"version {PACKED_LAYOUT + 1} .* reads version {PACKED_LAYOUT}"):
            mapped(inputs, tmp_path / "new")

    @pytest.mark.parametrize("field", packed_file.SIZES)
    def test_other_sizes_are_named(self, inputs: Inputs, saved: Path, field: str) -> None:
        config = config_of(RAGGED, ISA)
        size = getattr(config, field)
        # One more changes no padded size of H or I: only the header can tell.
        with pytest.raises(PackedFileError, match=f"its {field} is {size}, the config's is {size + 1}$"):
            MoELayer.from_packed(replace(config, **{field: size + 1}), saved)

    @pytest.mark.parametrize("kind", ["missing", "directory", "pipe", "text", "empty", "link to itself"])
    def test_what_is_no_such_file(self, inputs: Inputs, tmp_path: Path, kind: str) -> None:
        path = tmp_path / "what"
        make: dict[str, Callable[[], object]] = {
            "missing": lambda: None,
            "directory": path.mkdir,
            "pipe": lambda: os.mkfifo(path),
            "text": lambda: path.write_text("weights " * 1000),
            "empty": path.touch,
            "link to itself": lambda: path.symlink_to(path),
        }
        make[kind]()
        with pytest.raises(PackedFileError, match=re.escape(str(path))) as caught:
            mapped(inputs, path)
        assert isinstance(caught.value, OSError)


class TestSaving:
    @pytest.mark.parametrize("kind", ["no folder", "directory", "no folder but a file", "read-only"])
    def test_a_target_that_cannot_be_written(self, inputs: Inputs, tmp_path: Path, kind: str) -> None:
        (tmp_path / "file").touch()
        (tmp_path / "folder").mkdir()
        targets = {
            "no folder": "none/layer",
            "directory": "folder",
            "no folder but a file": "file/layer",
            "read-only": "/proc/layer",
        }
        with pytest.raises(PackedFileError, match="cannot be written to"):
            layer_of(inputs, ISA).save_packed(tmp_path / targets[kind])
        assert sorted(os.listdir(tmp_path)) == ["file", "folder"] and not os.listdir(tmp_path / "folder")

    def test_a_full_disk_leaves_the_old_file(self, inputs: Inputs, saved: Path, monkeypatch) -> None:
        before = in_the_file(saved)

        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("jitmoe.files.os.fsync", full)
        with pytest.raises(PackedFileError, match="No space left"):
            layer_of(make_inputs(replace(RAGGED, seed=7)), ISA).save_packed(saved)
        assert in_the_file(saved) == before and os.listdir(saved.parent) == [saved.name]

    def test_one_writer_at_a_time(self, inputs: Inputs, saved: Path) -> None:
        before = in_the_file(saved)
        with replacing(saved) as stream:
            stream.write(before)
            with pytest.raises(PackedFileError, match="written by somebody else"):
                layer_of(inputs, ISA).save_packed(saved)
        assert in_the_file(saved) == before

    def test_killed_at_every_step_the_file_is_the_old_one_or_the_new_one(
        self, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(packed_file, "PAGE", 4096)  # a hundred files are written
        saved = tmp_path / "layer.packed"
        layer_of(inputs, ISA).save_packed(saved)
        old = in_the_file(saved)
        layer = layer_of(make_inputs(replace(RAGGED, seed=7)), ISA)
        layer.save_packed(saved)
        new = in_the_file(saved)
        seen = set()
        for step in range(100):
            saved.write_bytes(old)
            done = not killed_at(step, lambda: layer.save_packed(saved))
            found = in_the_file(saved)
            assert found in (old, new)
            seen.add((found == new, done))
            if done:
                break
            layer.save_packed(saved)
            assert in_the_file(saved) == new and os.listdir(saved.parent) == [saved.name], "what is left does no harm"
        assert seen == {(False, False), (True, False), (True, True)}, "killed before and after publishing, then not"


BIG = dict(num_experts=16, hidden_size=512, intermediate_size=512, top_k=1, lora_rank=0, isa=ISA)
BIG_BYTES = 3 * 16 * 512 * 512 * 2

READER = r"""
import re, sys, torch
from pathlib import Path
from jitmoe import MoEConfig, MoELayer

def kilobytes(text): return {name: int(number) for name, number in re.findall(r"(\w+):\s+(\d+) kB", text)}
def status(): return kilobytes(Path("/proc/self/status").read_text())

config = MoEConfig(**CONFIG)
one = torch.zeros(512, 512, dtype=torch.bfloat16)
x, ids = torch.ones(16, 512, dtype=torch.bfloat16), torch.arange(16)[:, None]
# The same call on a layer in anonymous memory first: what calls need once is not the layer's.
small = MoELayer(config, lambda e: one, lambda e: one, lambda e: one)
small(x, ids, torch.ones(16, 1))
del small
before = status()
layer = MoELayer.from_packed(config, PATH)
layer(x, ids, torch.ones(16, 1))
after = status()
def grown(name): return after[name] - before[name] << 10
sections = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
mine = [kilobytes(s) for s in sections if PATH in s.partition("\n")[0]]
def total(name): return sum(found[name] for found in mine) << 10
print(grown("RssAnon"), grown("RssFile"), total("Shared_Clean"), total("Private_Dirty"), total("Pss"))
"""


def test_processes_share_one_copy_and_none_of_it_is_anonymous(tmp_path: Path) -> None:
    from jitmoe import MoEConfig

    path = tmp_path / "layer.packed"
    config = MoEConfig(**BIG)
    source = [torch.full((512, 512), 0.01, dtype=torch.bfloat16)] * 16
    MoELayer(config, source, source, source).save_packed(path)
    here = MoELayer.from_packed(config, path)
    for tensor in (here.packed_gate, here.packed_up, here.packed_down):
        tensor.count_nonzero()  # touched, so that its pages are mapped in this process too
    program = READER.replace("CONFIG", repr(BIG)).replace("PATH", repr(str(path)))
    anonymous, file, shared, dirty, proportional = map(int, run_python(program).split())
    assert anonymous < 0.2 * BIG_BYTES
    assert file > 0.9 * BIG_BYTES and shared > 0.9 * BIG_BYTES
    assert dirty == 0 and proportional < 0.6 * BIG_BYTES, "half of each page is the other process's"
