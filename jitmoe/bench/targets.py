"""Measures every target of this library on this machine, in one run.

They are the same for each instruction set of vectors: shares of the roofline that it has here. Those of AMX are counts,
which tests/test_amx.py takes from the emulator.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from jitmoe.bench.ceilings import Ceilings
from jitmoe.bench.footprint import MODES, Case, Footprint, measure_footprint
from jitmoe.bench.measure import Measurement, Options, Outcome, compare
from jitmoe.bench.phases import REST, ROUTE, Phases, measure_phases
from jitmoe.bench.startup import Startup, measure_startup
from jitmoe.bench.trace import PLAN
from jitmoe.memory.plan import MemoryPlan
from jitmoe.oracle.workloads import FORWARD, TRAINING, W6, find_workload
from jitmoe.text import table

MEASURED = ("W1", "W2", "W3", "W4", "W5", "W2z")

ROOFLINE = {
    ("W2", FORWARD): 0.90,
    ("W5", FORWARD): 0.90,
    ("W2", TRAINING): 0.88,
    ("W5", TRAINING): 0.88,
    ("W4", FORWARD): 0.85,
    ("W4", TRAINING): 0.82,
    ("W1", FORWARD): 0.90,
    ("W1", TRAINING): 0.85,
    ("W3", FORWARD): 0.80,
}
"""Least share of the roofline; it is that of the read bandwidth where memory bounds the work."""

FLOAT32, PEFT = "torch float32", "transformers + PEFT"
PEER_NAMES = {FLOAT32: ("torch-f32", "grouped-f32"), PEFT: ("peft",)}

FASTER = {
    ("W2", FORWARD, FLOAT32): 1.7,
    ("W2", TRAINING, FLOAT32): 1.8,
    ("W5", FORWARD, FLOAT32): 1.4,
    ("W5", TRAINING, FLOAT32): 1.5,
    ("W4", FORWARD, FLOAT32): 1.8,
    ("W4", TRAINING, FLOAT32): 1.8,
    ("W1", FORWARD, FLOAT32): 2.3,
    ("W1", TRAINING, FLOAT32): 1.9,
    ("W1", TRAINING, PEFT): 10.0,
}
"""Least ratio of the time of the best peer of a kind to ours."""

LORA_SHARE = {8: 0.04, 32: 0.12}
"""Largest share of LoRA in forward and backward of W2, by rank."""


@dataclass(frozen=True)
class Line:
    """One target: its name, the figures wanted and measured as they are printed, and whether it is met."""

    what: str
    wanted: str
    measured: str
    met: bool


def measure_workloads(options: Options, threads: int) -> Iterator[Outcome]:
    """Measure the workloads of :data:`MEASURED`; errors as of :func:`~jitmoe.bench.measure.compare`."""
    ceilings = Ceilings(threads)
    for name in MEASURED:
        yield compare(find_workload(name), options, ceilings)


def judge_targets(measured: Sequence[Outcome], options: Options, threads: int) -> list[Line]:
    """Measure phases, memory and start-up of W2 too, and compare everything with the targets.

    Args:
        measured: all outcomes of :func:`measure_workloads`.
        options: those of ``measured``, with one instruction set.
        threads: of a call.

    Raises:
        BenchError: a measurement fails.
    """
    (isa,) = options.isas
    outcomes = {outcome.workload.name: outcome for outcome in measured}
    w2 = find_workload("W2")
    ranks = [measure_phases(replace(w2, rank=rank), isa, options.repeat) for rank in LORA_SHARE]
    decode = measure_phases(find_workload("W3"), isa, options.repeat)
    footprint = measure_footprint(Case(w2, isa, options.lora_dtype, MODES[0], threads))
    startup = measure_startup(w2, isa, options.repeat)
    return [
        *_roofline_lines(outcomes, isa),
        *_faster_lines(outcomes, isa),
        *_shape_lines(outcomes, isa),
        *_lora_lines(ranks),
        _fixed_cost_line(decode),
        *_other_lines(footprint, startup, isa, threads),
    ]


def targets_table(lines: Sequence[Line]) -> str:
    """All lines, and how many are met."""
    rows = [("target", "wanted", "measured", "met")]
    rows += [(line.what, line.wanted, line.measured, "yes" if line.met else "NO") for line in lines]
    return f"{table(rows)}\n{sum(line.met for line in lines)} of {len(lines)} targets met"


def targets_json(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """All lines for other programs."""
    return [asdict(line) for line in lines]


def _ours(outcome: Outcome, isa: str, pass_name: str) -> Measurement:
    return next(m for m in outcome.measurements if m.contender.isa == isa and m.pass_name == pass_name)


def _roofline_lines(outcomes: Mapping[str, Outcome], isa: str) -> Iterator[Line]:
    for (name, pass_name), least in ROOFLINE.items():
        outcome = outcomes[name]
        ours, rates = _ours(outcome, isa, pass_name), outcome.rates()
        share = ours.roofline_share(rates)
        by_memory = ours.work.nbytes / rates["read"] > ours.work.flop / ours.products_ceiling(rates)
        bound = "memory read" if by_memory else "arithmetic"
        yield Line(f"{name} {pass_name}, of the roofline", f">= {least:.0%}", f"{share:.0%} of {bound}", share >= least)


def _faster_lines(outcomes: Mapping[str, Outcome], isa: str) -> Iterator[Line]:
    for (name, pass_name, peer), least in FASTER.items():
        ratios = [
            m.ratios[isa]
            for m in outcomes[name].measurements
            if m.contender.name in PEER_NAMES[peer] and m.pass_name == pass_name
        ]
        what = f"{name} {pass_name}, times faster than {peer}"
        measured = f"{min(ratios):.3g}" if ratios else "not measured: see --peers"
        yield Line(what, f">= {least:g}", measured, bool(ratios) and min(ratios) >= least)


def _shape_lines(outcomes: Mapping[str, Outcome], isa: str) -> Iterator[Line]:
    """Targets that relate measurements of our own layer."""
    skew = _ours(outcomes["W2z"], isa, FORWARD).flops / _ours(outcomes["W2"], isa, FORWARD).flops
    yield Line("W2z forward, speed over that of W2", ">= 0.95", f"{skew:.2f}", skew >= 0.95)
    forward, both = (_ours(outcomes["W2"], isa, name).median for name in (FORWARD, TRAINING))
    ratio = both / forward - 1.0
    yield Line("W2 backward over forward", "<= 1.15", f"{ratio:.2f}", ratio <= 1.15)


def _lora_lines(ranks: Sequence[Phases]) -> Iterator[Line]:
    """What LoRA takes, against a layer without in the same rounds."""
    for phases in ranks:
        rank, share = phases.workload.rank, phases.lora_share(TRAINING)
        most = LORA_SHARE[rank]
        what = f"LoRA's share of W2 forward+backward, rank {rank}"
        yield Line(what, f"<= {most:.0%}", f"{share:.1%}", share <= most)
    over = 1.0 / (1.0 - share)
    yield Line(f"W2 forward+backward, rank {rank} over rank 0", "<= 1.15", f"{over:.2f}", over <= 1.15)


def _fixed_cost_line(decode: Phases) -> Line:
    """What a call of one token takes around the kernel: route, plan, Python and torch."""
    seconds = sum(decode.median(FORWARD, step) for step in (ROUTE, PLAN, REST))
    return Line("W3 forward, outside the kernel", "<= 0.25 ms", f"{1e3 * seconds:.2f} ms", seconds <= 0.25e-3)


def _other_lines(footprint: Footprint, startup: Startup, isa: str, threads: int) -> Iterator[Line]:
    """Targets of memory, and of the time before the first result."""
    yield Line("W2 packing, over cloning the weights", "<= 2", f"{startup.packing:.2f}", startup.packing <= 2.0)
    slowest = max(startup.compilation.values())
    yield Line("one kernel, compiled", "<= 4 s", f"{slowest:.1f} s", slowest <= 4.0)
    what = "warm process to first result, beyond importing torch"
    yield Line(what, "<= 0.7 s", f"{startup.process:.2f} s", startup.process <= 0.7)
    what = "W2 forward+backward, memory beyond weights, x, out, gradients and 4 I + 12 r a slot"
    yield Line(what, "<= 35 MB", f"{footprint.beyond / 1e6:.0f} MB", footprint.beyond <= 35e6)
    for recompute, most in ((False, 2.85), (True, 1.13)):
        kinds = MemoryPlan.of(W6.config(isa), W6.tokens, threads, recompute=recompute).by_kind()
        planned = (kinds["scratch"] + kinds["saved"]) / 1e9
        what = f"W6 planned scratch and saved{', recompute' if recompute else ''}"
        yield Line(what, f"<= {most} GB", f"{planned:.2f} GB", planned <= most)
