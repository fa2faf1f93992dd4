"""Measurements as a table and as JSON."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from jitmoe.bench.measure import Measurement, Outcome
from jitmoe.plan.shapes import Shape
from jitmoe.text import table

CEILING_NAMES = {
    "fma": "float32 FMA",
    "bf16": "bf16 dot products",
    "tmul": "bf16 tile products",
    "vnni": "int8 VNNI",
    "read": "memory read",
}

UNSTEADY = 1.3
"""Largest over least value of a ceiling beyond which the figures get a warning: another program was computing."""


def outcome_table(outcome: Outcome) -> str:
    """One workload: its sizes, the ceilings, a row for each contender and pass, and the peers left out."""
    w = outcome.workload
    routing = "zipf" if w.zipf else "random"
    title = (
        f"{w.name}: E={w.experts} H={w.hidden} I={w.intermediate} K={w.top_k} r={w.rank} "
        f"tokens={w.tokens} routing={routing}"
    )
    isas = list(dict.fromkeys(m.contender.isa for m in outcome.measurements if m.contender.isa is not None))
    head = ("who", "pass", "ms", "min..max", "GFLOP/s", "roofline", "memory MB", "scratch MB", "kernels")
    rows = [(*head, *(f"/ {isa}" for isa in isas))]
    rows += [_row(measurement, outcome, isas) for measurement in outcome.measurements]
    left_out = [f"left out: {name} ({reason})" for name, reason in outcome.skipped.items()]
    return "\n".join([title, ceilings_line(outcome.ceilings), table(rows), *left_out])


def ceilings_line(ceilings: Mapping[str, Sequence[float]]) -> str:
    """Median, least and largest value of each ceiling over the rounds."""
    parts = []
    for name, values in ceilings.items():
        unit = "GB/s" if name == "read" else "GOP/s" if name == "vnni" else "GFLOP/s"
        low, middle, high = (value / 1e9 for value in (min(values), statistics.median(values), max(values)))
        parts.append(f"{CEILING_NAMES[name]} {middle:.4g} ({low:.4g}..{high:.4g}) {unit}")
    unsteady = max(max(values) / min(values) for values in ceilings.values())
    warning = f"\nunsteady machine: a ceiling moved by a factor of {unsteady:.1f}" if unsteady > UNSTEADY else ""
    return "ceilings: " + ", ".join(parts) + warning


def machine_lines(machine: Mapping[str, Any]) -> str:
    """The machine as a table, from :func:`jitmoe.bench.machine.describe`."""
    return table([(name, str(value)) for name, value in machine.items()])


def as_json(outcomes: Sequence[Outcome], peak_bytes: int) -> dict[str, Any]:
    """Everything that was measured, in seconds, bytes, operations, and operations or bytes a second."""
    return {"process_peak_bytes": peak_bytes, "workloads": [_outcome_json(outcome) for outcome in outcomes]}


def _row(measurement: Measurement, outcome: Outcome, isas: Sequence[str]) -> tuple[str, ...]:
    low, high = (1e3 * value for value in (min(measurement.seconds), max(measurement.seconds)))
    return (
        measurement.contender.name,
        measurement.pass_name,
        f"{1e3 * measurement.median:.4g}",
        f"{low:.4g}..{high:.4g}",
        f"{measurement.flops / 1e9:.4g}",
        f"{measurement.roofline_share(outcome.rates()):.0%}",
        _megabytes(measurement.peak),
        _megabytes(measurement.scratch),
        ", ".join(_kernel(shape) for shape in measurement.kernels) or "-",
        *(f"{measurement.ratios[isa]:.2f}" for isa in isas),
    )


def _outcome_json(outcome: Outcome) -> dict[str, Any]:
    w = outcome.workload
    return {
        "name": w.name,
        "sizes": {
            "experts": w.experts,
            "hidden": w.hidden,
            "intermediate": w.intermediate,
            "top_k": w.top_k,
            "rank": w.rank,
            "tokens": w.tokens,
            "zipf": w.zipf,
        },
        "ceilings": {name: list(values) for name, values in outcome.ceilings.items()},
        "results": [_measurement_json(measurement, outcome) for measurement in outcome.measurements],
        "skipped": dict(outcome.skipped),
    }


def _measurement_json(measurement: Measurement, outcome: Outcome) -> dict[str, Any]:
    return {
        "contender": measurement.contender.name,
        "pass": measurement.pass_name,
        "isa": measurement.contender.isa,
        "kernels": [shape.name for shape in measurement.kernels],
        "seconds": list(measurement.seconds),
        "median": measurement.median,
        "flop": measurement.work.flop,
        "bytes": measurement.work.nbytes,
        "flops": measurement.flops,
        "roofline_share": measurement.roofline_share(outcome.rates()),
        "least_seconds": measurement.roofline_share(outcome.rates()) * measurement.median,
        "peak_bytes": measurement.peak,
        "scratch_bytes": measurement.scratch,
        "time_over": dict(measurement.ratios),
    }


def _kernel(shape: Shape) -> str:
    return f"{shape.isa} M_STEP {shape.m_step}"


def _megabytes(nbytes: int | None) -> str:
    return "-" if nbytes is None else f"{nbytes / 1e6:.1f}"
