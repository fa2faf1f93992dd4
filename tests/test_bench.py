"""The benchmark's arithmetic, its honesty, and the form of what it writes; never the speed of anything."""

import importlib
import itertools
import json
import multiprocessing
import os
import struct
from dataclasses import fields, replace

import pytest
import torch
from helpers import usable_isas

from jitmoe import MemoryPlan
from jitmoe.bench import (
    busy,
    ceilings,
    footprint,
    machine,
    measure,
    peers,
    phases,
    plot,
    report,
    startup,
    sweep,
    targets,
)
from jitmoe.bench.contenders import Contender, our_layer
from jitmoe.bench.measure import Measurement, Options, Outcome
from jitmoe.bench.predict import ABSENT, Assumptions, Machine, check_table, predict, prediction_table, product_share
from jitmoe.bench.tile_work import CYCLES, Sizes, vector_work
from jitmoe.bench.trace import KERNEL_BACKWARD, KERNEL_FORWARD, Trace, watch
from jitmoe.cli import main
from jitmoe.errors import BenchError, ConfigError
from jitmoe.experts import observer
from jitmoe.jit.abi import PHASES
from jitmoe.oracle.data import Base, batches, make_base
from jitmoe.oracle.workloads import FORWARD, TRAINING, W6, WORKLOADS, Workload, work_of
from jitmoe.plan.shapes import Shape, plan_kernels

TINY = Workload("tiny", experts=4, hidden=64, intermediate=32, top_k=2, rank=8, tokens=12)
OURS = Options(isas=("ref",), repeat=2)


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch):
    """A megabyte and some microseconds in place of a gigabyte and tens of milliseconds."""
    monkeypatch.setattr(ceilings.Ceilings.__init__, "__defaults__", (1 << 20, 1000))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def outcome():
    options = Options(isas=("ref",), peers=("torch-bf16", "torch-f32", "grouped-bf16", "grouped-f32"), repeat=2)
    return measure.compare(TINY, options, ceilings.Ceilings(1, 1 << 20, 1000))


class TestCounting:
    def test_flop_as_performance_is_judged(self):
        """Per slot: forward 6HI + 6r(H+I), backward 6HI + 12r(H+I), 4HI more with recompute."""
        w2, hidden, intermediate = WORKLOADS["W2"], 2048, 1408
        slots = 1024 * 6
        base, lora = 6 * hidden * intermediate, 8 * (hidden + intermediate)
        assert work_of(w2, False, 64).flop == slots * (base + 6 * lora)
        assert work_of(w2, True, 64).flop == slots * (2 * base + 18 * lora)
        assert work_of(w2, True, 64, recompute=True).flop == slots * (2 * base + 18 * lora + 4 * hidden * intermediate)
        assert work_of(w2, False, 64, rank=0).flop == slots * base

    def test_bytes(self):
        """6HI for each active expert and pass, S(4H + 6I) of activations."""
        w1 = WORKLOADS["W1"]
        weights, activations = 60 * 6 * 2048 * 1408, 48 * 6 * (4 * 2048 + 6 * 1408)
        assert work_of(w1, False, 60).nbytes == weights + activations
        assert work_of(w1, True, 60).nbytes == 2 * weights + activations

    def test_active_experts(self):
        assert WORKLOADS["W3"].expected_active() == pytest.approx(6)
        assert WORKLOADS["W1"].expected_active() == pytest.approx(64 * (1 - (1 - 6 / 64) ** 48))
        inputs = batches(WORKLOADS["W1"], torch.Generator().manual_seed(0))
        actual = [batch.active for batch in itertools.islice(inputs, 5)]
        assert sum(actual) / 5 == pytest.approx(WORKLOADS["W1"].expected_active(), rel=0.03)

    def test_a_base_product_does_about_m_flop_per_byte(self):
        wide = Workload("wide", experts=1, hidden=4096, intermediate=4096, top_k=1, rank=0, tokens=16)
        work = work_of(wide, False, 1)
        assert work.flop / work.nbytes == pytest.approx(16, rel=0.05)

    def test_the_roofline_is_the_slower_of_the_two(self):
        work = work_of(WORKLOADS["W3"], False, 6)
        assert work.roofline_seconds(flops=1e30, bandwidth=1e9) == work.nbytes / 1e9
        assert work.roofline_seconds(flops=1e9, bandwidth=1e30) == work.flop / 1e9

    @pytest.mark.parametrize(
        ("name", "sizes"),
        [
            ("W1", (64, 2048, 1408, 6, 8, 48)),
            ("W2", (64, 2048, 1408, 6, 8, 1024)),
            ("W2z", (64, 2048, 1408, 6, 8, 1024)),
            ("W3", (64, 2048, 1408, 6, 8, 1)),
            ("W4", (128, 2048, 768, 8, 16, 512)),
            ("W5", (16, 7168, 2048, 8, 16, 256)),
            ("W6s", (64, 1792, 512, 8, 16, 6400)),
        ],
    )
    def test_the_table_of_workloads(self, name, sizes):
        w = WORKLOADS[name]
        assert (w.experts, w.hidden, w.intermediate, w.top_k, w.rank, w.tokens) == sizes
        assert w.zipf == name.endswith("z")

    def test_impossible_sizes(self):
        with pytest.raises(ConfigError, match="top_k=3"):
            Workload("wrong", experts=2, hidden=8, intermediate=8, top_k=3, rank=0, tokens=1)


class TestData:
    def test_every_batch_is_new_and_nothing_is_zero(self):
        inputs = batches(TINY, torch.Generator().manual_seed(0))
        first, second = next(inputs), next(inputs)
        assert not torch.equal(first.x, second.x) and not torch.equal(first.topk_ids, second.topk_ids)
        base = make_base(TINY, torch.Generator().manual_seed(0))
        for tensor in (first.x, first.out_grad, first.weights, base.gate_proj, base.up_proj, base.down_proj):
            assert tensor.count_nonzero() > 0.98 * tensor.numel()

    @pytest.mark.parametrize("zipf", [False, True])
    def test_a_token_chooses_distinct_experts(self, zipf):
        workload = Workload("skewed", 16, 8, 8, top_k=4, rank=0, tokens=500, zipf=zipf)
        ids = next(batches(workload, torch.Generator().manual_seed(0))).topk_ids
        assert all(len(set(row)) == 4 for row in ids.tolist())
        rows = ids.flatten().bincount(minlength=16)
        assert (rows.max() > 3 * rows.median()) == zipf


class TestCeilings:
    def test_every_ceiling_is_a_rate(self):
        found = ceilings.Ceilings(2, 1 << 20, 1000)
        rates = found.measure()
        assert {"fma", "read"} <= set(rates) <= set(report.CEILING_NAMES)
        assert all(value > 0 for value in rates.values())
        assert found.read_bytes == 1 << 20


class TestOutcome:
    def test_everybody_took_part_in_both_passes(self, outcome):
        names = ["jitmoe ref", "torch-bf16", "grouped-bf16", "torch-f32", "grouped-f32"]
        found = [(m.contender.name, m.pass_name) for m in outcome.measurements]
        assert found == [(name, pass_name) for name in names for pass_name in (FORWARD, TRAINING)]
        assert all(len(m.seconds) == 2 for m in outcome.measurements)
        assert all(len(values) == 2 for values in outcome.ceilings.values())

    def test_nobody_holds_weights_afterwards(self, outcome):
        """Five workloads with all peers took 24 GB."""
        for measurement in outcome.measurements:
            assert measurement.contender.parameters == ()
            with pytest.raises(BenchError, match="given its weights back"):
                measurement.contender.call()

    def test_our_rows_name_kernels_and_scratch(self, outcome):
        forward, training = outcome.measurements[:2]
        assert [shape.isa for shape in forward.kernels] == ["ref"]
        assert 0 < forward.scratch < training.scratch
        assert outcome.measurements[2].scratch is None

    def test_ratios_are_of_the_same_pass(self, outcome):
        ours = {m.training: m.median for m in outcome.measurements if m.contender.isa}
        for m in outcome.measurements:
            assert m.ratios == {"ref": m.median / ours[m.training]}

    def test_roofline_share_uses_the_peak_of_the_products(self):
        def share(bf16_products: bool) -> float:
            contender = Contender("x", lambda *_: None, (), torch.bfloat16, 8, bf16_products)
            return Measurement(contender, False, seconds=[1.0], work=work_of(TINY, False, 4)).roofline_share(rates)

        rates = {"fma": 1e9, "bf16": 4e9, "read": 1e15}
        assert share(False) == pytest.approx(4 * share(True))
        assert share(False) == pytest.approx(work_of(TINY, False, 4).flop / 1e9)

    @pytest.mark.parametrize(("isa", "peak"), [("amx", 8e9), (None, 8e9), ("avx512_bf16", 4e9)])
    def test_tiles_are_the_ceiling_of_whoever_may_use_them(self, isa, peak):
        rates = {"fma": 1e9, "bf16": 4e9, "tmul": 8e9, "read": 1e15}
        contender = Contender("x", lambda *_: None, (), torch.bfloat16, 8, True, isa)
        measured = Measurement(contender, False, seconds=[1.0], work=work_of(TINY, False, 4))
        assert measured.roofline_share(rates) == pytest.approx(work_of(TINY, False, 4).flop / peak)

    def test_the_table(self, outcome):
        lines = report.outcome_table(outcome).splitlines()
        assert lines[0] == "tiny: E=4 H=64 I=32 K=2 r=8 tokens=12 routing=random"
        assert lines[1].startswith("ceilings: float32 FMA ")
        head = next(i for i, line in enumerate(lines) if line.startswith("who"))
        assert lines[head].split()[-2:] == ["/", "ref"]
        assert len(lines) == head + 1 + 10
        assert "ref M_STEP" in lines[head + 1] and lines[head + 1].endswith("1.00")

    def test_the_json(self, outcome):
        content = json.loads(json.dumps(report.as_json([outcome], 5)))
        (workload,) = content["workloads"]
        assert workload["sizes"]["experts"] == 4 and len(workload["results"]) == 10
        for result in workload["results"]:
            assert result["flops"] == pytest.approx(result["flop"] / result["median"])
            assert result["time_over"].keys() == {"ref"}

    def test_peers_that_do_not_fit_together_run_apart(self, monkeypatch):
        monkeypatch.setattr(measure, "available_memory", lambda: 0)
        names = ("torch-bf16", "torch-f32", "grouped-f32")
        assert peers.share_memory(names, 100, 0.0) == [["torch-bf16"], ["torch-f32"], ["grouped-f32"]]
        found = measure.compare(TINY, Options(("ref",), names, 1), ceilings.Ceilings(1))
        assert [m.contender.name for m in found.measurements[::2]] == ["jitmoe ref", *names]
        assert all(m.ratios for m in found.measurements)
        assert len(found.ceilings["fma"]) == 3


class TestHonesty:
    def test_another_instruction_set_than_the_asked_one(self, monkeypatch):
        monkeypatch.setenv("JITMOE_ISA", "ref")
        base = make_base(TINY, torch.Generator().manual_seed(0))
        with pytest.raises(BenchError, match="avx512 was to be measured and ref would run"):
            our_layer(TINY, "avx512", base, None)

    def test_a_fallback_inside_the_call(self, monkeypatch):
        """The layer says one set and its call loads the kernels of another."""
        real = Trace.kernel_isa
        monkeypatch.setattr(Trace, "kernel_isa", lambda trace: real(trace) and "avx2")
        with pytest.raises(BenchError, match="ref was to be measured and avx2 would run"):
            measure.compare(TINY, OURS, ceilings.Ceilings(1))

    def test_a_call_without_kernels_is_none_of_ours(self):
        with watch() as trace, pytest.raises(BenchError, match="no instruction set"):
            trace.kernel_isa()
        trace.shapes += [Shape("ref", 1, 1, 0, 4, False), Shape("avx2", 1, 1, 0, 3, False)]
        with pytest.raises(BenchError, match="avx2"):
            trace.kernel_isa()

    def test_a_contender_that_computes_something_else(self, monkeypatch):
        wrong = peers.Peer(lambda w, base, lora, scale: peers.loop(w, base, lora, 50 * scale), torch.bfloat16, 0.0)
        monkeypatch.setitem(peers.PEERS, "torch-bf16", wrong)
        with pytest.raises(BenchError, match="torch-bf16 differs"):
            measure.compare(TINY, Options(("ref",), ("torch-bf16",), 1), ceilings.Ceilings(1))

    def test_a_peer_that_is_missing_or_fails_is_named(self, monkeypatch):
        def fails(*_):
            return Contender("", lambda *_: torch.ones(2) @ torch.ones(3), (), torch.bfloat16, 8, True)

        monkeypatch.setitem(peers.PEERS, "peft", peers.Peer(fails, torch.bfloat16, 0.0, package="no_such_package"))
        monkeypatch.setitem(peers.PEERS, "torch-f32", peers.Peer(fails, torch.bfloat16, 0.0))
        found = measure.compare(TINY, Options(("ref",), ("peft", "torch-f32"), 1), ceilings.Ceilings(1))
        assert found.skipped["peft"] == "no_such_package is not installed"
        assert "inconsistent tensor size" in found.skipped["torch-f32"]
        assert [m.contender.name for m in found.measurements] == ["jitmoe ref"] * 2
        assert "left out: peft (no_such_package is not installed)" in report.outcome_table(found)

    def test_the_watch_leaves_nothing_behind(self):
        before = observer.current()
        with watch() as trace:
            assert observer.current() is trace
        assert observer.current() is before


@pytest.mark.parametrize("weight_format", ["int8_row", "mxfp4"])
def test_our_own_layer_on_quantised_weights_is_a_peer(weight_format):
    generator = torch.Generator().manual_seed(0)
    base, batch = make_base(TINY, generator), next(batches(TINY, generator))
    found = peers.PEERS[f"jitmoe-{weight_format}"].build(TINY, base, None, 2.0)
    assert found.call.config.weight_format == weight_format == found.comparable
    decoded = Base(**found.call.decode())
    expected, result = (
        measure.call_once(contender, batch, True)[1]
        for contender in (our_layer(TINY, found.call.isa, decoded, None), found)
    )
    assert torch.equal(expected, result)


class TestBusy:
    def test_others_compute_only_while_it_measures(self, monkeypatch):
        monkeypatch.setattr(busy, "SMALL", (TINY,))
        monkeypatch.setattr(busy, "CALLS", 3)
        monkeypatch.setattr(busy, "SETTLE_SECONDS", 0.0)
        found = busy.measure_busy("ref")
        assert [one.name for one in found] == [f"{TINY.name}, forward", f"{TINY.name}, fwd+bwd"]
        assert all(one.alone > 0 and 0 < one.beside <= one.worst for one in found)
        assert not multiprocessing.active_children()
        assert TINY.name in busy.busy_table(found) and set(busy.busy_json(found)[0]) == {
            f.name for f in fields(busy.Busy)
        }


class TestPackages:
    """Peers from packages that need not be installed; without adapters, or with B still zero, they give the base."""

    @pytest.mark.parametrize("name", ["transformers", "peft"])
    def test_they_compute_the_same_layer(self, name):
        pytest.importorskip(peers.PEERS[name].package)
        generator = torch.Generator().manual_seed(0)
        base, batch = make_base(TINY, generator), next(batches(TINY, generator))
        expected, found = (
            measure.call_once(peers.PEERS[peer].build(TINY, base, None, 2.0), batch, True)[1].float()
            for peer in ("torch-bf16", name)
        )
        assert (found - expected).norm() < 0.02 * expected.norm()

    def test_peft_trains_adapters_of_both_parameters(self):
        pytest.importorskip("peft")
        contender = peers.PEERS["peft"].build(TINY, make_base(TINY, torch.Generator().manual_seed(0)), None, 2.0)
        sizes = sorted(parameter.numel() for parameter in contender.parameters)
        assert sizes == sorted([8 * 4 * 64, 8 * 4 * 64, 8 * 4 * 32, 8 * 4 * 64])


class TestPhases:
    def test_steps_add_up_to_the_call(self):
        found = phases.measure_phases(TINY, "ref", 2)
        assert set(found.seconds[TRAINING]) == set(phases.STEPS)
        assert min(found.seconds[TRAINING][KERNEL_BACKWARD]) > 0
        assert found.seconds[FORWARD][KERNEL_BACKWARD] == [0.0, 0.0]
        text = phases.phases_table(found)
        assert KERNEL_FORWARD in text and phases.LORA in text and "100.0%" in text
        assert list(found.inside[TRAINING]) == [*PHASES, phases.WAITS]
        for step in PHASES:
            assert min(found.inside[TRAINING][step]) > 0, f"{step} took no time in forward and backward"
        for step in ("act_grad", "x_grad", "lora_grads"):
            assert found.inside[FORWARD][step] == [0.0, 0.0], f"{step} ran in forward"


class TestSweep:
    @pytest.mark.parametrize("axis", ["tokens", "experts", "rank", "threads"])
    def test_one_thing_changes(self, axis):
        variants = list(sweep._variants(axis, TINY, 2, quick=False))
        assert len({(w.slots, w.hidden) for _, w, _ in variants}) == (len(variants) if axis == "tokens" else 1)
        assert [value for value, _, _ in variants] == sorted({value for value, _, _ in variants})
        assert len(list(sweep._variants(axis, TINY, 2, quick=True))) <= len(variants)

    def test_table_and_picture(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sweep.VALUES, "tokens", (1, 8))
        found = sweep.run_sweep("tokens", TINY, OURS, 1, quick=False)
        assert [line.split()[0] for line in sweep.sweep_table(found).splitlines()[1:]] == ["tokens", "1", "8"]
        assert sweep.sweep_json(found)["values"] == [1, 8]
        plot.plot_sweep(found, "title", tmp_path / "sweep.png")
        assert colors_in(tmp_path / "sweep.png") > 20


def hold_for_a_moment(nbytes: int, before: int) -> int:
    """Peak of a call that takes ``nbytes`` and gives them back, in a process that has had ``before``."""
    torch.ones(before, dtype=torch.uint8)

    def call() -> None:
        torch.ones(nbytes, dtype=torch.uint8)

    return footprint.peak_of(call)


TRAINING_MODE, _, FORWARD_MODE = footprint.MODES


class TestTargets:
    @pytest.fixture(scope="class")
    @classmethod
    def lines(cls):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ceilings.Ceilings.__init__, "__defaults__", (1 << 20, 1000))
            patch.setattr(targets, "find_workload", lambda name: replace(TINY, name=name, zipf=name == "W2z"))
            options = replace(OURS, peers=("torch-f32", "grouped-f32"))
            return targets.judge_targets(list(targets.measure_workloads(options, 1)), options, 1)

    @pytest.mark.slow
    def test_every_target_has_a_line(self, lines):
        assert len({line.what for line in lines}) == len(lines) == len(targets.ROOFLINE) + len(targets.FASTER) + 12
        table = targets.targets_table(lines)
        assert all(line.what in table and line.wanted in table for line in lines)
        assert f"{sum(line.met for line in lines)} of {len(lines)} targets met" in table
        assert json.loads(json.dumps(targets.targets_json(lines)))[0]["wanted"] == ">= 90%"

    @pytest.mark.slow
    def test_what_was_not_measured_is_not_met(self, lines):
        absent = [line for line in lines if "PEFT" in line.what]
        assert len(absent) == 1
        assert all("not measured" in line.measured and not line.met for line in absent)

    @pytest.mark.parametrize(("ratios", "met"), [((2.4, 2.3), True), ((2.4, 2.29), False)])
    def test_the_best_peer_decides(self, outcome, ratios, met):
        peers = [
            replace(m, ratios={"ref": ratio}, contender=replace(m.contender, name=name))
            for m in outcome.measurements
            if m.pass_name == FORWARD and m.contender.name == "torch-f32"
            for name, ratio in zip(("torch-f32", "grouped-f32"), ratios, strict=True)
        ]
        outcomes = {name: Outcome(TINY, peers) for name in targets.MEASURED}
        lines = {line.what: line for line in targets._faster_lines(outcomes, "ref")}
        assert lines["W1 forward, times faster than torch float32"].met is met

    def test_a_roofline_share_names_its_bound(self, outcome):
        ours = next(m for m in outcome.measurements if m.contender.isa and m.pass_name == FORWARD)
        rates = {"fma": [ours.work.flop / (0.91 * ours.median)], "read": [1e18]}
        outcomes = {name: Outcome(TINY, outcome.measurements, rates) for name in targets.MEASURED}
        line = next(targets._roofline_lines(outcomes, "ref"))
        assert (line.measured, line.met) == ("91% of arithmetic", True)
        rates["read"] = [ours.work.nbytes / (0.89 * ours.median)]
        rates["fma"] = [1e18]
        line = next(targets._roofline_lines(outcomes, "ref"))
        assert (line.measured, line.met) == ("89% of memory read", False)


class TestStartup:
    def test_each_kernel_is_compiled_anew(self):
        found = startup._compilation(TINY, "ref")
        assert len(found) == len(plan_kernels(TINY.config("ref"), "ref").shapes)
        assert min(found.values()) > 0.05, "no compiler is that fast: something came from a cache"

    def test_a_process_that_fails(self):
        with pytest.raises(BenchError, match="status 1"):
            startup._process_seconds(importlib.import_module, "no_such_module")


class TestMemory:
    @pytest.mark.parametrize("before", [100_000_000, pytest.param(0, marks=pytest.mark.slow)])
    def test_the_meter_sees_a_buffer_of_known_size(self, before):
        nbytes = 48_000_000
        # 2 MB for what Python itself takes meanwhile, and for pages that Linux counts late.
        assert footprint.in_child(hold_for_a_moment, nbytes, before) == pytest.approx(nbytes, abs=2_000_000)

    def test_where_no_new_mark_can_be_begun(self, monkeypatch, tmp_path):
        """The old mark says nothing, unless it was exceeded."""
        status = tmp_path / "status"
        monkeypatch.setattr(machine, "_STATUS", status)
        monkeypatch.setattr(machine, "_CLEAR", tmp_path / "none" / "clear_refs")

        def write(**fields: int) -> None:
            status.write_text("".join(f"{name}:\t{value} kB\n" for name, value in fields.items()))

        monkeypatch.setattr(machine, "_held", lambda: 300 * 1024)
        write(VmHWM=500)
        start = machine.start_peak()
        assert machine.peak_since(start) is None
        write(VmHWM=700)
        assert machine.peak_since(start) == 400 * 1024
        write(VmPeak=1)
        assert machine.start_peak() is None and machine.peak_since(start) is None
        with pytest.raises(BenchError, match="VmHWM"):
            footprint.peak_of(lambda: None)

    def test_a_process_that_dies(self):
        with pytest.raises(BenchError, match="has died"):
            footprint.in_child(os._exit, 3)

    @pytest.mark.parametrize("mode", footprint.MODES, ids=str)
    def test_the_plan_is_that_of_a_process(self, mode):
        case = footprint.Case(TINY, "ref", "float32", mode, 1)
        whole = MemoryPlan.of(case.config(), TINY.tokens, 1, mode.training)
        left_out = {tensor.name for tensor in whole.held} - {tensor.name for tensor in case.plan().held}
        assert left_out == set(footprint.CALLER) - (set() if mode.training else {"out.grad"})
        assert case.config().recompute == mode.recompute

    def test_what_is_beyond_and_what_is_unplanned(self):
        """With everything as planned the one is scratch and routes, the other nothing."""
        case = footprint.Case(TINY, "ref", "float32", TRAINING_MODE, 1)
        plan = case.plan()
        kinds, slots = plan.by_kind(), TINY.slots
        found = footprint.Footprint(case, plan, plan.nbytes, plan.arena)
        ids, routes, row_weight, low_rank = 8 * slots, 2 * 8 * slots, 4 * slots, 3 * 4 * slots * TINY.rank
        assert (found.unplanned, found.beyond) == (0, plan.arena + ids + routes + row_weight)
        assert found.working == kinds["scratch"] + ids + low_rank + 2 * 2 * slots * 32
        less = footprint.Footprint(case, plan, plan.nbytes + 7, plan.arena - 64)
        assert (less.unplanned, less.beyond) == (71, found.beyond + 7)

    def test_what_does_not_fit_is_not_begun(self, monkeypatch):
        monkeypatch.setattr(footprint, "available_memory", lambda: 1)
        monkeypatch.setattr(footprint, "in_child", None)
        with pytest.raises(BenchError, match=r"tiny .*more than this machine has free"):
            footprint.measure_footprint(footprint.Case(TINY, "ref", "float32", TRAINING_MODE, 1))

    @pytest.mark.slow
    def test_a_layer_takes_what_is_planned(self):
        isa = usable_isas()[0]
        for found in footprint.measure_footprints([WORKLOADS["W6s"]], [isa], "float32", 2):
            assert found.ratio == pytest.approx(1, abs=0.03), footprint.footprint_table([found])
            assert found.unplanned <= 0.01 * found.plan.nbytes, footprint.footprint_table([found])


class TestPlot:
    def test_the_roofline_is_a_picture_with_something_in_it(self, outcome, tmp_path):
        plot.plot_roofline([outcome], "title", tmp_path / "roofline.png")
        assert colors_in(tmp_path / "roofline.png") > 20
        # The legend, at the right, has the same colour.
        pixels = pixels_of(tmp_path / "roofline.png")
        chart = pixels[:, : pixels.shape[1] * 3 // 4, :3]
        ours = [int(plot.OURS[0][at : at + 2], 16) for at in (1, 3, 5)]
        assert (abs(chart * 255 - ours) < 8).all(-1).sum() > 100


class TestCommand:
    SIZES = "--num-experts 4 --hidden-size 64 --intermediate-size 32 --top-k 2 --tokens 12 --isa ref --threads 1"

    def test_a_run(self, tmp_path, capsys):
        path = tmp_path / "bench.json"
        arguments = ["bench", *self.SIZES.split(), "--peers", "torch-bf16", "--repeat", "1", "--json", str(path)]
        assert main(arguments) == 0
        out = capsys.readouterr().out
        assert "own: E=4" in out and "torch-bf16" in out and "jitmoe ref" in out
        content = json.loads(path.read_text())
        assert {"date", "cpu", "threads", "torch"} <= set(content["machine"])
        assert len(content["workloads"][0]["results"]) == 4

    @pytest.mark.slow
    def test_memory(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(footprint, "MODES", (FORWARD_MODE,))
        path = tmp_path / "memory.json"
        assert main(["bench", "--memory", *self.SIZES.split(), "--json", str(path)]) == 0
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("own "))
        (found,) = json.loads(path.read_text())["memory"]
        assert line.split()[:3] == ["own", "ref", "forward"] and found["threads"] == 1
        assert found["measured_bytes"] > 0 and found["scratch_bytes"] > 0
        assert found["planned_bytes"] == sum(found["planned_bytes_by_kind"].values())

    @pytest.mark.parametrize("variable", ["JITMOE_CHECKED", "JITMOE_TRACE"])
    @pytest.mark.parametrize("command", ["bench", "bench --phases", "bench --memory", "check --mode perf"])
    def test_kernels_that_watch_themselves_are_not_measured(self, variable, command, capsys, monkeypatch):
        monkeypatch.setenv(variable, "1")
        sizes = [] if command.startswith("check") else self.SIZES.split()
        assert main([*command.split(), *sizes]) == 1
        out, err = capsys.readouterr()
        assert out == "" and f"jitmoe: {variable} is set" in err and f"(env -u {variable} " in err

    @pytest.mark.parametrize("off", ["0", ""])
    def test_a_variable_that_is_off_is_no_reason(self, off, capsys, monkeypatch):
        monkeypatch.setenv("JITMOE_CHECKED", off)
        assert main(["bench", "W9"]) == 1
        assert "known are W1" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ("W1 --memory --plot x.png", "no picture"),
            ("W9", "known are W1, W2"),
            ("W1 --top-k 2", "not both"),
            ("--top-k 2", "own sizes lack --num-experts"),
            ("W1 --peers vllm", "unknown peers vllm"),
            ("W1 --isa sse9", "unknown instruction set"),
            ("W1 --json /nowhere/x.json", "cannot be written"),
            ("W1 --repeat 0", "at least 1"),
            ("W1 --threads -2", "at least 1"),
            ("W1 W3 --sweep rank", "one workload"),
            ("W1 --phases --plot x.png", "no picture"),
            ("--loading --plot x.png", "--loading has no picture"),
            ("--busy --plot x.png", "--busy has no picture"),
        ],
    )
    def test_what_it_refuses(self, arguments, message, capsys):
        assert main(["bench", *arguments.split()]) == 1
        assert message in capsys.readouterr().err


def pixels_of(path):
    """[height, width, 4] between 0 and 1."""
    from matplotlib.image import imread

    return imread(path)


def colors_in(path) -> int:
    """Number of different pixels; also checks that it is a PNG of some size."""
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert min(struct.unpack(">II", header[16:24])) > 300
    pixels = pixels_of(path)
    return len({tuple(pixel) for pixel in pixels.reshape(-1, pixels.shape[-1])[::7].tolist()})


class TestPredict:
    """The model on paper: its terms, not its truth, which `jitmoe bench --predict` shows beside measurements."""

    MACHINE = Machine("m", "avx512_bf16", 2, products=8e11, vectors=4e11, bandwidth=4e10, source="")

    def test_never_below_the_roofline(self):
        for workload in (*WORKLOADS.values(), W6):
            for backward in (False, True):
                seconds = predict(workload, self.MACHINE, backward).seconds
                work = work_of(workload, False, workload.expected_active(), rank=0)
                assert seconds > work.flop / self.MACHINE.products
                assert seconds > 6.0 * workload.expected_active() * workload.hidden * workload.intermediate / 4e10

    def test_few_rows_wait_for_memory_and_many_for_arithmetic(self):
        bounds = {name: predict(WORKLOADS[name], self.MACHINE, False).bound for name in ("W3", "W2")}
        assert bounds == {"W3": "memory", "W2": "arithmetic"}

    def test_tiles_are_counted_as_the_emulator_counts_them(self):
        full = product_share("amx", 96, backward=False)
        assert product_share("amx", 4, backward=False) == pytest.approx(full / 4)
        assert product_share("amx", 17, backward=False) == pytest.approx(full * 17 / 32)

    def test_the_table_names_every_machine_and_assumption(self):
        text = prediction_table([WORKLOADS["W2"], W6])
        for absent in ABSENT:
            assert text.count(absent.name) == 3 and absent.source in text
        for item in fields(Assumptions):
            assert f"{item.name} = " in text
        assert "W2, 96 rows, r = 8: 2.7%; 4.6%" in text
        assert all(f"{name} = {cycles:g}" in text for name, cycles in CYCLES.items())

    def test_lora_on_tiles_is_no_work_of_vectors(self):
        machine = replace(self.MACHINE, isa="amx")
        slower = replace(machine, vectors=machine.vectors / 2)
        for backward in (False, True):
            one, other = (predict(WORKLOADS["W2"], m, backward).parts for m in (machine, slower))
            assert one["LoRA"] == other["LoRA"] < predict(WORKLOADS["W2"], self.MACHINE, backward).parts["LoRA"]
            assert other["operands"] == pytest.approx(2 * one["operands"])
            assert vector_work(Sizes(96, 2048, 1408, 0), backward).keys() <= {"pair a block of weights"}

    def test_beside_a_measurement(self):
        contender = Contender("jitmoe avx2", lambda *_: None, (), torch.bfloat16, 8, False, "avx2")
        measured = [Measurement(contender, training, seconds=[1.0]) for training in (False, True)]
        outcome = Outcome(WORKLOADS["W1"], measured, {"fma": [1e11], "read": [1e10]})
        machine = Machine("here", "avx2", 2, 1e11, 1e11, 1e10, "")
        forward, backward = (predict(WORKLOADS["W1"], machine, direction).seconds for direction in (False, True))
        shares = [float(line.split()[-1]) for line in check_table([outcome], 2).splitlines()[1:]]
        assert shares == pytest.approx([forward, forward + backward], abs=0.01)
