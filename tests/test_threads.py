"""Same bits whatever the threads, the run, the process; and no hang, in a forked child above all."""

import ctypes
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import (
    EVERY_ISA,
    GATHER,
    SUM,
    build_kernels,
    case_named,
    copied,
    different,
    layer_of,
    run_python,
    same_bits,
    usable_isas,
)
from yardstick import Case, Inputs, Results, make_inputs, results_of_layer

from jitmoe import MoELayer
from jitmoe.experts import workspace
from jitmoe.experts.supplies import supplied, supplies
from jitmoe.isa import ISAS
from jitmoe.oracle.reference import LoraTensors
from jitmoe.plan import shapes

ISA = usable_isas()[0]
CASES = [case_named("medium"), case_named("ragged_65")]
PER_TOKEN = ("out", "x", "weights")


@pytest.fixture(scope="module", autouse=True)
def kernels_are_built() -> None:
    build_kernels(CASES)


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


def results_with(threads: int, layer: MoELayer, inputs: Inputs) -> Results:
    torch.set_num_threads(threads)
    return copied(results_of_layer(layer, inputs))


@EVERY_ISA
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_bits_for_any_number_of_threads_and_every_run(case: Case, isa: str, recompute: bool) -> None:
    inputs = make_inputs(case)
    layer = layer_of(inputs, isa, recompute=recompute)
    expected = results_with(1, layer, inputs)
    for threads in (1, 2, 3, 5, 5):
        assert different(results_with(threads, layer, inputs), expected) == [], f"{threads} threads"


def part_of(inputs: Inputs, tokens: slice) -> Inputs:
    cut = {name: getattr(inputs, name)[tokens] for name in ("x", "topk_ids", "weights", "dout")}
    return replace(inputs, **cut)


@EVERY_ISA
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_batch_invariant_layer_does_not_see_the_other_tokens(case: Case, isa: str) -> None:
    """The batch in two parts, in single tokens, and in another order."""
    inputs = make_inputs(case)
    layer = layer_of(inputs, isa, batch_invariant=True)
    whole = results_with(2, layer, inputs)
    parts = [slice(0, case.tokens // 3), slice(case.tokens // 3, None)]
    for cuts in (parts, [slice(token, token + 1) for token in range(case.tokens)]):
        pieces = [results_with(2, layer, part_of(inputs, cut)) for cut in cuts]
        joined = {name: torch.cat([piece[name] for piece in pieces]) for name in PER_TOKEN}
        assert different(joined, {name: whole[name] for name in PER_TOKEN}) == [], f"in {len(cuts)} parts"


def test_batch_invariance_is_one_kernel_form() -> None:
    """Without it the planner takes another register block for few rows, where the instruction set has two."""
    inputs = make_inputs(CASES[0])
    for isa in usable_isas():
        for invariant in (False, True):
            plans = shapes.plan_kernels(layer_of(inputs, isa, batch_invariant=invariant).config, isa)
            chosen = {plans.select(rows, 1).m_step for rows in (1, 1000)}
            assert len(chosen) == (1 if invariant else len(ISAS[isa].m_steps))


REPEAT = """
import sys, torch
{first}
from helpers import case_named, layer_of
from yardstick import make_inputs, results_of_layer
inputs = make_inputs(case_named("{case}"))
torch.save(results_of_layer(layer_of(inputs, "{isa}"), inputs), sys.argv[1] if len(sys.argv) > 1 else "{path}")
"""


@pytest.mark.parametrize(
    ("first", "environment"),
    [
        ("", {}),
        ("", {"OMP_NUM_THREADS": "1"}),
        ("import numba", {}),
        ("import jitmoe.host.tokens; jitmoe.host.tokens.gather_rows_address()", {}),
        ("import os; os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])", {}),
    ],
    ids=["plain", "OMP_NUM_THREADS=1", "numba first", "our numba code first", "cpuset of 1"],
)
def test_same_bits_in_a_fresh_process(first: str, environment: dict[str, str], tmp_path) -> None:
    case = CASES[1]
    inputs = make_inputs(case)
    expected = results_of_layer(layer_of(inputs, ISA), inputs)
    program = REPEAT.format(first=first, case=case, isa=ISA, path=tmp_path / "results.pt")
    if first:  # before torch, too
        program = f"{first}\n{program}"
    run_python(program, **environment)
    assert different(torch.load(tmp_path / "results.pt"), expected) == []


def test_one_openmp_library_is_loaded() -> None:
    program = """
from helpers import case_named, layer_of, usable_isas
from yardstick import make_inputs, results_of_layer
inputs = make_inputs(case_named("medium"))
results_of_layer(layer_of(inputs, usable_isas()[0]), inputs)
maps = open("/proc/self/maps").read().splitlines()
print(len({line.split()[-1] for line in maps if "gomp" in line or "iomp" in line or "libomp" in line}))
"""
    assert run_python(program).strip() == "1"


def in_threads(work: Callable[[int], None], count: int) -> None:
    failures: list[BaseException] = []

    def run(index: int) -> None:
        try:
            work(index)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures and not any(thread.is_alive() for thread in threads), failures


def test_python_threads_in_one_layer() -> None:
    """The kernels run without the GIL; scratch is leased, so calls do not meet in it."""
    draws = [make_inputs(replace(CASES[0], seed=seed, tokens=20 + 30 * seed)) for seed in range(3)]
    layer = layer_of(draws[0], ISA)
    same = [replace(draw, lora=draws[0].lora) for draw in draws]

    def forward_backward(inputs: Inputs) -> Results:
        x, weights = inputs.x.clone().requires_grad_(), inputs.weights.clone().requires_grad_()
        out = layer(x, inputs.topk_ids, weights)
        names = list(LoraTensors._fields)
        leaves = [x, weights, *(layer.get_parameter(name) for name in names)]
        grads = torch.autograd.grad(out, leaves, inputs.dout)
        return {"out": out.detach(), **dict(zip(["x", "weights", *names], grads, strict=True))}

    expected = [forward_backward(inputs) for inputs in same]
    wrong: list[object] = []

    def work(index: int) -> None:
        for _ in range(15):
            wrong.extend(different(forward_backward(same[index]), expected[index]))

    in_threads(work, len(same))
    assert wrong == []


def test_a_thread_of_its_own_gives_the_same_bits() -> None:
    inputs = make_inputs(CASES[0])
    layer = layer_of(inputs, ISA)
    expected = results_with(2, layer, inputs)
    found: list[Results] = []
    in_threads(lambda _: found.append(results_with(2, layer, inputs)), 1)
    assert different(found[0], expected) == []


class Meeting:
    """A callback of the kernels that holds the first two threads until both are inside, and notes their scratch."""

    def __init__(self, function: Any, scratch_argument: int) -> None:
        self.function = function
        self.scratch_argument = scratch_argument
        self.scratch: dict[int, int] = {}
        self.barrier = threading.Barrier(2)
        self.c = type(function)(self.call)
        self.address = ctypes.cast(self.c, ctypes.c_void_p).value

    def call(self, *arguments: Any) -> None:
        thread = threading.get_ident()
        if thread not in self.scratch:
            self.scratch[thread] = arguments[self.scratch_argument]
            self.barrier.wait(60)
        self.function(*arguments)


def test_two_threads_at_work_have_scratch_of_their_own() -> None:
    """Each is held with its rows, then with its strip at hand, until the other one is there too."""
    inputs = make_inputs(CASES[0])
    layer = layer_of(inputs, ISA)
    expected = results_with(2, layer, inputs)
    for name, kind, scratch in (("gather_rows", GATHER, 6), ("sum_rows", SUM, 0)):
        meeting = Meeting(kind(getattr(supplies(), name)()), scratch)
        with supplied(**{name: lambda meeting=meeting: meeting.address}):
            found = results_with(2, layer, inputs)
        assert len(meeting.scratch) == 2 and len(set(meeting.scratch.values())) == 2, name
        assert different(found, expected) == []


def in_forked_child(work: Callable[[], bool], seconds: int = 30) -> None:
    """Run ``work`` in a child that an alarm ends; it must return True there."""
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # a handler in Python would wait for the hung call to return
        signal.alarm(seconds)
        status = 1
        try:
            status = 0 if work() else 2
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert not os.WIFSIGNALED(status), f"the child was ended by signal {os.WTERMSIG(status)}: it hung"
    assert os.WEXITSTATUS(status) == 0, {1: "an exception in the child", 2: "wrong bits"}[os.WEXITSTATUS(status)]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
class TestFork:
    """The threads of the parent's OpenMP pool do not exist in the child."""

    @pytest.fixture
    def inputs(self) -> Inputs:
        return make_inputs(replace(CASES[0], tokens=300))

    @pytest.fixture
    def layer(self, inputs: Inputs) -> MoELayer:
        torch.set_num_threads(2)
        return layer_of(inputs, ISA)

    def test_after_use_the_child_computes(self, layer: MoELayer, inputs: Inputs) -> None:
        expected = results_with(2, layer, inputs)
        in_forked_child(lambda: not different(results_of_layer(layer, inputs), expected))
        assert different(results_with(2, layer, inputs), expected) == [], "the parent goes on"

    def test_even_where_the_child_asks_for_threads(self, layer: MoELayer, inputs: Inputs) -> None:
        small = part_of(inputs, slice(0, 4))
        expected = results_with(2, layer, small)
        in_forked_child(lambda: not different(results_with(2, layer, small), expected))

    def test_with_tensors_that_torch_itself_would_use_threads_for(self, layer: MoELayer, inputs: Inputs) -> None:
        wide = replace(inputs, x=inputs.x.float(), dout=inputs.dout.float())
        assert wide.x.numel() > 32768, "torch's grain size"
        expected = results_with(2, layer, wide)
        in_forked_child(lambda: not different(results_of_layer(layer, wide), expected))

    def test_packing_and_unpacking(self, layer: MoELayer, inputs: Inputs) -> None:
        results_with(2, layer, inputs)
        expected = layer.state_dict()

        def work() -> bool:
            other = layer_of(inputs, ISA)
            other.load_state_dict(expected)
            return not different(other.state_dict(), dict(expected))

        in_forked_child(work)

    @pytest.mark.parametrize("owner", ["arenas", "blocks"])
    def test_while_another_thread_holds_the_memory(self, layer: MoELayer, inputs: Inputs, owner: str) -> None:
        with supplied(block_bytes=0):
            expected = results_with(2, layer, inputs)
            with getattr(workspace, owner)._lock:
                in_forked_child(lambda: not different(results_of_layer(layer, inputs), expected))

    def test_a_child_of_a_child(self, layer: MoELayer, inputs: Inputs) -> None:
        expected = results_with(2, layer, inputs)

        def work() -> bool:
            in_forked_child(lambda: not different(results_of_layer(layer, inputs), expected), 15)
            return True

        in_forked_child(work)

    def test_workers_of_a_data_loader(self, layer: MoELayer, inputs: Inputs) -> None:
        with torch.no_grad():
            expected = layer(inputs.x, inputs.topk_ids, inputs.weights)

            class Rows(torch.utils.data.Dataset):
                def __len__(self) -> int:
                    return 4

                def __getitem__(self, index: int) -> torch.Tensor:
                    return layer(inputs.x, inputs.topk_ids, inputs.weights)

            loader = torch.utils.data.DataLoader(Rows(), batch_size=None, num_workers=2, timeout=30)
            assert all(same_bits(out, expected) for out in loader)
