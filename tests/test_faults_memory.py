"""Faults of memory: allocations refused, accesses beyond the ends of tensors, interrupts at every phase."""

import ctypes
import itertools
import mmap
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    EVERY_ISA,
    build_kernels,
    case_named,
    copied,
    different,
    frozen_of,
    layer_of,
    placed_by,
    run_python,
    same_bits,
    usable_isas,
)
from torch import Tensor
from yardstick import Case, Inputs, make_inputs, results_of_layer

from jitmoe import MoELayer
from jitmoe.experts import call, workspace
from jitmoe.experts.observer import Observer, observing
from jitmoe.experts.supplies import supplied, supplies
from jitmoe.host import route
from jitmoe.jit import abi
from jitmoe.plan.placement import Buffer, Placed, ScratchPlan
from jitmoe.plan.shapes import Shape

ISA = usable_isas()[0]
RAGGED = [case_named("ragged_31"), case_named("ragged_65")]
PAGE = mmap.PAGESIZE


@pytest.fixture(scope="module", autouse=True)
def kernels_are_built() -> None:
    build_kernels([*RAGGED, case_named("all_ones")])


class Fence:
    """Memory between two pages that nobody may touch; what is beside the tensor holds a canary."""

    CANARY = 0xA5
    libc = ctypes.CDLL(None, use_errno=True)

    def __init__(self, nbytes: int, at_end: bool) -> None:
        room = -(-max(nbytes, 1) // PAGE) * PAGE
        self.map = mmap.mmap(-1, room + 2 * PAGE)
        self.bytes = np.frombuffer(self.map, np.uint8)[PAGE : PAGE + room]
        self.bytes[:] = self.CANARY
        self.begin = room - nbytes if at_end else 0
        self.nbytes = nbytes
        for page in (self.bytes.ctypes.data - PAGE, self.bytes.ctypes.data + room):
            assert self.libc.mprotect(ctypes.c_void_p(page), PAGE, 0) == 0

    def inside(self) -> np.ndarray:
        return self.bytes[self.begin : self.begin + self.nbytes]

    def check(self) -> None:
        beside = np.delete(self.bytes, np.s_[self.begin : self.begin + self.nbytes])
        assert (beside == self.CANARY).all(), "bytes beside the tensor were written"


class Fences:
    """Tensors and scratch that begin or end at a forbidden page."""

    def __init__(self, at_end: bool) -> None:
        self.at_end = at_end
        self.made: list[Fence] = []

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        fence = Fence(torch.Size(shape).numel() * dtype.itemsize, self.at_end)
        self.made.append(fence)
        if not fence.nbytes:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(fence.inside(), dtype=dtype).view(shape)

    def copy(self, tensor: Tensor) -> Tensor:
        return self.empty(tensor.shape, tensor.dtype).copy_(tensor)

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return self.empty(shape, dtype).zero_()

    def lease(self, nbytes: int, node: int | None = None) -> Any:
        fence = Fence(nbytes, self.at_end)
        self.made.append(fence)
        return nullcontext(fence.inside().ctypes.data)

    def check(self) -> None:
        for fence in self.made:
            fence.check()


def fence_layer(layer: MoELayer, fences: Fences) -> None:
    """Move the packed weights and the LoRA parameters of ``layer`` between fences."""
    for name, packed in frozen_of(layer).items():
        setattr(layer, name, fences.copy(packed))
    for name, parameter in list(layer.named_parameters()):
        setattr(layer, name, torch.nn.Parameter(fences.copy(parameter.detach())))


@EVERY_ISA
@pytest.mark.parametrize("case", [*RAGGED, case_named("all_ones")], ids=str)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("at_end", [True, False], ids=["page behind", "page before"])
def test_no_byte_beyond_any_tensor_is_touched(isa: str, case: Case, recompute: bool, at_end: bool) -> None:
    """Inputs, parameters, packed weights, saved tensors, scratch, result and gradients, all at the edge of a page.

    An access beyond one ends the process, so this test does not fail quietly.
    """
    inputs = make_inputs(case)
    layer = layer_of(inputs, isa, recompute=recompute)
    expected = copied(results_of_layer(layer, inputs))
    layer.zero_grad()

    fences = Fences(at_end)
    fence_layer(layer, fences)
    x, weights = (fences.copy(tensor).requires_grad_() for tensor in (inputs.x, inputs.weights))
    with supplied(empty=fences.empty, zeros=fences.zeros, arenas=fences):
        out = layer(x, fences.copy(inputs.topk_ids), weights)
        out.backward(fences.copy(inputs.dout))
    found = {"out": out.detach(), "x": x.grad, "weights": weights.grad}
    found |= {name: parameter.grad for name, parameter in layer.named_parameters()}
    saved_and_scratch = (0 if recompute else 5) + 2
    assert len(fences.made) == 9 + 4 + saved_and_scratch + 1 + 8, "the results were not between fences"
    assert different(found, expected) == []
    fences.check()


class FencedBuffers:
    """Scratch in which each buffer ends at a forbidden page; the planner's placement and the arenas at once."""

    def __init__(self) -> None:
        self.pages: list[int] = []
        self.leases: list[mmap.mmap] = []

    def place(self, buffers: Sequence[Buffer], gap: int) -> ScratchPlan:
        placed, end = [], 0
        self.pages = []
        for buffer in buffers:
            end += -(-max(buffer.nbytes, 1) // PAGE) * PAGE
            placed.append(Placed(buffer, end - buffer.nbytes))
            self.pages.append(end)
            end += PAGE
        return ScratchPlan(tuple(placed), end)

    def lease(self, nbytes: int, node: int | None = None) -> Any:
        self.leases.append(mmap.mmap(-1, nbytes))
        arena = np.frombuffer(self.leases[-1], np.uint8)
        arena[:] = 0xFF
        for page in self.pages:
            assert Fence.libc.mprotect(ctypes.c_void_p(arena.ctypes.data + page), PAGE, 0) == 0
        return nullcontext(arena.ctypes.data)


class OneThread(Observer):
    threads = 1


@EVERY_ISA
@pytest.mark.parametrize("case", [*RAGGED, case_named("all_ones")], ids=str)
@pytest.mark.parametrize("recompute", [False, True])
def test_no_byte_beyond_any_buffer_of_scratch_is_touched(isa: str, case: Case, recompute: bool) -> None:
    """On one thread, so that what belongs to it ends with its buffer. Ends the process as the test above does."""
    inputs = make_inputs(case)
    layer = layer_of(inputs, isa, recompute=recompute)
    expected = copied(results_of_layer(layer, inputs))
    fenced = FencedBuffers()
    with placed_by(fenced.place), supplied(arenas=fenced), observing(OneThread()):
        assert different(results_of_layer(layer, inputs), expected) == []
    assert len(fenced.leases) == 2


def test_a_fence_ends_the_process() -> None:
    """Seeded fault: one byte beyond."""
    program = """
import ctypes, faulthandler, os, signal
from test_faults_memory import Fence
child = os.fork()
if child == 0:
    faulthandler.disable()
    fence = Fence(100, at_end={end})
    address = fence.inside().ctypes.data
    ctypes.c_uint8.from_address(address + ({offset})).value
    os._exit(0)
print(signal.Signals(os.WTERMSIG(os.waitpid(child, 0)[1])).name)
"""
    for end, offset in ((True, 100), (False, -1)):
        assert run_python(program.format(end=end, offset=offset)).strip() == "SIGSEGV"


@pytest.mark.parametrize(("out", "in_"), [(1, 1), (31, 33), (65, 47)])
@pytest.mark.parametrize("at_end", [True, False])
def test_packing_touches_nothing_beyond(out: int, in_: int, at_end: bool) -> None:
    fences = Fences(at_end)
    source = fences.copy(torch.randn(2, out, in_).bfloat16())
    packed = fences.empty((2, -(-out // 32) * -(-in_ // 32) * 1024), torch.int16)
    back = fences.empty((2, out, in_), torch.bfloat16)
    loaded = layer_of(make_inputs(RAGGED[0]), ISA)._any_kernels()
    loaded.pack(source.data_ptr(), packed.data_ptr(), 2, out, in_, 2)
    loaded.unpack(packed.data_ptr(), back.data_ptr(), 2, out, in_, 2)
    assert same_bits(back, source)
    fences.check()


@pytest.fixture
def inputs() -> Inputs:
    return make_inputs(RAGGED[1])


@pytest.fixture(params=[False, True], ids=["saves", "recomputes"])
def layer(request: pytest.FixtureRequest, inputs: Inputs) -> MoELayer:
    return layer_of(inputs, ISA, recompute=request.param)


def snapshot(layer: MoELayer) -> dict[str, Tensor]:
    """Everything that a failed call must leave as it was."""
    tensors = {**layer.state_dict(), **frozen_of(layer)}
    grads = {f"grad of {n}": p.grad for n, p in layer.named_parameters() if p.grad is not None}
    return {name: tensor.clone() for name, tensor in {**tensors, **grads}.items()}


@dataclass
class Seeded:
    """Makes functions raise ``error`` at their call number ``count``, before they do anything or after all."""

    count: int
    error: BaseException
    after: bool = False
    calls: Iterator[int] = field(default_factory=itertools.count)

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def failing(*arguments: Any, **options: Any) -> Any:
            if next(self.calls) != self.count:
                return function(*arguments, **options)
            if self.after:
                function(*arguments, **options)
            raise self.error

        return failing


Phase = Callable[[Seeded], AbstractContextManager[Any]]


def supply(name: str) -> Phase:
    return lambda seeded: supplied(**{name: seeded(getattr(supplies(), name))})


def kernels_of(pass_name: str) -> Phase:
    def phase(seeded: Seeded) -> AbstractContextManager[Any]:
        def load(shape: Shape) -> Any:
            run = normal(shape).run
            broken = seeded(run)
            return SimpleNamespace(run=lambda name, record: (broken if name == pass_name else run)(name, record))

        normal = supplies().load
        return supplied(load=load)

    return phase


def function(owner: Any, name: str) -> Phase:
    """A function between the seams."""

    @contextmanager
    def phase(seeded: Seeded) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, seeded(getattr(owner, name)))
            yield

    return phase


PHASES: dict[str, Phase] = {
    "routing": function(route, "_sort_slots"),
    "planning of groups": function(call, "plan_groups"),
    "planning of forward": supply("plan_forward"),
    "planning of backward": supply("plan_backward"),
    "loading": supply("load"),
    "scratch": function(workspace, "allocate"),
    "results": supply("empty"),
    "gradients of weights": supply("zeros"),
    "callbacks": supply("gather_rows"),
    "record": function(abi, "record"),
    "kernel of forward": kernels_of("forward"),
    "kernel of backward": kernels_of("backward"),
}


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("phase", PHASES)
def test_interrupted_at_every_phase(
    layer: MoELayer, inputs: Inputs, phase: str, error: type[BaseException], after: bool
) -> None:
    """Clean: no gradient half accumulated, nothing leaked, the next call right."""
    workspace.arenas.release()
    expected = copied(results_of_layer(layer, inputs))
    state, held = snapshot(layer), workspace.arenas.held_bytes()
    assert held > 0
    interrupted = 0
    for count in range(16):
        if phase == "scratch":
            workspace.arenas.release()
        x, weights = inputs.x.clone().requires_grad_(), inputs.weights.clone().requires_grad_()
        with PHASES[phase](Seeded(count, error("seeded"), after)):
            try:
                layer(x, inputs.topk_ids, weights).backward(inputs.dout)
            except error:
                interrupted += 1
                assert different(snapshot(layer), state) == []
                assert x.grad is None and weights.grad is None
            else:
                break
    else:
        pytest.fail("no call got through")
    assert interrupted >= 1
    assert different(results_of_layer(layer, inputs), expected) == []
    assert workspace.arenas.held_bytes() == held, "an arena was lost or doubled"


@pytest.mark.parametrize("name", ["empty", "zeros"])
def test_torch_has_no_memory_for_its_part(layer: MoELayer, inputs: Inputs, name: str) -> None:
    """The n-th allocation of results and gradients is refused, for every n: torch's RuntimeError is a MemoryError."""
    expected = copied(results_of_layer(layer, inputs))
    state = snapshot(layer)
    refusal = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"
    refused = 0
    for count in range(16):
        x = inputs.x.clone().requires_grad_()
        with supply(name)(Seeded(count, RuntimeError(refusal))):
            try:
                layer(x, inputs.topk_ids, inputs.weights).backward(inputs.dout)
            except MemoryError as error:
                refused += 1
                assert "can't allocate memory" in str(error)
                assert different(snapshot(layer), state) == [] and x.grad is None
            else:
                break
    else:
        pytest.fail("no call got through")
    assert refused >= 1
    assert different(results_of_layer(layer, inputs), expected) == []


OUT_OF_MEMORY = """
import resource, re, torch
from pathlib import Path
from helpers import case_named, layer_of
from yardstick import make_inputs, results_of_layer
from dataclasses import replace
from jitmoe.experts import workspace

torch.set_num_threads(2)
inputs = make_inputs(case_named("small"))
layer = layer_of(inputs, "ISA")
expected = {k: v.clone() for k, v in results_of_layer(layer, inputs).items()}
many = make_inputs(replace(inputs.case, tokens=200_000))
x = many.x.requires_grad_()

def address_space():
    return int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10

def attempt(spare):
    workspace.arenas.release()
    limit = address_space() + spare
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    try:
        layer(x, many.topk_ids, many.weights).backward(many.dout)
        return "right"
    except MemoryError:
        assert x.grad is None and all(p.grad is not None for p in layer.parameters())
        return "MemoryError"
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        x.grad = None

outcomes = [attempt(spare << 20) for spare in (1, 20, 40, 60, 80, 120, 4000)]
print(*outcomes)
layer.zero_grad()
again = results_of_layer(layer, inputs)
assert all(torch.equal(again[k], expected[k]) for k in expected)
"""


def test_the_system_has_no_memory() -> None:
    """An address space that ends before a call's need does, at several sizes; then the limit goes and all is well."""
    outcomes = run_python(OUT_OF_MEMORY.replace("ISA", ISA)).split()
    assert outcomes[0] == "MemoryError" and outcomes[-1] == "right"
    assert outcomes == sorted(outcomes), "more memory never fails where less was enough"
    assert outcomes.count("MemoryError") >= 3
