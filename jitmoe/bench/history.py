"""Figures of another time beside those of now: what changed beyond the noise of the two runs."""

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jitmoe.bench.measure import Measurement, Outcome
from jitmoe.errors import BenchError
from jitmoe.text import table

CONFIDENCE = 0.95
"""Of the interval that must leave 1 out for a change to count."""


@dataclass(frozen=True)
class Change:
    """One pass of one workload, before and now.

    Attributes:
        workload: its name.
        pass_name: "forward" or "forward+backward".
        isa: instruction set.
        before: median of seconds, or of seconds over the least possible ones where the runs were at other times.
        now: likewise.
        ratio: of now over before.
        low: least ratio that the noise of the runs allows.
        high: greatest one.
    """

    workload: str
    pass_name: str
    isa: str
    before: float
    now: float
    ratio: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """In a word."""
        return "SLOWER" if self.low > 1 else "faster" if self.high < 1 else "same within the noise"


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Bounds of the median by order statistics, with :data:`CONFIDENCE` or as near as so few values allow.

    The k-th least and k-th greatest of n values hold the median between them but for 2 P(Bin(n, 1/2) < k) (Conover,
    Practical Nonparametric Statistics, 3.2); fewer than six values cannot reach 0.95 and give their whole range.
    """
    ordered, n = sorted(values), len(values)
    outside, k = 0.0, 0
    while k < n // 2 and outside + 2 * math.comb(n, k) / 2**n <= 1 - CONFIDENCE:
        outside += 2 * math.comb(n, k) / 2**n
        k += 1
    place = max(k - 1, 0)
    return ordered[place], ordered[n - 1 - place]


def change(
    workload: str, pass_name: str, isa: str, before: Sequence[float], now: Sequence[float], ratios: Sequence[float]
) -> Change:
    """Of rounds in which both ran: ``ratios`` are now over before of each."""
    low, high = interval(ratios)
    medians = statistics.median(before), statistics.median(now)
    return Change(workload, pass_name, isa, *medians, statistics.median(ratios), low, high)


def read_record(path: Path) -> dict[str, Any]:
    """A file that ``jitmoe bench --record`` wrote.

    Raises:
        BenchError: it cannot be read, or is another file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        list(_recorded(content))
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError, RecursionError) as error:
        raise BenchError(f"{path} is no record of `jitmoe bench --record`: {error!r}") from error
    return dict(content)


def compare_with_record(record: Mapping[str, Any], outcomes: Sequence[Outcome]) -> list[Change]:
    """Our layer's passes that both runs have, each over the least time that its own run's ceilings allowed.

    Raises:
        BenchError: they have none in common.
    """
    before = dict(_recorded(record))
    changes = []
    for outcome in outcomes:
        for measurement in outcome.measurements:
            key = (outcome.workload.name, measurement.pass_name, measurement.contender.isa)
            if key in before:
                changes.append(_apart(key, before[key], _over_least(measurement, outcome)))
    if not changes:
        raise BenchError("the record has none of these workloads and instruction sets")
    return changes


def changes_table(changes: Sequence[Change], before: str) -> str:
    """All of them, and how many are slower."""
    rows = [("workload", "pass", "isa", before, "now", "now / before", "95 %", "")]
    rows += [
        (c.workload, c.pass_name, c.isa, f"{c.before:.4g}", f"{c.now:.4g}", f"{c.ratio:.3f}",
         f"{c.low:.3f}..{c.high:.3f}", c.verdict)
        for c in changes
    ]  # fmt: skip
    slower = [f"{c.workload} {c.pass_name} ({c.isa})" for c in changes if c.low > 1]
    return f"{table(rows)}\n" + (f"slower: {', '.join(slower)}" if slower else "nothing is slower beyond the noise")


def changes_json(changes: Sequence[Change]) -> list[dict[str, Any]]:
    """All of them for other programs."""
    return [{**asdict(c), "verdict": c.verdict} for c in changes]


Key = tuple[str, str, str | None]


def _recorded(record: Mapping[str, Any]) -> Iterator[tuple[Key, list[float]]]:
    for workload in record["workloads"]:
        for result in workload["results"]:
            if result["isa"] is not None:
                key = (workload["name"], result["pass"], result["isa"])
                yield key, [seconds / result["least_seconds"] for seconds in result["seconds"]]


def _over_least(measurement: Measurement, outcome: Outcome) -> list[float]:
    least = measurement.roofline_share(outcome.rates()) * measurement.median
    return [seconds / least for seconds in measurement.seconds]


def _apart(key: Key, before: Sequence[float], now: Sequence[float]) -> Change:
    """Of two runs apart in time: their intervals are apart, or nothing can be said."""
    (old_low, old_high), (low, high) = interval(before), interval(now)
    medians = statistics.median(before), statistics.median(now)
    workload, pass_name, isa = key
    return Change(workload, pass_name, str(isa), *medians, medians[1] / medians[0], low / old_high, high / old_low)
