"""Seen from inside: what each step of a call held, and what brought the first value that is not finite."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import EVERY_ISA, case_named, changed_by, config_of, copied, different, layer_of, usable_isas
from mutation import Mutant, broken_templates
from test_faults_values import NAN_BITS, poison_padding
from torch import Tensor
from yardstick import Case, Inputs, make_inputs, results_of_layer

import jitmoe
from jitmoe import MoELayer
from jitmoe.errors import TraceError
from jitmoe.experts import workspace
from jitmoe.experts.observer import Launch
from jitmoe.experts.supplies import supplied, supplies
from jitmoe.inspect import tracing
from jitmoe.inspect.records import PADDING, PARAMETER, SCRATCH, STEP, Record
from jitmoe.inspect.trace_cause import AXES, STEPS
from jitmoe.inspect.trace_picture import heat_map
from jitmoe.inspect.trace_report import Finding, Report
from jitmoe.jit import kernels, render
from jitmoe.jit.build import build_instances
from jitmoe.plan.shapes import Shape, plan_kernels

RAGGED = case_named("ragged_65")
NO_LORA = case_named("no_lora")
NAN, INF = float("nan"), float("inf")
BEST = usable_isas()[0]
EXPERT = 2


def traced_shape(case: Case, isa: str) -> Shape:
    """The kernel that a traced call takes: the cases have more than a few rows for each expert."""
    return replace(plan_kernels(config_of(case, isa), isa).shapes[-1], watch="values")


@pytest.fixture(scope="module", autouse=True)
def kernels_are_built() -> None:
    shapes = [traced_shape(NO_LORA, BEST), *(traced_shape(RAGGED, isa) for isa in usable_isas())]
    build_instances([render.render(shape) for shape in shapes])


@pytest.fixture
def inputs() -> Inputs:
    return make_inputs(RAGGED)


def traced(layer: MoELayer, inputs: Inputs) -> Report:
    with jitmoe.trace() as report:
        results_of_layer(layer, inputs)
    return report


def found(report: Report) -> Finding:
    first = report.first()
    assert first, report.table()
    return first


def records_of(report: Report, kind: str) -> list[Record]:
    return [record for call in report.calls for record in call.records if record.kind == kind]


def first_slot(inputs: Inputs, expert: int) -> tuple[int, int]:
    """Token and slot of the expert's first row."""
    return tuple((inputs.topk_ids == expert).nonzero()[0].tolist())


def poison_scratch() -> None:
    for arena in workspace.arenas.free():
        arena[: arena.size // 2 * 2].view(np.uint16)[:] = NAN_BITS


Steps = dict[tuple[str, int | None], np.ndarray]


def model_of(inputs: Inputs) -> Steps:
    """Every step's tensor of every expert, by name and expert, in float64; rows in ascending order of their slots."""
    assert inputs.lora
    steps: Steps = {}
    scale, lora = inputs.case.scale, inputs.lora
    for expert in range(inputs.case.experts):
        token, slot = (inputs.topk_ids == expert).nonzero(as_tuple=True)
        gate_a, gate_b, up_a, up_b, down_a, down_b = (part[expert].double() for part in lora)
        gate_w, up_w, down_w = (part[expert].double() for part in (inputs.gate_proj, inputs.up_proj, inputs.down_proj))
        x, dout = inputs.x[token].double(), inputs.dout[token].double()
        weights = inputs.weights[token, slot].double()[:, None]
        gate_u, up_u = scale * x @ gate_a.T, scale * x @ up_a.T
        gate, up = x @ gate_w.T + gate_u @ gate_b.T, x @ up_w.T + up_u @ up_b.T
        sigmoid = gate.sigmoid()
        act = gate * sigmoid * up
        down_u = scale * act @ down_a.T
        down_du = scale * dout @ down_b
        dact = dout @ down_w + down_du @ down_a
        dgate = weights * dact * up * sigmoid * (1 + gate * (1 - sigmoid))
        dup = weights * dact * gate * sigmoid
        gate_du, up_du = scale * dgate @ gate_b, scale * dup @ up_b
        own = {
            "x": x, "weights": weights, "gate u": gate_u, "gate": gate, "up u": up_u, "up": up, "act": act,
            "down u": down_u, "down": act @ down_w.T + down_u @ down_b.T, "dout": dout, "x again": x,
            "gate u again": gate_u, "gate again": gate, "up u again": up_u, "up again": up, "act again": act,
            "down u again": down_u, "down du": down_du, "dact": dact, "dgate": dgate, "dup": dup, "gate du": gate_du,
            "up du": up_du, "dx": dgate @ gate_w + gate_du @ gate_a + dup @ up_w + up_du @ up_a,
            "gate_lora_a.grad": gate_du.T @ x, "gate_lora_b.grad": dgate.T @ gate_u,
            "up_lora_a.grad": up_du.T @ x, "up_lora_b.grad": dup.T @ up_u,
            "down_lora_a.grad": (weights * down_du).T @ act, "down_lora_b.grad": (weights * dout).T @ down_u,
        }  # fmt: skip
        steps |= {(name, expert): value.numpy() for name, value in own.items()}
    return steps


@EVERY_ISA
@pytest.mark.parametrize("recompute", [False, True])
def test_every_step_of_every_expert_is_what_it_should_be(isa: str, recompute: bool, inputs: Inputs) -> None:
    # Up twice as large as gate, so that no two steps look alike.
    assert inputs.lora
    lora = inputs.lora._replace(up_lora_a=2 * inputs.lora.up_lora_a)
    inputs = replace(inputs, up_proj=2 * inputs.up_proj, lora=lora)
    inputs.x[5, :7] = 0
    layer = layer_of(inputs, isa, recompute=recompute)
    plain = copied(results_of_layer(layer, inputs))
    with jitmoe.trace() as report:
        seen = copied(results_of_layer(layer, inputs))
    assert different(seen, plain) == []
    assert [call.pass_name for call in report.calls] == ["forward", "backward"]

    expected = model_of(inputs)
    for name, result in (("out", "out"), ("x.grad", "x"), ("dweights", "weights")):
        expected[name, None] = plain[result].double().numpy()
    records = {(record.name, record.expert): record for record in records_of(report, STEP)}
    assert records.keys() == expected.keys()
    for place, values in expected.items():
        record = records[place]
        assert (record.rows, record.size) == (values.shape[0], values.size), place
        assert record.bad == 0 and record.first is None, place
        exact = place[0] in ("x", "x again", "dout", "weights", "out", "x.grad", "dweights")
        if exact:
            assert record.zero == (values == 0).sum(), place
        # A step is some roundings to bfloat16 (2^-9 each) away from the model.
        tolerance = 1e-12 if exact else 2.0**-6
        largest = np.abs(values).max()
        for value, should in ((record.minimum, values.min()), (record.maximum, values.max())):
            assert value == pytest.approx(should, rel=0, abs=tolerance * largest), place
        assert record.absmean == pytest.approx(np.abs(values).mean(), rel=tolerance), place
    assert report.first() is None


def test_weights_are_scanned_as_they_lie_in_memory(inputs: Inputs) -> None:
    report = traced(layer_of(inputs, BEST), inputs)
    assert inputs.lora
    tensors = {name: getattr(inputs, name) for name in ("gate_proj", "up_proj", "down_proj")} | inputs.lora._asdict()
    records = [record for record in report.calls[0].records if record.kind == PARAMETER]
    assert len(records) == len(tensors) * RAGGED.experts
    for record in records:
        values = tensors[record.name][record.expert].double()
        assert (record.rows, record.size, record.bad) == (values.shape[0], values.numel(), 0)
        assert (record.minimum, record.maximum) == (values.min(), values.max())
        assert record.absmean == pytest.approx(values.abs().mean().item(), rel=1e-12)


def parameter_of(layer: MoELayer, inputs: Inputs, name: str, place: tuple[int, int, int], value: float) -> MoELayer:
    """The layer with ``value`` at ``place`` of a base weight or LoRA parameter."""
    if name.endswith("proj"):
        tensor = getattr(inputs, name).clone()
        tensor[place] = value
        return layer_of(replace(inputs, **{name: tensor}), BEST)
    with torch.no_grad():
        layer.get_parameter(name)[place] = value
    return layer


def call_layer(layer: MoELayer, inputs: Inputs) -> Tensor:
    """Forward alone, without writing the parameters, as ``results_of_layer`` does."""
    return layer(inputs.x.clone().requires_grad_(), inputs.topk_ids, inputs.weights)


IN_FORWARD = {
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down",
    "gate_lora_a": "gate u", "gate_lora_b": "gate", "up_lora_a": "up u", "up_lora_b": "up",
    "down_lora_a": "down u", "down_lora_b": "down",
}  # fmt: skip
"""The step that reads a parameter first; its columns are the rows of the parameter."""

IN_BACKWARD = {
    "gate_proj": ("gate again", 0), "up_proj": ("up again", 0), "down_proj": ("dact", 1),
    "gate_lora_a": ("gate u again", 0), "gate_lora_b": ("gate again", 0), "up_lora_a": ("up u again", 0),
    "up_lora_b": ("up again", 0), "down_lora_a": ("down u again", 0), "down_lora_b": ("down du", 1),
}  # fmt: skip
"""The same for a report that sees backward alone, and which axis of the parameter the step's columns are."""


@pytest.mark.parametrize("value", [NAN, -INF])
@pytest.mark.parametrize("name", IN_FORWARD)
def test_a_weight_is_named(name: str, value: float, inputs: Inputs) -> None:
    layer = parameter_of(layer_of(inputs, BEST), inputs, name, (EXPERT, 7, 30), value)
    with jitmoe.trace() as report:
        call_layer(layer, inputs).sum().backward()
    first = found(report)
    token, slot = first_slot(inputs, EXPERT)
    assert (first.cause, first.pass_name, first.step, first.expert) == ("weights", "forward", IN_FORWARD[name], EXPERT)
    assert (first.token, first.slot, first.column) == (token, slot, 7)
    assert f"{name}[{EXPERT}, 7, 30]" in first.sentence
    assert [r.expert for r in report.calls[0].records if r.kind == PARAMETER and r.bad] == [EXPERT]


@pytest.mark.parametrize("name", IN_BACKWARD)
def test_a_weight_is_named_by_backward_alone(name: str, inputs: Inputs) -> None:
    layer = parameter_of(layer_of(inputs, BEST), inputs, name, (EXPERT, 7, 30), NAN)
    out = call_layer(layer, inputs)
    with jitmoe.trace() as report:
        out.sum().backward()
    step, axis = IN_BACKWARD[name]
    first = found(report)
    assert (first.cause, first.pass_name, first.step, first.expert) == ("weights", "backward", step, EXPERT)
    assert first.column == (7, 30)[axis]
    assert f"{name}[{EXPERT}, 7, 30]" in first.sentence


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize(("tensor", "step", "pass_name"), [("x", "x", "forward"), ("dout", "dout", "backward")])
def test_an_input_is_named(tensor: str, step: str, pass_name: str, value: float, inputs: Inputs) -> None:
    getattr(inputs, tensor)[3, 17] = value
    getattr(inputs, tensor)[3, 19] = value
    report = traced(layer_of(inputs, BEST), inputs)
    first = found(report)
    expert = int(inputs.topk_ids[3].min())
    slot = inputs.topk_ids[3].tolist().index(expert)
    assert (first.cause, first.pass_name, first.step, first.expert) == ("input", pass_name, step, expert)
    assert (first.token, first.slot, first.column) == (3, slot, 17)
    counts = [(r.nan, r.inf) for r in records_of(report, STEP) if r.name == step and r.bad]
    assert counts == [(2, 0) if math.isnan(value) else (0, 2)] * RAGGED.top_k


def test_a_routing_weight_is_named(inputs: Inputs) -> None:
    inputs.weights[4, 1] = NAN
    first = found(traced(layer_of(inputs, BEST), inputs))
    assert (first.cause, first.step, first.token, first.slot) == ("input", "weights", 4, 1)
    assert first.expert == inputs.topk_ids[4, 1]


def test_large_numbers_overflow(inputs: Inputs) -> None:
    inputs.x[3] = 3e38
    first = found(traced(layer_of(inputs, BEST), inputs))
    assert (first.cause, first.step, first.token) == ("overflow", "gate u", 3)
    assert "x reaches 3e+38" in first.sentence


def test_what_forward_saved_is_an_input_where_x_is_not_read() -> None:
    inputs = make_inputs(NO_LORA)
    inputs.x[3, 17] = NAN
    layer = layer_of(inputs, BEST)
    out = call_layer(layer, inputs)
    with jitmoe.trace() as report:
        out.sum().backward()
    first = found(report)
    assert (first.cause, first.step, first.token) == ("input", "gate again", 3)
    assert "forward saved" in first.sentence


@pytest.mark.parametrize("recompute", [False, True])
def test_stale_scratch_is_shown_and_touches_nothing(recompute: bool, inputs: Inputs) -> None:
    """Padded rows of the panels included: they are scratch."""
    layer = layer_of(inputs, BEST, recompute=recompute)
    with jitmoe.trace():
        plain = copied(results_of_layer(layer, inputs))
    poison_scratch()
    with jitmoe.trace() as report:
        assert different(results_of_layer(layer, inputs), plain) == []
    assert report.first() is None
    held = [record for record in report.calls[0].records if record.kind == SCRATCH]
    assert {"x_panel", "act_panel", "thread_strips", "sums"} <= {record.name for record in held}
    assert all(record.nan == record.size for record in held)
    headline, before = report.table().splitlines()[:2]
    assert headline == "Every step is finite."
    assert before.startswith("Not finite before a call, and read by no step: ") and "scratch x_panel," in before
    assert "x_panel scratch before" in report.table()


def test_one_value_in_scratch_is_named(inputs: Inputs) -> None:
    """The last value of each buffer in turn; that of a panel is in a padded row."""
    layer = layer_of(inputs, BEST)
    workspace.arenas.release()  # several may be left of calls that were under way at once, and any may be taken
    normal, plans = supplies().plan_forward, []
    with (
        supplied(plan_forward=lambda *sizes: plans.append(normal(*sizes)) or plans[-1]),
        jitmoe.trace(),
        torch.no_grad(),
    ):
        plain = call_layer(layer, inputs).clone()
    last_rows = int((inputs.topk_ids == RAGGED.experts - 1).sum())
    assert last_rows % traced_shape(RAGGED, BEST).m_step, "or no row of the last block is padded"
    (arena,) = workspace.arenas.free()
    for item in plans[0].placed:
        *lead, columns = item.buffer.shape
        size = {"float32": 4, "bfloat16": 2}[item.buffer.dtype]
        end = item.offset + math.prod(lead) * columns * size
        arena[:] = 0
        arena[end - size : end] = np.frombuffer(np.float32(NAN).tobytes(), np.uint8)[-size:]
        with jitmoe.trace() as report, torch.no_grad():
            assert torch.equal(call_layer(layer, inputs), plain)
        assert report.first() is None
        record = next(r for r in records_of(report, SCRATCH) if r.name == item.buffer.name)
        position = (record.first.row, record.first.column)
        assert (record.bad, position) == (1, (math.prod(lead) - 1, columns - 1)), item.buffer.name
        before = report.table().splitlines()[1]
        assert before.startswith("Not finite before a call, and read by no step: ")
        assert f"scratch {item.buffer.name}" in before
        assert f"{item.buffer.name} scratch before" in report.table()


def test_padding_of_weights_is_shown_and_touches_nothing(inputs: Inputs) -> None:
    layer = layer_of(inputs, BEST)
    plain = copied(results_of_layer(layer, inputs))
    poison_padding(layer)
    with jitmoe.trace() as report:
        assert different(results_of_layer(layer, inputs), plain) == []
    assert report.first() is None
    padding = [record for record in report.calls[0].records if record.kind == PADDING]
    assert {record.name for record in padding if record.bad} == {"gate_proj", "up_proj", "down_proj"}
    for name, out, in_ in (("gate_proj", 47, 65), ("down_proj", 65, 47)):
        whole = -(-out // 32) * 32 * -(-in_ // 32) * 32
        assert sum(r.nan for r in padding if (r.name, r.expert) == (name, 0)) == whole - out * in_
    assert (padding[0].first.row, padding[0].first.column) == (0, 65)
    assert not any(record.bad for record in records_of(report, PARAMETER))
    before = report.table().splitlines()[1]
    assert all(f"padding {name}" in before for name in ("gate_proj", "up_proj", "down_proj"))


def test_a_fault_of_the_kernel_is_named(inputs: Inputs) -> None:
    layer = layer_of(inputs, "ref")
    shown = "show(Tensor::act, segment, index, S.intermediate, gates);\n    put("
    nan = "if (segment.expert == 2 && index == 1) gates[3 * kStrip + 5] = 0.0f / 0.0f;\n    "
    with broken_templates(Mutant("nan_in_act", "templates/forward.hpp", shown, nan + shown)):
        first = found(traced(layer, inputs))
    assert (first.cause, first.pass_name, first.step, first.expert) == ("kernel", "forward", "act", EXPERT)
    rows = (inputs.topk_ids == EXPERT).nonzero()
    assert (first.token, first.slot, first.column) == (*rows[3].tolist(), 37)
    before = sum(int((inputs.topk_ids == expert).sum()) for expert in range(EXPERT))
    assert first.row == before + 3


def test_a_kernel_that_reads_stale_scratch_is_named(inputs: Inputs) -> None:
    layer = layer_of(inputs, "ref")
    with jitmoe.trace():
        results_of_layer(layer, inputs)
    cleared = "if (call.sums) clear_sums<S>(call, thread);"
    with broken_templates(Mutant("stale_sums", "templates/parallel.hpp", cleared, "")):
        poison_scratch()
        first = found(traced(layer, inputs))
    assert (first.cause, first.step, first.expert) == ("kernel", "out", None)
    assert "scratch sums" in first.sentence


def test_only_a_traced_instance_calls_back(inputs: Inputs) -> None:
    """Another one does not look where it would report to."""

    def point_nowhere(launch: Launch) -> None:
        launch.record["observe"] = launch.record["census"] = 1

    layer = layer_of(inputs, BEST)
    plain = copied(results_of_layer(layer, inputs))
    with changed_by(point_nowhere):
        assert different(results_of_layer(layer, inputs), plain) == []


def test_calls_and_layers_are_told_apart(inputs: Inputs) -> None:
    one, other = layer_of(inputs, BEST), layer_of(inputs, BEST)
    with jitmoe.trace() as report:
        with jitmoe.trace() as inner:
            call_layer(one, inputs)
        out = call_layer(other, inputs)
        call_layer(one, inputs)
        out.sum().backward()
    call_layer(one, inputs)
    assert [(call.number, call.layer, call.pass_name) for call in report.calls] == [
        (0, 0, "forward"), (1, 1, "forward"), (2, 0, "forward"), (3, 1, "backward"),
    ]  # fmt: skip
    assert [call.layer for call in inner.calls] == [0]
    assert all(call.kernel.endswith("_values") for call in report.calls)


def test_a_finding_says_which_layer_and_call(inputs: Inputs) -> None:
    good = layer_of(inputs, BEST)
    bad = parameter_of(layer_of(inputs, BEST), inputs, "up_proj", (EXPERT, 7, 30), NAN)
    with jitmoe.trace() as report:
        call_layer(good, inputs)
        call_layer(bad, inputs)
    first = found(report)
    assert (first.layer, first.call) == (1, 1)
    assert str(first).startswith("layer 1, call 1 (forward): up of expert 2")
    assert str(first) in report.table()


def test_nothing_traced_is_not_called_finite() -> None:
    with jitmoe.trace() as report:
        pass
    assert report.first() is None and report.table().splitlines()[0] == "No call was traced."


@pytest.mark.parametrize("tokens", [0, 4])
def test_a_call_without_rows(tokens: int) -> None:
    inputs = make_inputs(RAGGED)
    layer = MoELayer(config_of(replace(RAGGED, routing="skipped_slots"), BEST), *(
        getattr(inputs, name) for name in ("gate_proj", "up_proj", "down_proj")
    ))  # fmt: skip
    x = torch.zeros(tokens, RAGGED.hidden, dtype=torch.bfloat16, requires_grad=True)
    ids, weights = torch.full((tokens, RAGGED.top_k), -1), torch.ones(tokens, RAGGED.top_k)
    with jitmoe.trace() as report:
        layer(x, ids, weights).sum().backward()
    assert report.first() is None
    assert {r.name for r in records_of(report, STEP)} <= {"out", "x.grad", "dweights"}
    assert report.table()


class TestReport:
    @pytest.fixture
    def report(self, inputs: Inputs) -> Report:
        inputs.x[3, 17] = NAN
        return traced(layer_of(inputs, BEST), inputs)

    def test_a_dict_that_json_takes(self, report: Report) -> None:
        taken = json.loads(json.dumps(report.to_dict(), allow_nan=False))
        first = report.first()
        assert first and taken["first"]["step"] == "x" and taken["first"]["sentence"] == first.sentence
        assert [call["pass_name"] for call in taken["calls"]] == ["forward", "backward"]
        x = next(r for r in taken["calls"][0]["records"] if r["name"] == "x" and r["nan"])
        assert x["first"] == {"token": 3, "slot": first.slot, "row": first.row, "column": 17}

    def test_a_table(self, report: Report) -> None:
        lines = report.table().splitlines()
        assert lines[0] == str(report.first())
        # All experts in one line, and a line for each of those that token 3 chose.
        assert sum(line.split()[2:4] == ["forward", "x"] for line in lines) == 1 + RAGGED.top_k
        full = [line.split()[2:4] for line in report.table(full=True).splitlines()]
        assert full.count(["forward", "gate"]) == 2 * RAGGED.experts, "gate and gate u of every expert"

    def test_a_heat_map(self, report: Report, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        path = tmp_path / "map.png"
        report.save_png(path)
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) > 10_000
        report.save_png(str(path), layer=0)
        assert path.read_bytes() == content
        with pytest.raises(TraceError, match="layer 7"):
            report.save_png(path, layer=7)

    def test_what_the_heat_map_shows(self, report: Report, inputs: Inputs) -> None:
        steps, names, means, bad = heat_map(records_of(report, STEP))
        assert names == ["0", "1", "2", "3", "4", "all"]
        x = bad[steps.index("x")]
        assert [e for e in range(RAGGED.experts) if x[e]] == sorted(inputs.topk_ids[3].tolist())
        assert bad[steps.index("out"), -1] and not bad[steps.index("dout")].any()
        dout = next(r for r in report.calls[1].records if (r.name, r.expert) == ("dout", 1))
        assert means[steps.index("dout"), 1] == pytest.approx(math.log10(dout.absmean))

    def test_no_matplotlib(self, report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
        with pytest.raises(TraceError, match=r"jitmoe\[bench\]"):
            report.save_png(tmp_path / "map.png")


class TestEnvironment:
    @pytest.fixture(autouse=True)
    def tracer(self, monkeypatch: pytest.MonkeyPatch) -> tracing.Tracer:
        """That of a process in which nothing has been found yet."""
        monkeypatch.setenv("JITMOE_TRACE", "1")
        fresh = tracing.Tracer()
        monkeypatch.setattr(tracing, "_tracer", fresh)
        return fresh

    def test_the_first_bad_call_is_logged_once(
        self, tracer: tracing.Tracer, inputs: Inputs, caplog: pytest.LogCaptureFixture
    ) -> None:
        layer = layer_of(inputs, BEST)
        call_layer(layer, inputs)
        assert caplog.text == ""
        inputs.x[3, 17] = NAN
        call_layer(layer, inputs)
        assert not tracer.wanted
        call_layer(layer, inputs)
        (message,) = [record.getMessage() for record in caplog.records]
        assert "x of expert" in message and "token 3" in message and "it came with the call" in message
        assert "gate_lora_a before" in message, "the table is there"
        assert tracer._always.calls == []

    @pytest.mark.parametrize(("text", "watch"), [("0", "nothing"), ("", "nothing"), ("1", "values")])
    def test_only_1_asks_for_it(self, text: str, watch: str, inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("JITMOE_TRACE", text)
        loaded: list[Shape] = []
        with supplied(load=lambda shape: loaded.append(shape) or kernels.load(shape)):
            call_layer(layer_of(inputs, BEST), inputs)
        assert [shape.watch for shape in loaded] == [watch]


def test_each_step_reads_what_stands_before_it() -> None:
    for steps in STEPS.values():
        known = {f"{projection}_{end}" for projection in ("gate", "up", "down") for end in AXES}
        for step in steps:
            assert {factor for product in step.products for factor in product} <= known, step.name
            known.add(step.name)
