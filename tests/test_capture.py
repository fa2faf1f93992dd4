"""Capture, replay and check: a file holds the whole call, and what is computed again from it is judged."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import build_kernels, case_named, changed_by, config_of, layer_of, same_bits, usable_isas
from torch import Tensor
from yardstick import Inputs, Results, make_inputs, results_of_layer

from jitmoe import MoEConfig, MoELayer
from jitmoe.bench.ceilings import Ceilings
from jitmoe.cli import main
from jitmoe.errors import CaptureError, ConfigError
from jitmoe.experts import functional
from jitmoe.experts.observer import Launch
from jitmoe.inspect.capture import MOST_FILES
from jitmoe.inspect.recording import read_recording
from jitmoe.inspect.replay import compare
from jitmoe.jit.kernels import Kernels
from jitmoe.oracle.reference import LoraTensors

ISA = usable_isas()[0]
MEDIUM = replace(case_named("medium"), hidden=64, intermediate=96, rank=8)
"""As many slots as a sound verdict takes, in the kernel of the smaller cases."""
IDLE = case_named("idle_experts")
BASES = ("gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module", autouse=True)
def kernels_are_built() -> None:
    build_kernels([MEDIUM, IDLE], [ISA])


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def captured(inputs: Inputs, path: Path, **options: Any) -> tuple[dict[str, Any], Results]:
    """The file of one call with backward, and its results."""
    layer = layer_of(inputs, ISA, **options)
    layer.capture(path)
    results = results_of_layer(layer, inputs)
    return load(path), results


class TestNextCall:
    def test_the_file_has_everything(self, tmp_path: Path) -> None:
        inputs = make_inputs(IDLE)
        content, results = captured(inputs, tmp_path / "call.pt")
        assert content["config"] == dataclasses.asdict(config_of(IDLE, ISA)) and content["isa"] == ISA
        assert content["versions"].keys() >= {"jitmoe", "torch", "python", "cpu"}
        chosen = inputs.topk_ids.unique()
        assert 0 < chosen.numel() < IDLE.experts and torch.equal(content["experts"], chosen)
        for name in BASES:
            assert same_bits(content[name], getattr(inputs, name)[chosen])
        for name, value in inputs.lora._asdict().items():
            assert same_bits(content[name], value[chosen])
            assert same_bits(content[f"{name}_grad"], results[name][chosen])
        for name, value in {"x": inputs.x, "topk_ids": inputs.topk_ids, "weights": inputs.weights}.items():
            assert same_bits(content[name], value)
        assert same_bits(content["grad"], inputs.dout) and same_bits(content["out"], results["out"])
        assert same_bits(content["x_grad"], results["x"]) and same_bits(content["weights_grad"], results["weights"])

    def test_it_changes_no_result(self, tmp_path: Path) -> None:
        inputs = make_inputs(MEDIUM)
        plain = results_of_layer(layer_of(inputs, ISA), inputs)
        results = captured(inputs, tmp_path / "call.pt")[1]
        assert all(same_bits(results[name], plain[name]) for name in plain)

    def test_without_backward(self, tmp_path: Path) -> None:
        inputs = make_inputs(IDLE)
        layer = layer_of(inputs, ISA)
        layer.capture(tmp_path / "call.pt")
        with torch.no_grad():
            out = layer(inputs.x, inputs.topk_ids, inputs.weights)
        content = load(tmp_path / "call.pt")
        assert same_bits(content["out"], out)
        assert not [name for name in content if name.endswith("grad")]

    def test_only_the_next_one(self, tmp_path: Path) -> None:
        inputs = make_inputs(IDLE)
        layer = layer_of(inputs, ISA)
        layer.capture(tmp_path / "call.pt")
        first = results_of_layer(layer, inputs)
        results_of_layer(layer, replace(inputs, x=inputs.x * 2))
        assert same_bits(load(tmp_path / "call.pt")["x_grad"], first["x"])
        assert [path.name for path in tmp_path.iterdir()] == ["call.pt"]

    def test_what_users_change_in_place_afterwards_is_not_in_it(self, tmp_path: Path) -> None:
        inputs = make_inputs(IDLE)
        layer = layer_of(inputs, ISA)
        expected = results_of_layer(layer, inputs)["out"]
        layer.capture(tmp_path / "call.pt")
        ids = inputs.topk_ids.clone()
        out = layer(inputs.x, ids, inputs.weights)
        out += 1
        ids.zero_()
        out.backward(inputs.dout)
        content = load(tmp_path / "call.pt")
        assert same_bits(content["out"], expected) and same_bits(content["topk_ids"], inputs.topk_ids)
        assert "gate_lora_a_grad" in content and "x_grad" not in content

    def test_leading_dimensions_and_float32(self, tmp_path: Path) -> None:
        inputs = make_inputs(IDLE)
        layer = layer_of(inputs, ISA)
        layer.capture(tmp_path / "call.pt")
        x, ids, weights = (t.reshape(5, 6, -1) for t in (inputs.x.float(), inputs.topk_ids.int(), inputs.weights))
        layer(x, ids, weights)
        content = load(tmp_path / "call.pt")
        assert content["x"].shape == (30, IDLE.hidden) and content["x"].dtype == torch.float32
        assert content["topk_ids"].shape == (30, IDLE.top_k)

    @pytest.mark.parametrize("where", ["none/call.pt", "folder"])
    def test_a_path_that_cannot_be_written_is_refused_at_once(self, tmp_path: Path, where: str) -> None:
        (tmp_path / "folder").mkdir()
        layer = layer_of(make_inputs(IDLE), ISA)
        with pytest.raises(CaptureError, match=where):
            layer.capture(tmp_path / where)

    def test_an_unknown_mode_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="on_nonfinite"):
            layer_of(make_inputs(IDLE), ISA).capture(tmp_path / "call.pt", when="always")


def poisoned(inputs: Inputs, name: str) -> Inputs:
    tensor = getattr(inputs, name).clone()
    tensor[3, 0] = torch.nan
    return replace(inputs, **{name: tensor})


class TestOnNonfinite:
    def test_a_clean_call_leaves_no_file(self, tmp_path: Path) -> None:
        inputs = make_inputs(IDLE)
        layer = layer_of(inputs, ISA)
        layer.capture(tmp_path / "call.pt", when="on_nonfinite")
        results_of_layer(layer, inputs)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("where", ["x", "dout", "weights"])
    def test_every_bad_call_is_a_file_with_its_gradients(self, tmp_path: Path, where: str) -> None:
        inputs = make_inputs(IDLE)
        layer = layer_of(inputs, ISA)
        layer.capture(tmp_path / "call.pt", when="on_nonfinite")
        results_of_layer(layer, inputs)
        for _ in range(2):
            results = results_of_layer(layer, poisoned(inputs, where))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["call-2.pt", "call.pt"]
        for path in tmp_path.iterdir():
            content = load(path)
            assert content["out"].isfinite().all() == (where == "dout")
            assert same_bits(content["x_grad"], results["x"])

    def test_without_backward(self, tmp_path: Path) -> None:
        inputs = poisoned(make_inputs(IDLE), "x")
        layer = layer_of(inputs, ISA)
        layer.capture(tmp_path / "call.pt", when="on_nonfinite")
        with torch.no_grad():
            layer(inputs.x, inputs.topk_ids, inputs.weights)
        assert "grad" not in load(tmp_path / "call.pt")

    def test_it_does_not_fill_the_disk(self, tmp_path: Path) -> None:
        inputs = poisoned(make_inputs(IDLE), "x")
        layer = layer_of(inputs, ISA)
        layer.capture(tmp_path / "call.pt", when="on_nonfinite")
        for _ in range(MOST_FILES + 2):
            results_of_layer(layer, inputs)
        assert len(list(tmp_path.iterdir())) == MOST_FILES


@pytest.fixture
def run(capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: object) -> tuple[int, str, str]:
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def rows_of(out: str) -> dict[str, list[str]]:
    """The words of each result's line."""
    lines = [line.split() for line in out.splitlines() if line]
    return {words[0].removesuffix(".grad"): words for words in lines if words[0] in TITLES}


RESULTS = ("out", "x", "weights", *LoraTensors._fields)
TITLES = ("out", *(f"{name}.grad" for name in RESULTS[1:]))


class TestReplay:
    def test_a_capture_is_computed_again(self, tmp_path: Path, run) -> None:
        captured(make_inputs(MEDIUM), tmp_path / "call.pt")
        status, out, _ = run("replay", tmp_path / "call.pt")
        rows = rows_of(out)
        assert status == 0 and tuple(rows) == RESULTS
        for words in rows.values():
            assert words[1:4] == ["0", "0", "0"] and words[-1] == "ok" and float(words[4]) > 0
        assert f"recorded on {ISA}, computed again on {ISA}: the same bits" in out
        assert out.endswith("\nwithin the error rule\n")

    @pytest.mark.parametrize("case", [replace(IDLE, tokens=100), case_named("skipped_slots")], ids=str)
    def test_experts_find_their_places(self, tmp_path: Path, case) -> None:
        """Idle experts are not in the file, and skipped slots stay skipped."""
        captured(make_inputs(case), tmp_path / "call.pt")
        recording = read_recording(tmp_path / "call.pt")
        inputs = recording.inputs
        layer = MoELayer(replace(recording.config, isa=ISA), *(getattr(inputs, name) for name in BASES))
        assert compare(layer, inputs).faults == []
        again = results_of_layer(layer, inputs)
        assert [name for name in recording.results if not same_bits(recording.results[name], again[name])] == []

    def test_lora_values_beyond_bfloat16(self, tmp_path: Path, run) -> None:
        """The bits are those of the recorded values; the verdict is on values that bfloat16 has."""
        inputs = make_inputs(MEDIUM)
        inputs = replace(inputs, lora=LoraTensors(*(tensor * 1.001 for tensor in inputs.lora)))
        captured(inputs, tmp_path / "call.pt")
        status, out, _ = run("replay", tmp_path / "call.pt")
        assert status == 0 and "the same bits" in out

    def test_a_planted_nan_is_counted(self, tmp_path: Path, run) -> None:
        inputs = poisoned(make_inputs(MEDIUM), "x")
        captured(inputs, tmp_path / "call.pt")
        status, out, _ = run("replay", tmp_path / "call.pt")
        rows = rows_of(out)
        assert status == 0, "the NaN is the input's, not the layer's"
        assert rows["out"][1:4] == rows["x"][1:4] == [str(MEDIUM.hidden)] * 3
        assert int(rows["gate_lora_a"][3]) > 0
        assert out.splitlines()[-1].endswith("--trace says where the first one comes from")
        assert "--trace" not in run("replay", tmp_path / "call.pt", "--trace")[1]

    def test_a_wrong_layer_fails(self, tmp_path: Path, run) -> None:
        captured(make_inputs(MEDIUM), tmp_path / "call.pt")
        with changed_by(break_scale):
            status, out, _ = run("replay", tmp_path / "call.pt")
        assert status == 1 and "outside the error rule: out," in out and "other bits in out" in out

    @pytest.mark.parametrize("kind", ["missing", "directory", "text", "pickle", "another dict", "half a capture"])
    def test_what_is_no_recording_is_a_message(self, tmp_path: Path, run, kind: str) -> None:
        path = tmp_path / "call.pt"
        if kind == "directory":
            path.mkdir()
        elif kind == "text":
            path.write_text("call")
        elif kind == "pickle":
            torch.save({"format": print}, path)
        elif kind == "another dict":
            torch.save({"a": 1}, path)
        elif kind == "half a capture":
            content = captured(make_inputs(IDLE), path)[0]
            del content["up_proj"]
            torch.save(content, path)
        status, _, err = run("replay", path)
        assert status == 1 and err.startswith(f"jitmoe: {path}") and "Traceback" not in err

    @pytest.mark.parametrize("left", [0, 1, 1000, -1])
    def test_a_truncated_file(self, tmp_path: Path, run, left: int) -> None:
        path = tmp_path / "call.pt"
        captured(make_inputs(IDLE), path)
        path.write_bytes(path.read_bytes()[:left])
        status, out, err = run("replay", path)
        assert status == 1 and out == "" and err.startswith(f"jitmoe: {path} is damaged, or no file of ")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"format": "jitmoe capture 2"}, "has the format 'jitmoe capture 2', this jitmoe reads 'jitmoe capture 1'"),
            ({"gate_lora_a": None}, "gate_lora_a is a NoneType, expected a tensor"),
            ({"up_lora_b": torch.zeros(2, 3)}, r"up_lora_b has the shape \[2, 3\], expected \["),
            ({"grad": torch.zeros(3, 5)}, r"grad has the shape \[3, 5\], expected \["),
            (dict.fromkeys(LoraTensors._fields), "its config has lora_rank 8, and it holds no LoRA"),
            ({"x": torch.zeros(())}, "is no recording"),
            ({"x": torch.zeros(0, 5)}, "the call has no tokens"),
            ({"experts": torch.tensor([999])}, "is no recording"),
        ],
        ids=lambda value: "" if isinstance(value, str) else "-".join(value)[:20],
    )
    def test_a_capture_that_contradicts_itself(self, tmp_path: Path, change: dict[str, Any], message: str) -> None:
        path = tmp_path / "call.pt"
        content = captured(make_inputs(IDLE), path)[0]
        torch.save(content | change, path)
        with pytest.raises(CaptureError, match=message):
            read_recording(path)


def with_nan(inputs: Inputs, name: str, place: tuple[int, ...]) -> Inputs:
    """``inputs`` with a NaN at ``place`` of one tensor, those of LoRA included."""
    tensors = inputs.lora._asdict() if name in LoraTensors._fields else {name: getattr(inputs, name)}
    tensors[name] = tensors[name].clone()
    tensors[name][place] = torch.nan
    return replace(inputs, **({"lora": LoraTensors(**tensors)} if name in LoraTensors._fields else tensors))


def first_slot(inputs: Inputs, expert: int) -> str:
    """Token and slot of the expert's first row, as a report says them."""
    token, slot = (inputs.topk_ids == expert).nonzero()[0].tolist()
    return f"token {token}, slot {slot},"


class TestReplayTrace:
    """One command names a planted NaN. Those in scratch and padding are in no file: test_trace.py finds them."""

    def test_a_clean_call(self, tmp_path: Path, run) -> None:
        captured(make_inputs(MEDIUM), tmp_path / "call.pt")
        status, out, _ = run("replay", tmp_path / "call.pt", "--trace")
        assert status == 0 and "\nEvery step is finite.\n" in out and tuple(rows_of(out)) == RESULTS
        steps = [line.split()[2:5] for line in out.splitlines() if line.startswith("0 ")]
        assert ["forward", "x", "all"] in steps and ["forward", "out", "all"] in steps
        assert "backward  x.grad" in out and "The file numbers" not in out
        _, without, _ = run("replay", tmp_path / "call.pt")
        assert "Every step" not in without

    def test_in_x(self, tmp_path: Path, run) -> None:
        inputs = with_nan(make_inputs(MEDIUM), "x", (3, 17))
        captured(inputs, tmp_path / "call.pt")
        status, out, _ = run("replay", tmp_path / "call.pt", "--trace")
        expert = int(inputs.topk_ids[3].min())
        slot = inputs.topk_ids[3].tolist().index(expert)
        finding = next(line for line in out.splitlines() if line.startswith("layer 0, call 0 (forward): "))
        assert status == 0 and f": x of expert {expert} has " in finding
        assert f"token 3, slot {slot}," in finding and "column 17" in finding
        assert finding.endswith("it came with the call")

    @pytest.mark.parametrize(
        ("name", "place", "step"),
        [
            ("gate_proj", (5, 7, 30), "gate"),
            ("down_proj", (5, 7, 30), "down"),
            ("gate_lora_b", (5, 7, 3), "gate"),
            ("down_lora_b", (5, 7, 3), "down"),
        ],
    )
    def test_in_a_weight(self, tmp_path: Path, run, name: str, place: tuple[int, ...], step: str) -> None:
        inputs = with_nan(make_inputs(MEDIUM), name, place)
        captured(inputs, tmp_path / "call.pt")
        status, out, _ = run("replay", tmp_path / "call.pt", "--trace")
        finding = next(line for line in out.splitlines() if line.startswith("layer 0, call 0 (forward): "))
        assert status == 0 and f": {step} of expert 5 has " in finding and first_slot(inputs, 5) in finding
        assert f"{name}[5, 7, {place[2]}] " in finding and finding.endswith("is not finite")

    def test_in_a_weight_of_the_logs_format(self, tmp_path: Path, run) -> None:
        inputs = with_nan(make_inputs(MEDIUM), "up_proj", (2, 7, 30))
        torch.save(logs_format(inputs, 4.0), tmp_path / "log.pt")
        status, out, _ = run("replay", tmp_path / "log.pt", "--isa", ISA, "--trace")
        finding = next(line for line in out.splitlines() if line.startswith("layer 0, call 0 (forward): "))
        assert status == 0 and ": up of expert 2 has " in finding and first_slot(inputs, 2) in finding
        assert "up_proj[2, 7, 30] " in finding

    def test_a_value_that_bfloat16_lacks_is_not_rounded_away(self, tmp_path: Path, run) -> None:
        """The trace sees the recorded values; the comparison's are rounded."""
        inputs = make_inputs(MEDIUM)
        lora = inputs.lora._replace(gate_lora_a=inputs.lora.gate_lora_a * 1.001)
        captured(replace(inputs, lora=lora), tmp_path / "call.pt")
        out = run("replay", tmp_path / "call.pt", "--trace")[1]
        line = next(line.split() for line in out.splitlines() if " gate_lora_a before " in line)
        assert line[-2] == f"{lora.gate_lora_a.max().item():.4g}"

    def test_what_on_nonfinite_wrote(self, tmp_path: Path, run) -> None:
        """The whole way: training goes wrong, the layer writes the call, one command names the weight.

        The call's experts are some of the layer's: the file numbers them anew, and the report says what they were.
        """
        inputs = make_inputs(IDLE)
        inputs = replace(inputs, topk_ids=torch.where(inputs.topk_ids == 0, 7, inputs.topk_ids))
        bad = with_nan(inputs, "up_proj", (7, 5, 9))
        layer = layer_of(bad, ISA)
        layer.capture(tmp_path / "call.pt", when="on_nonfinite")
        results_of_layer(layer, bad)
        chosen = inputs.topk_ids.unique().tolist()
        assert 0 not in chosen and [path.name for path in tmp_path.iterdir()] == ["call.pt"]
        status, out, _ = run("replay", tmp_path / "call.pt", "--trace")
        place = chosen.index(7)
        finding = next(line for line in out.splitlines() if line.startswith("layer 0, call 0 (forward): "))
        assert status == 0 and f": up of expert {place} has " in finding and f"up_proj[{place}, 5, 9] " in finding
        assert first_slot(inputs, 7) in finding
        assert f"\nExpert {place} of the file is expert 7 of the recorded layer. The file numbers" in out
        assert f"they are {', '.join(map(str, chosen))}.\n{finding}\n" in out

    def test_a_heat_map(self, tmp_path: Path, run) -> None:
        pytest.importorskip("matplotlib")
        captured(with_nan(make_inputs(MEDIUM), "x", (3, 17)), tmp_path / "call.pt")
        status, _, _ = run("replay", tmp_path / "call.pt", "--trace", "--plot", tmp_path / "map.png")
        assert status == 0 and (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")

    @pytest.mark.parametrize(
        ("options", "message"),
        [(["--plot", "map.png"], "give both"), (["--trace", "--plot", "/nowhere/map.png"], "cannot be written")],
    )
    def test_a_picture_that_cannot_be(self, tmp_path: Path, run, options: list[str], message: str) -> None:
        status, out, err = run("replay", tmp_path / "call.pt", *options)
        assert status == 1 and message in err and out == ""


def break_scale(launch: Launch) -> None:
    """Compute with a LoRA scale that is 10 % too large; the oracle keeps the right one."""
    launch.record["scale"] *= 1.1


def flip_weights(launch: Launch) -> None:
    """Give the routing weight of each slot to the opposite slot of its token."""
    by_slot = np.empty_like(launch.row_weight)
    by_slot[launch.route.row_slot] = launch.row_weight
    launch.row_weight[:] = by_slot.reshape(-1, launch.top_k)[:, ::-1].reshape(-1)[launch.route.row_slot]


def logs_format(inputs: Inputs, alpha: float | None) -> dict[str, Any]:
    case = inputs.case
    lora = {name: tensor.bfloat16() for name, tensor in inputs.lora._asdict().items()} if inputs.lora else {}
    content: dict[str, Any] = {
        "layer_idx": 3,
        "expert_num": case.experts,
        "hidden_size": case.hidden,
        "intermediate_size": case.intermediate,
        "num_experts_per_tok": case.top_k,
        "input_data": inputs.x,
        "expert_ids": inputs.topk_ids,
        "weights": inputs.weights,
        **{name: getattr(inputs, name) for name in BASES},
        **lora,
    }
    return content if alpha is None else {**content, "lora_alpha": alpha}


class TestTheLogsFormat:
    @pytest.mark.parametrize("alpha", [None, 4.0])
    def test_it_is_computed(self, tmp_path: Path, run, alpha: float | None) -> None:
        inputs = make_inputs(MEDIUM)
        torch.save(logs_format(inputs, alpha), tmp_path / "log.pt")
        recording = read_recording(tmp_path / "log.pt")
        expected = alpha or MoEConfig.lora_alpha
        assert recording.config.lora_alpha == expected and recording.inputs.scale == expected / MEDIUM.rank
        assert recording.config.lora_dtype == "bfloat16" and recording.config.lora_rank == MEDIUM.rank
        status, out, _ = run("replay", tmp_path / "log.pt", "--isa", ISA)
        assert status == 0 and all(words[1:4] == ["0", "0", "0"] for words in rows_of(out).values())
        assert ("does not say lora_alpha" in out) == (alpha is None)

    def test_alpha_can_be_given(self, tmp_path: Path) -> None:
        torch.save(logs_format(make_inputs(MEDIUM), None), tmp_path / "log.pt")
        assert read_recording(tmp_path / "log.pt", 5.0).config.lora_alpha == 5.0

    def test_without_lora(self, tmp_path: Path) -> None:
        torch.save(logs_format(make_inputs(case_named("no_lora")), None), tmp_path / "log.pt")
        recording = read_recording(tmp_path / "log.pt")
        assert recording.config.lora_rank == 0 and recording.inputs.lora is None

    @pytest.mark.parametrize("name", sorted(logs_format(make_inputs(MEDIUM), None)))
    def test_a_missing_key_is_named(self, tmp_path: Path, name: str) -> None:
        content = logs_format(make_inputs(MEDIUM), None)
        del content[name]
        torch.save(content, tmp_path / "log.pt")
        message = "holds no call" if name == "expert_num" else f"lacks '{name}'"
        with pytest.raises(CaptureError, match=message):
            read_recording(tmp_path / "log.pt")


SIZES = {
    "num_experts": MEDIUM.experts,
    "hidden_size": MEDIUM.hidden,
    "intermediate_size": MEDIUM.intermediate,
    "top_k": MEDIUM.top_k,
    "lora_rank": MEDIUM.rank,
    "isa": ISA,
}


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(SIZES))
    return tmp_path / "config.json"


class TestCheck:
    def test_accuracy(self, run, config_file: Path) -> None:
        status, out, _ = run("check", "--config", config_file, "--tokens", 128)
        assert status == 0 and out.endswith("within the error rule\n")
        fresh, trained = out.split("LoRA B not zero")
        assert "LoRA B zero" in fresh
        for part in (fresh, trained):
            rows = rows_of(part)
            assert tuple(rows) == RESULTS and all(words[1:4] == ["0", "0", "0"] for words in rows.values())
        assert rows_of(fresh)["up_lora_a"][4] == "0" and float(rows_of(trained)["up_lora_a"][4]) > 0

    def test_accuracy_of_a_wrong_layer(self, run, config_file: Path) -> None:
        with changed_by(break_scale):
            status, out, _ = run("check", "--config", config_file, "--tokens", 128)
        assert status == 1 and "outside the error rule: " in out
        assert "out (LoRA B not zero)" in out and "out (LoRA B zero)" not in out

    def test_debug(self, run, config_file: Path) -> None:
        status, out, _ = run("check", "--mode", "debug", "--config", config_file, "--tokens", 64)
        assert status == 0
        lines = out.splitlines()[1:]
        assert lines[:-1] == [f"expert {e}: 11 steps ok" for e in range(MEDIUM.experts)]
        assert lines[-1] == "all experts together: 9 steps ok"

    def test_debug_names_expert_and_step(self, run, config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A wrong weight of up in expert 5: the gate is right still, the experts before it too."""
        pack = functional.pack_parts

        def wrong(kernels: Kernels, name: str, source: Tensor, *rest: Any) -> None:
            if name == "up_proj":
                source = source.clone()
                source[5, :, 7] *= 4
            pack(kernels, name, source, *rest)

        monkeypatch.setattr(functional, "pack_parts", wrong)
        status, out, _ = run("check", "--mode", "debug", "--config", config_file, "--tokens", 64)
        assert status == 1
        assert "expert 4: 11 steps ok\nexpert 5: the first step that deviates is up\n" in out

    def test_debug_finds_a_fault_between_experts(self, run, config_file: Path) -> None:
        """Each expert alone is right; the routing weights of a call with several go to the wrong rows."""
        with changed_by(flip_weights):
            status, out, _ = run("check", "--mode", "debug", "--config", config_file, "--tokens", 64)
        assert status == 1 and "all experts together: the first step that deviates is out" in out

    def test_real_data(self, run, tmp_path: Path) -> None:
        captured(make_inputs(MEDIUM), tmp_path / "call.pt")
        status, out, _ = run("check", "--mode", "real_data", "--data", tmp_path / "call.pt")
        assert status == 0 and "the same bits" in out

    def test_perf(self, run, config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Ceilings.__init__, "__defaults__", (1 << 20, 1000))
        status, out, _ = run("check", "--mode", "perf", "--config", config_file, "--tokens", 8)
        assert status == 0 and "roofline" in out and f"jitmoe {ISA}" in out

    @pytest.mark.parametrize("tokens", [0, -1])
    def test_a_call_without_tokens_is_refused(self, run, config_file: Path, tokens: int) -> None:
        status, _, err = run("check", "--config", config_file, "--tokens", tokens)
        assert status == 1 and "tokens must be at least 1" in err

    @pytest.mark.parametrize("options", [["--mode", "real_data"], ["--data", "call.pt"]])
    def test_data_and_real_data_go_together(self, run, options: list[str]) -> None:
        status, _, err = run("check", *options)
        assert status == 1 and "--data FILE" in err

    @pytest.mark.slow
    def test_the_case_of_the_log(self, run) -> None:
        """E=64, H=2048, I=1408, K=6, r=8, alpha 16, 48 tokens; LoRA B zero and not."""
        status, out, _ = run("check")
        assert status == 0 and "48 tokens" in out and "hidden_size=2048" in out
        for part in out.split("LoRA B not zero"):
            assert [words[3] for words in rows_of(part).values()] == ["0"] * len(RESULTS)
