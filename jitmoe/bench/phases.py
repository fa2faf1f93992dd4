"""Where the time of a call of our layer goes: around the kernels, and by phase inside timed instances of them."""

import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from jitmoe.bench.contenders import Contender, check_isa, our_layer
from jitmoe.bench.measure import SEED, call_once
from jitmoe.bench.trace import KERNEL_BACKWARD, KERNEL_FORWARD, PLAN, watch
from jitmoe.host.route import route
from jitmoe.jit.abi import PHASES
from jitmoe.oracle.data import Batch, batches, make_base, make_lora
from jitmoe.oracle.workloads import PASSES, TRAINING, Work, Workload, work_of
from jitmoe.progress import track
from jitmoe.text import table

REST = "torch and autograd"
ROUTE = "route"
STEPS = (ROUTE, PLAN, KERNEL_FORWARD, KERNEL_BACKWARD, REST)
LORA = "LoRA, against a layer without"
WAITS = "waiting at barriers"

Steps = defaultdict[str, list[float]]
"""Seconds of each round, by part of a call or by phase."""


@dataclass
class Phases:
    """Seconds of each part of a call in each round.

    Attributes:
        workload: sizes.
        isa: instruction set of the kernels.
        seconds: by pass and part; the parts of :data:`STEPS` add up to the call.
        inside: by pass and phase of :data:`jitmoe.jit.abi.PHASES`, seconds of all threads divided by their number;
            with :data:`WAITS` they add up to the kernels.
        beside: by pass and name, seconds that were measured apart from the call.
        active: number of experts with rows, of each round.
    """

    workload: Workload
    isa: str
    seconds: dict[str, Steps] = field(default_factory=lambda: {name: defaultdict(list) for name in PASSES})
    inside: dict[str, Steps] = field(default_factory=lambda: {name: defaultdict(list) for name in PASSES})
    beside: dict[str, Steps] = field(default_factory=lambda: {name: defaultdict(list) for name in PASSES})
    active: list[int] = field(default_factory=list)

    def median(self, pass_name: str, step: str) -> float:
        """Median seconds of a part of the call."""
        return statistics.median(self.seconds[pass_name][step])

    def lora_share(self, pass_name: str) -> float:
        """What LoRA takes of the call, against the layer without it in the same rounds."""
        whole = sum(self.median(pass_name, step) for step in STEPS)
        return statistics.median(self.beside[pass_name][LORA]) / whole


def measure_phases(workload: Workload, isa: str, repeat: int) -> Phases:
    """Run the layer and a twin without LoRA ``repeat`` times each, interleaved.

    Raises:
        BenchError: another instruction set ran than was asked for.
    """
    generator = torch.Generator().manual_seed(SEED)
    base = make_base(workload, generator)
    layer = our_layer(workload, isa, base, make_lora(workload, generator))
    bare = our_layer(replace(workload, rank=0), isa, base, None) if workload.rank else None
    del base
    phases = Phases(workload, isa)
    inputs = batches(workload, generator)
    for training in (False, True):
        with watch(timed=True):
            _warm_up([layer], next(inputs), training)
        _warm_up([layer, bare], next(inputs), training)
    for _ in track(range(repeat), repeat, f"{workload.name} round"):
        batch = next(inputs)
        phases.active.append(batch.active)
        for pass_name in PASSES:
            _note_call(phases, layer, batch, pass_name)
            if bare:
                _note_lora(phases, layer, bare, batch, pass_name)
    return phases


def phases_table(phases: Phases) -> str:
    """Milliseconds, share of the call, and rate of each part and phase."""
    rows = [("pass", "step", "ms", "share", "rate")]
    for pass_name in PASSES:
        total = sum(phases.median(pass_name, step) for step in STEPS)
        for step in STEPS:
            seconds = phases.median(pass_name, step)
            if seconds:
                rows.append((pass_name, step, *_figures(seconds, total), _rate(phases, step, seconds)))
        rows.append((pass_name, "all", *_figures(total, total), ""))
        for part in (phases.inside, phases.beside):
            for name, values in part[pass_name].items():
                seconds = statistics.median(values)
                rows.append((pass_name, f"  {name}", *_figures(seconds, total), _step_rate(phases, name, seconds)))
    return f"{phases.workload.name} on {phases.isa}\n{table(rows)}"


def phases_json(phases: Phases) -> dict[str, object]:
    """The seconds of every round."""
    return {
        "name": phases.workload.name,
        "isa": phases.isa,
        "passes": {name: dict(steps) for name, steps in phases.seconds.items()},
        "inside": {name: dict(values) for name, values in phases.inside.items()},
        "beside": {name: dict(values) for name, values in phases.beside.items()},
    }


def _warm_up(contenders: Sequence[Contender | None], batch: Batch, training: bool) -> None:
    for contender in contenders:
        if contender is not None:
            call_once(contender, batch, training)


def _note_call(phases: Phases, layer: Contender, batch: Batch, pass_name: str) -> None:
    with watch(timed=True) as trace:
        total, _ = call_once(layer, batch, pass_name == TRAINING)
    check_isa(phases.isa, trace.kernel_isa())
    known = {ROUTE: _route_seconds(phases.workload, batch)}
    known |= {step: trace.seconds[step] for step in STEPS if step not in (ROUTE, REST)}
    for step, seconds in (known | {REST: total - sum(known.values())}).items():
        phases.seconds[pass_name][step].append(seconds)
    inside = dict(zip(PHASES, trace.phase_seconds / torch.get_num_threads(), strict=True))
    waits = trace.seconds[KERNEL_FORWARD] + trace.seconds[KERNEL_BACKWARD] - sum(inside.values())
    for step, seconds in (inside | {WAITS: waits}).items():
        phases.inside[pass_name][step].append(float(seconds))


def _route_seconds(workload: Workload, batch: Batch) -> float:
    """Seconds of routing ``batch`` once more by itself; backward routes nothing."""
    ids = batch.topk_ids.numpy()
    start = time.perf_counter()
    route(ids, workload.experts)
    return time.perf_counter() - start


def _note_lora(phases: Phases, layer: Contender, bare: Contender, batch: Batch, pass_name: str) -> None:
    with_lora, without = (call_once(contender, batch, pass_name == TRAINING)[0] for contender in (layer, bare))
    phases.beside[pass_name][LORA].append(with_lora - without)


def _rate(phases: Phases, step: str, seconds: float) -> str:
    if step not in (KERNEL_FORWARD, KERNEL_BACKWARD):
        return ""
    active = statistics.mean(phases.active)
    work = work_of(phases.workload, False, active)
    if step == KERNEL_BACKWARD:
        both = work_of(phases.workload, True, active)
        work = Work(both.flop - work.flop, both.nbytes - work.nbytes)
    return f"{work.flop / seconds / 1e9:.4g} GFLOP/s, {work.nbytes / seconds / 1e9:.4g} GB/s"


def _step_rate(phases: Phases, step: str, seconds: float) -> str:
    """GFLOP/s of a phase that multiplies base weights: 2 H I operations a slot and matrix."""
    matrices = {"gate_up": 2, "down": 1, "act_grad": 1, "x_grad": 2}.get(step, 0)
    workload = phases.workload
    flop = 2.0 * matrices * workload.hidden * workload.intermediate * workload.slots
    return f"{flop / seconds / 1e9:.4g} GFLOP/s" if flop and seconds else ""


def _figures(seconds: float, total: float) -> tuple[str, str]:
    return f"{1e3 * seconds:.4g}", f"{seconds / total:.1%}"
