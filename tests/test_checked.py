"""Checked instances: they find each use of scratch that the plan did not promise, and change nothing else."""

import contextlib
import ctypes
import itertools
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import EVERY_ISA, any_shape, case_named, config_of, different, isas_to_build, layer_of, usable_isas
from test_memory import apart, sharing
from test_toolchain import compile_text
from yardstick import Case, Inputs, Results, make_inputs, results_of_layer

from jitmoe import MoELayer, build
from jitmoe.errors import PlanError, SettingError
from jitmoe.experts import call
from jitmoe.experts.workspace import arenas
from jitmoe.inspect import checked
from jitmoe.isa import ISAS
from jitmoe.jit import kernels, toolchain
from jitmoe.jit.build import ensure, template_headers
from jitmoe.jit.render import render, template_dir
from jitmoe.plan import scratch, shapes
from jitmoe.plan.scratch import ALIGNMENT, Buffer, Placed, ScratchPlan, prove

ISA = next(isa for isa in ("avx2", "ref") if isa in usable_isas())
HEADER = (template_dir() / "watch" / "checked.hpp").read_text(encoding="utf-8")
PASSES = ("plan_forward", "plan_backward")

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


pytestmark = pytest.mark.usefixtures("plans_are_not_kept")


@pytest.fixture(scope="module", autouse=True)
def kernels_are_built() -> None:
    wanted = [(case, ISA) for case in CASES[:3]] + [(SMALL, isa) for isa in isas_to_build()]
    configs = [config_of(case, isa, **options_of(isa)) for case, isa in wanted]
    build(configs, progress=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JITMOE_CHECKED", "1")
        build(configs, progress=False)


@pytest.fixture
def use_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JITMOE_CHECKED", "1")


@pytest.fixture(params=[1, 3], ids=["1_thread", "3_threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
            patch.setattr(call, "load", lambda shape, into=loaded: into.append(shape) or kernels.load(shape))
            found = run(layer_of(inputs, isa, **options_of(isa), **options), inputs)
            results.append({name: tensor.clone() for name, tensor in found.items()})
        assert {shape.watch for shape in loaded} == {watch}
    return results


class TestNothingElseChanges:
    @pytest.mark.parametrize("groups", ["whole", "cut"])
    @pytest.mark.parametrize("recompute", [False, True])
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_same_bits(
        self, case: Case, recompute: bool, groups: str, threads: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """No fault is found, and nothing is read that only poison was written to."""
        if groups == "cut":
            monkeypatch.setattr(shapes, "GROUP_BYTES", 1)
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
    """Plans as the planner does, with one buffer of one pass exchanged for another of the same name."""

    def __init__(self, pass_name: str, patch: pytest.MonkeyPatch) -> None:
        self.exchanged: Buffer | None = None
        self.buffers: list[Buffer] = []
        plan_pass, place = getattr(call, pass_name), scratch.place

        def placed(buffers: list[Buffer], gap: int) -> ScratchPlan:
            self.buffers = buffers
            new = self.exchanged
            return place([new if new and b.name == new.name else b for b in buffers], gap)

        def planned(*arguments: Any, **options: Any) -> ScratchPlan:
            with pytest.MonkeyPatch.context() as inner:
                inner.setattr(scratch, "place", placed)
                return plan_pass(*arguments, **options)

        patch.setattr(call, pass_name, planned)


@pytest.mark.parametrize("pass_name", PASSES)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["small", "no_lora"])
def test_every_life_shorter_by_a_step_is_caught(
    name: str, recompute: bool, pass_name: str, use_checked: None, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planner believes the shorter life and proves its plan; the kernel's announcements say otherwise.

    That each is caught also means that no life in the plan is longer than its use.
    """
    inputs = make_inputs(case_named(name))
    layer = layer_of(inputs, ISA, recompute=recompute, **options_of(ISA))
    planner = Planner(pass_name, monkeypatch)
    expected = {key: value.clone() for key, value in results_of_layer(layer, inputs).items()}
    seeded = [life for buffer in planner.buffers for life in changed_lives(buffer)]
    assert len(seeded) >= 10
    for life in seeded:
        planner.exchanged = life
        layer.zero_grad()
        with pytest.raises(PlanError, match=rf"scratch buffer {life.name} is used outside its life"):
            results_of_layer(layer, inputs)
        assert pass_name == "plan_forward" or all(parameter.grad is None for parameter in layer.parameters())
    planner.exchanged = None
    assert different(results_of_layer(layer, inputs), expected) == []


@pytest.mark.parametrize("pass_name", PASSES)
def test_a_shorter_life_that_makes_buffers_meet_fails_the_proof(
    pass_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Addresses that follow from a shorter life, held against the true lives."""
    inputs = make_inputs(SMALL)
    layer = layer_of(inputs, ISA, recompute=True, **options_of(ISA))
    planner = Planner(pass_name, monkeypatch)
    results_of_layer(layer, inputs)
    true = {buffer.name: buffer for buffer in planner.buffers}
    refused = 0
    for life in [life for buffer in planner.buffers for life in changed_lives(buffer)]:
        wrong = scratch.place([life if b.name == life.name else b for b in planner.buffers])
        restored = ScratchPlan(tuple(Placed(true[p.buffer.name], p.offset) for p in wrong.placed), wrong.nbytes)
        pairs = itertools.combinations(restored.placed, 2)
        if any(a.offset < b.end and b.offset < a.end and a.buffer.meets(b.buffer) for a, b in pairs):
            refused += 1
            with pytest.raises(PlanError, match=rf"share addresses.*\b{life.name}\b"):
                prove(restored)
        else:
            prove(restored)
    assert refused >= 4


@pytest.mark.parametrize("recompute", [False, True])
def test_every_pair_of_live_buffers_at_one_address_is_caught(
    recompute: bool, use_checked: None, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ancestor's bug, with the proof switched off: the map of owners finds it by itself."""
    inputs = make_inputs(SMALL)
    layer = layer_of(inputs, ISA, recompute=recompute, **options_of(ISA))
    lives: list[list[Buffer]] = []
    monkeypatch.setattr(scratch, "place", lambda buffers, gap: lives.append(buffers) or apart(buffers))
    results_of_layer(layer, inputs)
    pairs = {
        (one.name, other.name)
        for buffers in lives
        for one, other in itertools.combinations(buffers, 2)
        if one.meets(other)
    }
    assert len(pairs) >= 100
    monkeypatch.setattr(scratch, "prove", lambda found: found)
    for pair in sorted(pairs):
        monkeypatch.setattr(scratch, "place", lambda buffers, gap, pair=pair: sharing(*pair)(buffers))
        with pytest.raises(PlanError, match="scratch buffer") as caught:
            results_of_layer(layer, inputs)
        assert re.search(rf"buffer ({'|'.join(pair)}) is (read|written) at byte", str(caught.value))
        owner = re.search(r"which (\w+).* (?:wrote last|still holds)", str(caught.value))
        assert owner and owner[1] in (*pair, "nobody")


def test_the_report_is_the_same_on_many_threads(use_checked: None, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(SMALL)
    layer = layer_of(inputs, ISA, **options_of(ISA))
    planner = Planner("plan_forward", monkeypatch)
    results_of_layer(layer, inputs)
    planner.exchanged = next(replace(b, last=b.first) for b in planner.buffers if b.name == "act_panel")
    before, reports = torch.get_num_threads(), set()
    for threads in (1, 2, 3, 3, 3):
        torch.set_num_threads(threads)
        with pytest.raises(PlanError) as caught:
            results_of_layer(layer, inputs)
        reports.add(re.sub(r"\d+", "", str(caught.value)))  # thread buffers grow with the threads
    torch.set_num_threads(before)
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
void touch(const Call* call, int64_t write, int64_t buffer, int64_t at, int64_t bytes) {
  auto* base = static_cast<char*>(call->*kBuffersTouched[buffer]);
  announce<shape>(*call, write ? Access::write : Access::read, kBuffersTouched[buffer], base + at, bytes);
}
}
"""

X, ACT = 0, 1


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("driver")
    for name, content in template_headers():
        (folder / name).write_bytes(content)
    library = compile_text(folder, DRIVER)
    library.enter.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    library.leave.argtypes = [ctypes.c_void_p]
    library.touch.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 4]
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
    drive(driver, scratch.place(lives, ALIGNMENT), accesses, fault)


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
    drive(driver, scratch.place(lives, ALIGNMENT), again, "step two .* x_panel is read at byte 128, which nobody wrote")


def drive(
    driver: ctypes.CDLL, found: ScratchPlan, accesses: list[tuple[int, str, int, int, int]], fault: str | None
) -> None:
    """Enter the steps of ``accesses`` (step, kind, buffer, first byte, bytes) as they change, and make them."""
    shape = replace(any_shape(), watch="memory")
    with arenas.lease(found.nbytes) as base:
        scratch = {name: base + offset for name, offset in found.offsets().items()}
        expected = pytest.raises(PlanError, match=fault) if fault else contextlib.nullcontext()
        with expected, checked.checking(shape, found, base, STEPS) as fields:
            call = ctypes.byref(kernels.Call(**scratch, **fields))
            present = None
            for step, kind, buffer, at, nbytes in accesses:
                if step != present:
                    driver.enter(call, step)
                present = step
                driver.touch(call, kind == "write", buffer, at, nbytes)
            driver.leave(call)


GATHER = ctypes.CFUNCTYPE(
    None, *[ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p, ctypes.c_int64]
)
SUM = ctypes.CFUNCTYPE(
    None,
    *[ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 4],
    *[ctypes.c_void_p, ctypes.c_int64],
)


@pytest.fixture
def forward_plan(monkeypatch: pytest.MonkeyPatch) -> Callable[[], ScratchPlan]:
    """The last plan of a forward."""
    plans: list[ScratchPlan] = []
    plan_forward = call.plan_forward
    monkeypatch.setattr(call, "plan_forward", lambda *sizes: plans.append(plan_forward(*sizes)) or plans[-1])
    return lambda: plans[-1]


@pytest.mark.parametrize("side", ["before", "behind"])
def test_a_write_beside_a_buffer_hits_a_canary(
    side: str,
    forward_plan: Callable[[], ScratchPlan],
    use_checked: None,
    one_thread: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The gather of rows writes one element too many, which nothing announces."""
    gather = GATHER(call.tokens.gather_rows_address())

    def gather_too_much(*arguments: Any) -> None:
        gather(*arguments)
        rows = next(p.buffer for p in forward_plan().placed if p.buffer.name == "thread_rows")
        at = arguments[6] + (-2 if side == "before" else rows.nbytes)
        ctypes.c_uint16.from_address(at).value = 0x3F80

    callback = GATHER(gather_too_much)
    address = ctypes.cast(callback, ctypes.c_void_p).value
    monkeypatch.setattr(call.tokens, "gather_rows_address", lambda: address)
    inputs = make_inputs(SMALL)
    with pytest.raises(PlanError, match=r"step load of .*thread_rows has a neighbour .* canary at byte \d+"):
        layer_of(inputs, ISA, **options_of(ISA))(inputs.x, inputs.topk_ids, inputs.weights)


def test_scratch_is_poison_after_its_life(
    forward_plan: Callable[[], ScratchPlan], use_checked: None, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that announces nothing finds NaNs: in the step `down` x_panel is dead."""
    sum_rows = SUM(call.tokens.sum_rows_address())
    found: list[bytes] = []

    def sum_and_look(*arguments: Any) -> None:
        sum_rows(*arguments)
        placed = {p.buffer.name: p for p in forward_plan().placed}
        x_panel, sums = placed["x_panel"], placed["sums"]
        if not found:
            found.append(ctypes.string_at(arguments[8] - sums.offset + x_panel.offset, x_panel.buffer.nbytes))

    callback = SUM(sum_and_look)
    address = ctypes.cast(callback, ctypes.c_void_p).value
    monkeypatch.setattr(call.tokens, "sum_rows_address", lambda: address)
    monkeypatch.setattr(scratch, "place", lambda buffers, gap: apart(buffers))
    inputs = replace(make_inputs(SMALL), topk_ids=make_inputs(SMALL).topk_ids * 0)
    layer_of(inputs, ISA, **options_of(ISA))(inputs.x, inputs.topk_ids, inputs.weights)
    poison = torch.tensor(float("nan"), dtype=torch.bfloat16).view(torch.int16).numpy().tobytes()
    assert found == [poison * (len(found[0]) // 2)]


HOOK = re.compile(r"^ *(?:this->)?(?:announce\w*|enter_\w+|leave_\w+)(?:<S>)?\([^;]*\);\n", re.MULTILINE)
"""A statement that is there for checked instances alone."""


@pytest.mark.skipif(not shutil.which("objdump"), reason="objdump is not installed")
def test_other_instances_have_the_machine_code_they_had_without(tmp_path: Path) -> None:
    shape = shapes.plan_kernels(config_of(SMALL, ISA, **options_of(ISA)), ISA).shapes[0]
    hooks = 0
    for name, content in template_headers():
        text, count = HOOK.subn("", content.decode())
        (tmp_path / name).write_text(text, encoding="utf-8")
        hooks += count
    assert hooks >= 60
    (tmp_path / "kernel.cpp").write_text(render(shape).text, encoding="utf-8")
    compiler, stripped = toolchain.find_compiler(), tmp_path / "kernel.so"
    flags = toolchain.flags(ISA, compiler.kind)
    toolchain.compile(compiler, tmp_path / "kernel.cpp", stripped, flags, tmp_path, 120.0, tmp_path / "log")
    whole = machine_code(ensure(render(shape)))
    assert "jitmoe_forward" in whole and whole == machine_code(stripped)


def machine_code(library: Path) -> str:
    command = ["objdump", "-d", "--no-show-raw-insn", str(library)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return printed.partition("Disassembly")[2]


def test_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(SMALL, ISA)
    for text, watch in (("", "nothing"), ("0", "nothing"), ("1", "memory")):
        monkeypatch.setenv("JITMOE_CHECKED", text)
        assert {shape.watch for shape in shapes.plan_kernels(config, ISA).shapes} == {watch}
    monkeypatch.setenv("JITMOE_CHECKED", "yes")
    with pytest.raises(SettingError, match="JITMOE_CHECKED"):
        shapes.plan_kernels(config, ISA)


def members(struct: str) -> list[str]:
    """Names of the members of a struct of checked.hpp, which all have eight bytes."""
    body = re.search(rf"struct {struct} {{\n(.*?)\n}};", HEADER, re.DOTALL)
    found = [re.fullmatch(r"  (?:int64_t|Fault|\w+\*) (\w+);(?: *//.*)?", line) for line in body[1].splitlines()]
    return [member[1] for member in found]


def enumerators(enum: str, text: str) -> list[str]:
    return re.search(rf"enum class {enum}[^{{]*{{ ([^}}]*) }};", text)[1].split(", ")


def test_checked_py_mirrors_the_headers() -> None:
    assert members("Life") == list(checked.LIFE.names)
    assert members("Checks") == list(checked.CHECKS.names)
    assert enumerators("Fault", HEADER) == ["none", *checked.FAULTS]
    for pass_name, steps in (("forward", scratch.FORWARD_STEPS), ("backward", scratch.BACKWARD_STEPS)):
        header = (template_dir() / f"{pass_name}.hpp").read_text(encoding="utf-8")
        assert enumerators(f"{pass_name.capitalize()}Step", header) == list(steps)
    assert int(re.search(r"kLine = (\d+);", HEADER)[1]) == scratch.ALIGNMENT
