"""Measures every target of this library on this machine, in one run.

The targets are for a machine whose fastest instruction is the float32 multiply-add. With dot products of bfloat16 our
ceiling is twice as high, and plain torch in bfloat16 is a stronger peer.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jitmoe.bench.ceilings import Ceilings
from jitmoe.bench.footprint import MODES, Case, Footprint, measure_footprint
from jitmoe.bench.measure import Measurement, Options, Outcome, compare
from jitmoe.bench.phases import LORA, STEPS, Phases, measure_phases
from jitmoe.bench.startup import Startup, measure_startup
from jitmoe.memory.plan import MemoryPlan
from jitmoe.oracle.workloads import FORWARD, TRAINING, W6, find_workload
from jitmoe.text import table

MEASURED = ("W1", "W2", "W3", "W4", "W5", "W2z")

ROOFLINE = {
    ("W2", FORWARD): 0.85,
    ("W5", FORWARD): 0.85,
    ("W2", TRAINING): 0.80,
    ("W5", TRAINING): 0.80,
    ("W4", FORWARD): 0.70,
    ("W4", TRAINING): 0.70,
    ("W1", FORWARD): 0.90,
    ("W1", TRAINING): 0.90,
    ("W3", FORWARD): 0.90,
}
"""Least share of the roofline; it is that of the read bandwidth where memory bounds the work."""

BF16, FLOAT32, PEFT = "torch bf16", "torch float32", "transformers + PEFT"
PEER_NAMES = {BF16: ("torch-bf16", "grouped-bf16"), FLOAT32: ("torch-f32", "grouped-f32"), PEFT: ("peft",)}

FASTER = {
    ("W2", FORWARD, BF16): 4.5,
    ("W2", FORWARD, FLOAT32): 1.7,
    ("W2", TRAINING, BF16): 4.0,
    ("W2", TRAINING, FLOAT32): 1.8,
    ("W5", FORWARD, BF16): 4.5,
    ("W5", FORWARD, FLOAT32): 1.4,
    ("W5", TRAINING, BF16): 4.5,
    ("W5", TRAINING, FLOAT32): 1.5,
    ("W4", FORWARD, BF16): 4.5,
    ("W4", FORWARD, FLOAT32): 1.8,
    ("W4", TRAINING, BF16): 4.0,
    ("W4", TRAINING, FLOAT32): 1.8,
    ("W1", FORWARD, BF16): 3.5,
    ("W1", FORWARD, FLOAT32): 2.3,
    ("W1", TRAINING, BF16): 3.5,
    ("W1", TRAINING, FLOAT32): 1.9,
    ("W1", TRAINING, PEFT): 100.0,
}
"""Least ratio of the time of the best peer of a kind to ours."""


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
    phases = measure_phases(w2, isa, options.repeat)
    footprint = measure_footprint(Case(w2, isa, options.lora_dtype, MODES[0], threads))
    startup = measure_startup(w2, isa, options.repeat)
    return [
        *_roofline_lines(outcomes, isa),
        *_faster_lines(outcomes, isa),
        *_shape_lines(outcomes, phases, isa),
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


def _shape_lines(outcomes: Mapping[str, Outcome], phases: Phases, isa: str) -> Iterator[Line]:
    """Targets that relate measurements of our own layer."""
    skew = _ours(outcomes["W2z"], isa, FORWARD).flops / _ours(outcomes["W2"], isa, FORWARD).flops
    yield Line("W2z forward, speed over that of W2", ">= 0.9", f"{skew:.2f}", skew >= 0.9)
    forward, both = (_ours(outcomes["W2"], isa, name).median for name in (FORWARD, TRAINING))
    ratio = both / forward - 1.0
    yield Line("W2 backward over forward", "<= 1.25", f"{ratio:.2f}", ratio <= 1.25)
    whole = sum(phases.median(TRAINING, step) for step in STEPS)
    lora = statistics.median(phases.beside[TRAINING][LORA]) / whole
    yield Line("LoRA's share of W2 forward+backward", "<= 6 %", f"{lora:.1%}", lora <= 0.06)


def _other_lines(footprint: Footprint, startup: Startup, isa: str, threads: int) -> Iterator[Line]:
    """Targets of memory, and of the time before the first result."""
    yield Line("W2 packing, over cloning the weights", "<= 2", f"{startup.packing:.2f}", startup.packing <= 2.0)
    slowest = max(startup.compilation.values())
    yield Line("one kernel, compiled", "<= 5 s", f"{slowest:.1f} s", slowest <= 5.0)
    what = "warm process to first result, beyond importing torch"
    yield Line(what, "<= 1.5 s", f"{startup.process:.2f} s", startup.process <= 1.5)
    what = "W2 forward+backward, memory beyond weights, x, out, gradients and 4 I a slot"
    yield Line(what, "<= 60 MB", f"{footprint.beyond / 1e6:.0f} MB", footprint.beyond <= 60e6)
    for recompute, most in ((False, 4.0), (True, 2.2)):
        kinds = MemoryPlan.of(W6.config(isa), W6.tokens, threads, recompute=recompute).by_kind()
        planned = (kinds["scratch"] + kinds["saved"]) / 1e9
        what = f"W6 planned scratch and saved{', recompute' if recompute else ''}"
        yield Line(what, f"<= {most} GB", f"{planned:.2f} GB", planned <= most)
