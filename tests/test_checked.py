"""Checked instances: they find each use of scratch that the plan did not promise, and change nothing else."""

import contextlib
import ctypes
import itertools
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    EVERY_ISA,
    GATHER,
    SUM,
    case_named,
    config_of,
    copied,
    different,
    isas_to_build,
    launches,
    layer_of,
    on_threads,
    placed_by,
    usable_isas,
)
from test_memory import apart, sharing
from test_toolchain import compile_text
from yardstick import Case, Inputs, Results, make_inputs, results_of_layer

from jitmoe import MoELayer
from jitmoe.errors import PlanError, SettingError
from jitmoe.experts.observer import Launch, PassName, observing
from jitmoe.experts.supplies import supplied, supplies
from jitmoe.experts.workspace import arenas
from jitmoe.inspect import checked
from jitmoe.isa import ISAS
from jitmoe.jit import abi, kernels
from jitmoe.jit.build import build_instances, ensure
from jitmoe.jit.render import render, template_dir, templates_from
from jitmoe.plan import shapes
from jitmoe.plan.placement import ALIGNMENT, Buffer, Placed, ScratchPlan, place, prove

ISA = next(isa for isa in ("avx2", "ref") if isa in usable_isas())
PASSES = ("forward", "backward")

SMALL = case_named("small")
CASES = (
    SMALL,
    case_named("no_lora"),
    case_named("ragged_65"),
    replace(SMALL, name="one_token", tokens=1),
    replace(SMALL, name="one_expert", routing="one_expert", top_k=1),
    replace(SMALL, name="duplicates", routing="duplicates", tokens=70),
    replace(SMALL, name="idle_experts", routing="idle_experts", experts=12),
    replace(SMALL, name="skipped_slots", routing="skipped_slots"),
    replace(SMALL, name="zipf", routing="zipf", experts=16, tokens=200),
    replace(SMALL, name="float32_x", x_dtype=torch.float32),
)
"""Few kernels, many routings."""


def options_of(isa: str) -> dict[str, Any]:
    return {"m_step": ISAS[isa].m_steps[-1]}


def shape_of(case: Case, isa: str = ISA) -> shapes.Shape:
    return shapes.plan_kernels(config_of(case, isa, **options_of(isa)), isa).shapes[0]


@pytest.fixture(scope="module", autouse=True)
def kernels_are_built() -> None:
    wanted = [shape_of(case) for case in CASES[:3]] + [shape_of(SMALL, isa) for isa in isas_to_build()]
    build_instances([render(replace(shape, watch=watch)) for shape in wanted for watch in ("nothing", "memory")])


@pytest.fixture
def use_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JITMOE_CHECKED", "1")


@pytest.fixture(params=[1, 3], ids=["1_thread", "3_threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    with on_threads(request.param) as count:
        yield count


@pytest.fixture
def one_thread() -> Iterator[None]:
    with on_threads(1):
        yield


def inputs_of(case: Case) -> Inputs:
    if case.routing != "zipf":
        return make_inputs(case)
    generator = torch.Generator().manual_seed(case.seed)
    chances = (1.0 / torch.arange(1, case.experts + 1)).expand(case.tokens, -1)
    ids = torch.multinomial(chances, case.top_k, generator=generator)
    return replace(make_inputs(replace(case, routing="random")), topk_ids=ids)


def both(inputs: Inputs, run: Callable[[MoELayer, Inputs], Results], isa: str = ISA, **options: Any) -> list[Results]:
    """What ``run`` gives on the plain and on the checked instance, which really ran."""
    results = []
    for value, watch in (("", "nothing"), ("1", "memory")):
        loaded = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("JITMOE_CHECKED", value)
            with supplied(load=lambda shape, into=loaded: into.append(shape) or kernels.load(shape)):
                found = run(layer_of(inputs, isa, **options_of(isa), **options), inputs)
            results.append(copied(found))
        assert {shape.watch for shape in loaded} == {watch}
    return results


class TestNothingElseChanges:
    @pytest.mark.parametrize("groups", ["whole", "cut"])
    @pytest.mark.parametrize("recompute", [False, True])
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_same_bits(self, case: Case, recompute: bool, groups: str, threads: int) -> None:
        """No fault is found, and nothing is read that only poison was written to."""
        with supplied(group_bytes=1) if groups == "cut" else contextlib.nullcontext():
            plain, found = both(inputs_of(case), results_of_layer, recompute=recompute)
        assert different(plain, found) == []

    @EVERY_ISA
    @pytest.mark.parametrize("recompute", [False, True])
    def test_on_each_instruction_set(self, isa: str, recompute: bool) -> None:
        plain, found = both(make_inputs(SMALL), results_of_layer, isa, recompute=recompute)
        assert different(plain, found) == []

    @pytest.mark.parametrize("recompute", [False, True])
    @pytest.mark.parametrize(("x_grad", "lora_grad"), [(False, True), (True, False), (False, False)])
    def test_without_some_gradients(self, x_grad: bool, lora_grad: bool, recompute: bool, threads: int) -> None:
        def run(layer: MoELayer, inputs: Inputs) -> Results:
            layer.requires_grad_(lora_grad)
            x, weights = inputs.x.clone().requires_grad_(x_grad), inputs.weights.clone().requires_grad_()
            out = layer(x, inputs.topk_ids, weights)
            out.backward(inputs.dout)
            leaves = {"x": x, "weights": weights, **dict(layer.named_parameters())}
            return {"out": out.detach()} | {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}

        plain, found = both(make_inputs(SMALL), run, recompute=recompute)
        assert different(plain, found) == []
        assert ("x" in found, "gate_lora_a" in found) == (x_grad, lora_grad)

    def test_no_tokens(self, use_checked: None) -> None:
        inputs = make_inputs(SMALL)
        x = inputs.x[:0].clone().requires_grad_()
        out = layer_of(inputs, ISA, **options_of(ISA))(x, inputs.topk_ids[:0], inputs.weights[:0])
        out.backward(out)
        assert out.shape == x.grad.shape == x.shape


def changed_lives(buffer: Buffer) -> list[Buffer]:
    """The buffer with its life shorter by a step at either end; a life of one step is moved instead."""
    if buffer.first == buffer.last:
        return [replace(buffer, first=buffer.first + step, last=buffer.last + step) for step in (-1, 1)]
    return [replace(buffer, first=buffer.first + 1), replace(buffer, last=buffer.last - 1)]


class Planner:
    """Places scratch as the planner does, with one buffer of one pass exchanged for another of the same name."""

    def __init__(self, pass_name: PassName) -> None:
        self.exchanged: Buffer | None = None
        self.buffers: list[Buffer] = []
        self._pass_name = pass_name

    def planning(self) -> contextlib.AbstractContextManager[None]:
        """Calls inside are planned so."""
        return placed_by(**{name: self._place if name == self._pass_name else place for name in PASSES})

    def _place(self, buffers: Sequence[Buffer], gap: int) -> ScratchPlan:
        self.buffers = list(buffers)
        return prove(place(exchange(buffers, self.exchanged), gap))


def exchange(buffers: Sequence[Buffer], new: Buffer | None) -> list[Buffer]:
    return [new if new and buffer.name == new.name else buffer for buffer in buffers]


@pytest.mark.parametrize("pass_name", PASSES)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["small", "no_lora"])
def test_every_life_shorter_by_a_step_is_caught(
    name: str, recompute: bool, pass_name: PassName, use_checked: None, one_thread: None
) -> None:
    """The planner believes the shorter life and proves its plan; the kernel's announcements say otherwise.

    That each is caught also means that no life in the plan is longer than its use.
    """
    inputs = make_inputs(case_named(name))
    layer = layer_of(inputs, ISA, recompute=recompute, **options_of(ISA))
    planner = Planner(pass_name)
    with planner.planning():
        expected = copied(results_of_layer(layer, inputs))
        seeded = [life for buffer in planner.buffers for life in changed_lives(buffer)]
        assert len(seeded) >= 10
        for life in seeded:
            planner.exchanged = life
            layer.zero_grad()
            with pytest.raises(PlanError, match=rf"scratch buffer {re.escape(life.name)} is used outside its life"):
                results_of_layer(layer, inputs)
            assert pass_name == "forward" or all(parameter.grad is None for parameter in layer.parameters())
        planner.exchanged = None
        assert different(results_of_layer(layer, inputs), expected) == []


@pytest.mark.parametrize("index", range(2), ids=PASSES)
def test_a_shorter_life_that_makes_buffers_meet_fails_the_proof(index: int) -> None:
    """Addresses that follow from a shorter life, held against the true lives."""
    inputs = make_inputs(SMALL)
    with launches() as seen:
        results_of_layer(layer_of(inputs, ISA, recompute=True, **options_of(ISA)), inputs)
    true = {item.buffer.name: item.buffer for item in seen[index].plan.placed}
    refused = 0
    for life in [life for buffer in true.values() for life in changed_lives(buffer)]:
        wrong = place(exchange(list(true.values()), life))
        restored = ScratchPlan(tuple(Placed(true[p.buffer.name], p.offset) for p in wrong.placed), wrong.nbytes)
        pairs = itertools.combinations(restored.placed, 2)
        if any(a.offset < b.end and b.offset < a.end and a.buffer.meets(b.buffer) for a, b in pairs):
            refused += 1
            with pytest.raises(PlanError, match=rf"share addresses.*\b{re.escape(life.name)}\b"):
                prove(restored)
        else:
            prove(restored)
    assert refused >= 4


@pytest.mark.parametrize("recompute", [False, True])
def test_every_pair_of_live_buffers_at_one_address_is_caught(
    recompute: bool, use_checked: None, one_thread: None
) -> None:
    """The ancestor's bug, with the proof left out: the map of owners finds it by itself."""
    inputs = make_inputs(SMALL)
    layer = layer_of(inputs, ISA, recompute=recompute, **options_of(ISA))
    with launches() as seen:
        results_of_layer(layer, inputs)
    with placed_by(apart):
        results_of_layer(layer, inputs)
    lives = [[item.buffer for item in launch.plan.placed] for launch in seen]
    pairs = {
        (one.name, other.name)
        for buffers in lives
        for one, other in itertools.combinations(buffers, 2)
        if one.meets(other)
    }
    assert len(pairs) >= 100
    for pair in sorted(pairs):
        with placed_by(sharing(*pair)), pytest.raises(PlanError, match="scratch buffer") as caught:
            results_of_layer(layer, inputs)
        either = "|".join(map(re.escape, pair))
        assert re.search(rf"buffer ({either}) is (read|written) at byte", str(caught.value))
        owner = re.search(r"which ([\w.]+).* (?:wrote last|still holds)", str(caught.value))
        assert owner and owner[1] in (*pair, "nobody")


def test_the_report_is_the_same_on_many_threads(use_checked: None) -> None:
    inputs = make_inputs(SMALL)
    layer = layer_of(inputs, ISA, **options_of(ISA))
    planner = Planner("forward")
    reports = set()
    with planner.planning():
        results_of_layer(layer, inputs)
        planner.exchanged = next(replace(b, last=b.first) for b in planner.buffers if b.name == "act_panel")
        for threads in (1, 2, 3, 3, 3):
            with on_threads(threads), pytest.raises(PlanError) as caught:
                results_of_layer(layer, inputs)
            reports.add(re.sub(r"\d+", "", str(caught.value)))  # thread buffers grow with the threads
    assert len(reports) == 1


STEPS = ("one", "two", "three")

DRIVER = """
#include "watch/checked.hpp"
using namespace jitmoe;
constexpr Shape shape{.isa = Isa::ref, .watch = Watch::memory};
constexpr void* Call::*kBuffersTouched[] = {&Call::x_panel, &Call::act_panel};
extern "C" {
void enter(const Call* call, int64_t step) { enter_step<shape>(*call, step); }
void leave(const Call* call) { leave_call<shape>(*call); }
void touch_bytes(const Call* call, int64_t write, int64_t buffer, int64_t at, int64_t bytes) {
  void* const& touched = call->*kBuffersTouched[buffer];
  touch<shape>(*call, write ? Access::write : Access::read, touched, static_cast<char*>(touched) + at, bytes);
}
}
"""

X, ACT = 0, 1


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = compile_text(tmp_path_factory.mktemp("driver"), DRIVER, include=template_dir())
    library.enter.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    library.leave.argtypes = [ctypes.c_void_p]
    library.touch_bytes.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 4]
    return library


@pytest.mark.parametrize(
    ("accesses", "fault"),
    [
        ([(0, "write", X, 0, 256), (1, "read", X, 0, 256), (1, "write", ACT, 0, 128), (2, "read", ACT, 0, 128)], None),
        ([(0, "write", X, 0, 100), (1, "read", X, 60, 68)], None),
        ([(0, "write", X, 0, 0), (2, "read", X, 0, 0)], None),
        ([(0, "read", X, 64, 64)], "step one .* x_panel is read at byte 128, which nobody wrote"),
        ([(0, "write", X, 0, 128), (1, "read", X, 64, 65)], "step two .* x_panel is read at byte 192, which nobody"),
        ([(0, "write", X, 0, 256), (2, "read", X, 0, 4)], "step three .* x_panel is used outside its life"),
        ([(0, "write", ACT, 0, 64)], "step one .* act_panel is used outside its life"),
        ([(0, "write", X, 0, 257)], "step one .* x_panel is used at byte 64, outside its bytes"),
        ([(0, "write", X, -1, 2)], "step one .* x_panel is used at byte 63, outside its bytes"),
        ([(0, "write", X, 0, 4), (0, "write", X, 300, 4), (0, "read", X, 64, 4)], "step one .* read at byte 128,"),
        ([(0, "read", X, 0, 4), (1, "read", X, 128, 4)], "step one .* read at byte 64,"),
        ([(0, "write", ACT, 0, 4), (1, "read", X, 0, 4)], "step one .* act_panel is used outside its life"),
        ([(0, "write", X, 0, 64), (0, "read", X, 100, 4)], "step one .* read at byte 128,"),
        ([(0, "write", X, 0, 4), (0, "write", X, 0, 4), (0, "read", X, 0, 4)], None),
    ],
)
def test_each_fault(driver: ctypes.CDLL, accesses: list[tuple[int, str, int, int, int]], fault: str | None) -> None:
    """Steps and accesses by hand, in an arena where x_panel lies at 64..320 and act_panel behind it."""
    lives = Buffer("x_panel", (64,), "float32", 0, 1), Buffer("act_panel", (32,), "float32", 1, 2)
    drive(driver, place(lives, ALIGNMENT), accesses, fault)


def test_faults_of_buffers_at_one_address(driver: ctypes.CDLL) -> None:
    lives = Buffer("x_panel", (64,), "float32", 0, 1), Buffer("act_panel", (32,), "float32", 1, 2)
    found = ScratchPlan((Placed(lives[0], 64), Placed(lives[1], 128)), 384)
    write_both = [(0, "write", X, 0, 256), (1, "write", ACT, 0, 4)]
    drive(driver, found, write_both, "step two .* act_panel is written at byte 128, which x_panel still holds")
    read_first = [(0, "write", X, 0, 64), (1, "write", ACT, 0, 64), (1, "read", X, 64, 64)]
    drive(driver, found, read_first, "step two .* x_panel is read at byte 128, which act_panel wrote last")


def test_what_a_group_wrote_is_nothing_to_the_next(driver: ctypes.CDLL) -> None:
    lives = (Buffer("x_panel", (64,), "float32", 0, 1),)
    again = [(0, "write", X, 0, 256), (1, "read", X, 0, 256), (0, "write", X, 0, 64), (1, "read", X, 0, 256)]
    drive(driver, place(lives, ALIGNMENT), again, "step two .* x_panel is read at byte 128, which nobody wrote")


def drive(
    driver: ctypes.CDLL, found: ScratchPlan, accesses: list[tuple[int, str, int, int, int]], fault: str | None
) -> None:
    """Enter the steps of ``accesses`` (step, kind, buffer, first byte, bytes) as they change, and make them."""
    with arenas.lease(found.nbytes) as base:
        expected = pytest.raises(PlanError, match=fault) if fault else contextlib.nullcontext()
        with expected, checked.checking(found, base, STEPS) as checks:
            record = abi.record({**found.fields(base), "checks": checks})
            call = record.ctypes.data
            present = None
            for step, kind, buffer, at, nbytes in accesses:
                if step != present:
                    driver.enter(call, step)
                present = step
                driver.touch_bytes(call, kind == "write", buffer, at, nbytes)
            driver.leave(call)


def address_of(callback: ctypes._CFuncPtr) -> int:
    return ctypes.cast(callback, ctypes.c_void_p).value


class Watched(checked.Checker):
    """A checker that keeps the plan of the present pass."""

    placed: dict[str, Placed]

    def around(self, launch: Launch) -> contextlib.AbstractContextManager[None]:
        self.placed = {item.buffer.name: item for item in launch.plan.placed}
        return super().around(launch)


@pytest.mark.parametrize("side", ["before", "behind"])
def test_a_write_beside_a_buffer_hits_a_canary(side: str, one_thread: None) -> None:
    """The gather of rows writes one element too many, which nothing announces."""
    gather, checker = GATHER(supplies().gather_rows()), Watched()

    def gather_too_much(*arguments: Any) -> None:
        gather(*arguments)
        at = arguments[6] + (-2 if side == "before" else checker.placed["thread_rows"].buffer.nbytes)
        ctypes.c_uint16.from_address(at).value = 0x3F80

    callback = GATHER(gather_too_much)
    inputs = make_inputs(SMALL)
    with (
        supplied(gather_rows=lambda: address_of(callback)),
        observing(checker),
        pytest.raises(PlanError, match=r"step load of .*thread_rows has a neighbour .* canary at byte \d+"),
    ):
        layer_of(inputs, ISA, **options_of(ISA))(inputs.x, inputs.topk_ids, inputs.weights)


def test_scratch_is_poison_after_its_life(one_thread: None) -> None:
    """A reader that announces nothing finds NaNs: in the step `down` x_panel is dead."""
    sum_rows, checker = SUM(supplies().sum_rows()), Watched()
    found: list[bytes] = []

    def sum_and_look(*arguments: Any) -> None:
        sum_rows(*arguments)
        x_panel, sums = checker.placed["x_panel"], checker.placed["sums"]
        if not found:
            found.append(ctypes.string_at(arguments[8] - sums.offset + x_panel.offset, x_panel.buffer.nbytes))

    callback = SUM(sum_and_look)
    inputs = replace(make_inputs(SMALL), topk_ids=make_inputs(SMALL).topk_ids * 0)
    with placed_by(apart), supplied(sum_rows=lambda: address_of(callback)), observing(checker):
        layer_of(inputs, ISA, **options_of(ISA))(inputs.x, inputs.topk_ids, inputs.weights)
    poison = torch.tensor(float("nan"), dtype=torch.bfloat16).view(torch.int16).numpy().tobytes()
    assert found == [poison * (len(found[0]) // 2)]


EMPTY = ("touch", "enter_step", "enter_call", "leave_call")
"""Functions of checked.hpp that kernels call."""


@pytest.mark.skipif(not shutil.which("objdump"), reason="objdump is not installed")
def test_other_instances_have_the_machine_code_they_had_without(tmp_path: Path) -> None:
    """Without means: where the functions that only a checked instance needs do nothing at all."""
    folder = tmp_path / "templates"
    shutil.copytree(str(template_dir()), folder)
    header = folder / "watch" / "checked.hpp"
    text = header.read_text(encoding="utf-8")
    for name in EMPTY:
        body = rf"(\b{name}\([^{{]*\{{\n)  if constexpr \(S\.watch == Watch::memory\) {{\n.*?\n  }}\n"
        text, count = re.subn(body, r"\1", text, count=1, flags=re.DOTALL)
        assert count == 1, name
    header.write_text(text, encoding="utf-8")
    shape = shape_of(SMALL)
    whole = machine_code(ensure(render(shape)))
    with templates_from(folder):
        assert "jitmoe_forward" in whole and whole == machine_code(ensure(render(shape)))


def machine_code(library: Path) -> str:
    command = ["objdump", "-d", "--no-show-raw-insn", str(library)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return printed.partition("Disassembly")[2]


def test_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(SMALL)
    layer = layer_of(inputs, ISA, **options_of(ISA))
    loaded: list[shapes.Shape] = []
    with supplied(load=lambda shape: loaded.append(shape) or kernels.load(shape)):
        for text in ("", "0", "1"):
            monkeypatch.setenv("JITMOE_CHECKED", text)
            layer(inputs.x, inputs.topk_ids, inputs.weights)
        assert [shape.watch for shape in loaded] == ["nothing", "nothing", "memory"]
        monkeypatch.setenv("JITMOE_CHECKED", "yes")
        with pytest.raises(SettingError, match="JITMOE_CHECKED"):
            layer(inputs.x, inputs.topk_ids, inputs.weights)
