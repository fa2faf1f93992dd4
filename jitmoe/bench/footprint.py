"""Measures the memory of our layer beside its plan, each case in a process of its own, where nothing else grows."""

import gc
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from jitmoe.bench import machine
from jitmoe.bench.contenders import check_isa
from jitmoe.config import MoEConfig
from jitmoe.errors import BenchError
from jitmoe.experts.layer import MoELayer
from jitmoe.experts.workspace import arenas
from jitmoe.jit import kernels
from jitmoe.jit.warm import build
from jitmoe.limits import available_memory
from jitmoe.memory.plan import MemoryPlan
from jitmoe.oracle.data import Batch, batches
from jitmoe.oracle.workloads import Workload
from jitmoe.plan.shapes import plan_kernels
from jitmoe.progress import track
from jitmoe.text import table

CALLER = ("x", "weights", "topk_ids", "out.grad")
"""Tensors of the plan that the benchmark makes before it measures, so neither figure has them."""

CALLS = 2
"""Calls of a layer. In the second one gradients of the first are still there, as the plan assumes."""

WARM_UP = Workload("warm-up", experts=3, hidden=96, intermediate=64, top_k=2, rank=4, tokens=64)
"""A call of it loads and starts what a process has once: libraries, threads, compiled Numba functions."""

Returned = TypeVar("Returned")


@dataclass(frozen=True)
class Mode:
    """How a case uses its layer."""

    name: str
    training: bool
    recompute: bool


MODES = (
    Mode("forward+backward", training=True, recompute=False),
    Mode("forward+backward, recompute", training=True, recompute=True),
    Mode("forward", training=False, recompute=False),
)


@dataclass(frozen=True)
class Case:
    """One measurement: a layer of ``workload`` on ``isa``, used as ``mode`` says by ``threads`` threads."""

    workload: Workload
    isa: str
    lora_dtype: str
    mode: Mode
    threads: int

    def config(self) -> MoEConfig:
        """Config of the layer."""
        return replace(self.workload.config(self.isa, self.lora_dtype), recompute=self.mode.recompute)

    def plan(self) -> MemoryPlan:
        """Plan of all that a process holds beyond the tensors of :data:`CALLER`."""
        plan = MemoryPlan.of(self.config(), self.workload.tokens, self.threads, self.mode.training)
        return replace(plan, held=tuple(tensor for tensor in plan.held if tensor.name not in CALLER))


@dataclass(frozen=True)
class Footprint:
    """What a case took.

    Attributes:
        case: what was measured.
        plan: without the tensors of :data:`CALLER`.
        measured: most bytes that the process held, beyond those that it held before it made the layer.
        scratch: bytes of the arena, which follow from the calls' own routing; the plan has those of the worst routing.
    """

    case: Case
    plan: MemoryPlan
    measured: int
    scratch: int

    @property
    def ratio(self) -> float:
        """Measured over planned."""
        return self.measured / self.plan.nbytes

    @property
    def unplanned(self) -> int:
        """Measured bytes beyond a plan with the scratch of the calls' own routing.

        The C library may keep a freed block for the next call: at W4 one more ``out`` of 2 MB, and none with
        MALLOC_TRIM_THRESHOLD_=0 (2026-11-24).
        """
        return self.measured - (self.plan.nbytes - self.plan.arena + self.scratch)

    @property
    def working(self) -> int:
        """Planned bytes of scratch and saved tensors."""
        kinds = self.plan.by_kind()
        return kinds.get("scratch", 0) + kinds.get("saved", 0)

    @property
    def beyond(self) -> int:
        """Measured bytes beyond the tensors that a user would name, see :func:`_has_a_name`."""
        step = self.plan.peak_step
        named = [t for t in self.plan.held if t.first <= step <= t.last and _has_a_name(t.kind, t.name)]
        return self.measured - sum(tensor.nbytes for tensor in named)


def _has_a_name(kind: str, name: str) -> bool:
    """Whether a user would name this tensor of a plan; the others are working memory."""
    return (
        kind in ("packed weight", "parameter", "gradient", "result")
        or name.endswith((".saved", ".saved_u"))
        or name.startswith("new ")
    )


def measure_footprints(
    workloads: Sequence[Workload], isas: Sequence[str], lora_dtype: str, threads: int
) -> Iterator[Footprint]:
    """Measure each of ``workloads`` on each of ``isas`` in every mode of :data:`MODES`.

    Raises:
        BenchError: see :func:`measure_footprint`.
    """
    cases = [Case(w, isa, lora_dtype, mode, threads) for w in workloads for isa in isas for mode in MODES]
    for case in track(cases, len(cases), "case", lambda case: f"{case.workload.name} {case.isa} {case.mode.name}"):
        yield measure_footprint(case)


def measure_footprint(case: Case) -> Footprint:
    """Measure ``case``.

    Raises:
        BenchError: the case does not fit into the free memory, or the system does not say what a process held.
    """
    plan = case.plan()
    if plan.nbytes > available_memory():
        what = f"{case.workload.name} ({case.mode.name})"
        raise BenchError(f"{what} takes {plan.nbytes} bytes, more than this machine has free")
    # Compiled here, so that the child starts no compiler.
    build([case.config(), replace(case, workload=WARM_UP).config()], progress=False)
    return Footprint(case, plan, *in_child(measure_case, case))


def in_child(function: Callable[..., Returned], *arguments: Any) -> Returned:
    """Call ``function`` in a fresh interpreter, which has none of this process's memory, and return its result.

    Raises:
        BenchError: the process is killed. What the function raises is raised here too.
    """
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(1, context) as pool:
            return pool.submit(function, *arguments).result()
    except BrokenProcessPool as error:
        raise BenchError("a process that was measured has died: did the machine run out of memory?") from error


def peak_of(function: Callable[[], object]) -> int:
    """Most bytes that this process holds while ``function`` runs, beyond those before.

    Raises:
        BenchError: the system does not say.
    """
    gc.collect()
    start = machine.start_peak()
    function()
    peak = machine.peak_since(start)
    if peak is None:
        raise BenchError("this system does not say how much memory a process has held (VmHWM in /proc/self/status)")
    return peak


def measure_case(case: Case) -> tuple[int, int]:
    """Bytes that this fresh process takes for the layer of ``case`` and its calls, and bytes of the arena."""
    torch.set_num_threads(case.threads)
    for warm in (replace(case, workload=WARM_UP), case):
        for shape in plan_kernels(warm.config(), case.isa).shapes:
            kernels.load(shape)
    use, warm_up = (_prepare(replace(case, workload=workload)) for workload in (case.workload, WARM_UP))
    warm_up()
    arenas.release()
    return peak_of(use), arenas.held_bytes()


def _prepare(case: Case) -> Callable[[], None]:
    """Make the tensors of a caller, and return a function that makes the layer and calls it."""
    workload = case.workload
    generator = torch.Generator().manual_seed(0)
    batch = next(batches(workload, generator))
    hidden, intermediate = workload.hidden, workload.intermediate
    extents = ((intermediate, hidden), (intermediate, hidden), (hidden, intermediate))
    # All experts share one matrix: memory that a source brings would count as the layer's.
    matrices = [
        torch.empty(extent, dtype=torch.bfloat16).uniform_(-0.05, 0.05, generator=generator) for extent in extents
    ]

    def use() -> None:
        gate, up, down = ((lambda _, matrix=matrix: matrix) for matrix in matrices)
        layer = MoELayer(case.config(), gate, up, down)
        check_isa(case.isa, layer.isa)
        for _ in range(CALLS):
            _call(layer, batch, case.mode.training)

    return use


def _call(layer: Callable[[Tensor, Tensor, Tensor], Tensor], batch: Batch, training: bool) -> None:
    # New leaves: gradients of the inputs must not add up over calls.
    x, weights = (tensor.detach().requires_grad_(training) for tensor in (batch.x, batch.weights))
    with torch.set_grad_enabled(training):
        out = layer(x, batch.topk_ids, weights)
        if training:
            torch.autograd.backward(out, batch.out_grad)


def footprint_table(footprints: Sequence[Footprint]) -> str:
    """Megabytes planned and measured."""
    head = (
        "workload",
        "isa",
        "mode",
        "plan MB",
        "measured MB",
        "ratio",
        "scratch+saved MB",
        "beyond MB",
        "unplanned MB",
    )
    rows: list[tuple[str, ...]] = [head]
    for f in footprints:
        figures = (f.plan.nbytes, f.measured, f.working, f.beyond, f.unplanned)
        planned, measured, *others = (f"{nbytes / 1e6:.1f}" for nbytes in figures)
        names = (f.case.workload.name, f.case.isa, f.case.mode.name)
        rows.append((*names, planned, measured, f"{f.ratio:.3f}", *others))
    return (
        f"{table(rows)}\n"
        f"Neither figure has what the caller made before: {', '.join(CALLER)}. Gradients of a former call are beside\n"
        "the new ones. Planned scratch is that of the worst routing.\n"
        "beyond: measured, less weights, parameters, all gradients, out, and what forward saved.\n"
        "unplanned: measured, less the plan with the scratch of the routing at hand."
    )


def footprint_json(footprint: Footprint) -> dict[str, Any]:
    """All figures in bytes."""
    case = footprint.case
    return {
        "name": case.workload.name,
        "isa": case.isa,
        "mode": case.mode.name,
        "lora_dtype": case.lora_dtype,
        "threads": case.threads,
        "planned_bytes": footprint.plan.nbytes,
        "planned_bytes_by_kind": dict(footprint.plan.by_kind()),
        "measured_bytes": footprint.measured,
        "ratio": footprint.ratio,
        "scratch_bytes": footprint.scratch,
        "beyond_bytes": footprint.beyond,
        "unplanned_bytes": footprint.unplanned,
    }
