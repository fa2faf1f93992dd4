"""Measures the cost along one axis, tokens, experts, LoRA rank or threads, with everything else fixed."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from jitmoe.bench.ceilings import Ceilings
from jitmoe.bench.measure import Options, Outcome, compare
from jitmoe.errors import BenchError
from jitmoe.oracle.workloads import FORWARD, TRAINING, Workload
from jitmoe.progress import track
from jitmoe.text import table

VALUES: dict[str, tuple[int, ...]] = {
    "tokens": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192),
    "experts": (8, 16, 32, 64, 128),
    "rank": (0, 1, 4, 8, 16, 32, 64),
}
"""Points of each axis. More experts share the same slots, so the arithmetic stays the same. Threads go from one to all
CPUs."""


@dataclass(frozen=True)
class Point:
    """What was measured at one value of the axis."""

    value: int
    outcome: Outcome
    threads: int


@dataclass(frozen=True)
class Sweep:
    """All points of one axis on one instruction set."""

    axis: str
    workload: Workload
    isa: str
    points: tuple[Point, ...]

    def seconds(self, pass_name: str) -> list[float]:
        """Median seconds of each point."""
        return [_of_pass(point, pass_name)[0] for point in self.points]

    def roofline(self, pass_name: str) -> list[float]:
        """Least possible seconds of each point, from the ceilings of the same run."""
        return [_of_pass(point, pass_name)[1] for point in self.points]


def run_sweep(axis: str, workload: Workload, options: Options, threads: int, quick: bool) -> Sweep:
    """Measure our layer alone at every point of ``axis``; ``quick`` takes every second point.

    Raises:
        BenchError: the axis is unknown; others as of :func:`~jitmoe.bench.measure.compare`.
    """
    points: list[Point] = []
    ceilings = None
    variants = list(_variants(axis, workload, threads, quick))
    for value, variant, used in track(variants, len(variants), "point", lambda point: f"{axis} = {point[0]}"):
        torch.set_num_threads(used)
        if ceilings is None or ceilings.threads != used:
            del ceilings  # frees its memory before the next one takes as much
            ceilings = Ceilings(used)
        points.append(Point(value, compare(variant, replace(options, peers=()), ceilings), used))
    torch.set_num_threads(threads)
    return Sweep(axis, workload, options.isas[0], tuple(points))


def sweep_table(sweep: Sweep) -> str:
    """Milliseconds beside the roofline for both passes."""
    rows = [(sweep.axis, "forward ms", "roofline", "share", "forward+backward ms", "roofline", "share")]
    columns = [(sweep.seconds(name), sweep.roofline(name)) for name in (FORWARD, TRAINING)]
    for index, point in enumerate(sweep.points):
        row = [str(point.value)]
        for seconds, least in columns:
            row += [
                f"{1e3 * seconds[index]:.4g}",
                f"{1e3 * least[index]:.4g}",
                f"{least[index] / seconds[index]:.0%}",
            ]
        rows.append(tuple(row))  # type: ignore[arg-type]
    return f"{sweep.workload.name} over {sweep.axis} on {sweep.isa}\n{table(rows)}"


def sweep_json(sweep: Sweep) -> dict[str, object]:
    """The sweep in seconds."""
    return {
        "axis": sweep.axis,
        "workload": sweep.workload.name,
        "isa": sweep.isa,
        "values": [point.value for point in sweep.points],
        "threads": [point.threads for point in sweep.points],
        "seconds": {name: sweep.seconds(name) for name in (FORWARD, TRAINING)},
        "roofline": {name: sweep.roofline(name) for name in (FORWARD, TRAINING)},
    }


def _variants(axis: str, workload: Workload, threads: int, quick: bool) -> Iterator[tuple[int, Workload, int]]:
    """Value, workload and threads of each point."""
    change: dict[str, Callable[[int], Workload]] = {
        "tokens": lambda value: replace(workload, tokens=value),
        "experts": lambda value: replace(workload, experts=value),
        "rank": lambda value: replace(workload, rank=value),
    }
    if axis == "threads":
        yield from ((count, workload, count) for count in range(1, threads + 1))
        return
    if axis not in change:
        raise BenchError(f"unknown axis {axis!r}; known are {', '.join(VALUES)}, threads")
    values = [value for value in VALUES[axis] if axis != "experts" or value >= workload.top_k]
    yield from ((value, change[axis](value), threads) for value in values[:: 2 if quick else 1])


def _of_pass(point: Point, pass_name: str) -> tuple[float, float]:
    measurement = next(m for m in point.outcome.measurements if m.pass_name == pass_name)
    return measurement.median, measurement.median * measurement.roofline_share(point.outcome.rates())
