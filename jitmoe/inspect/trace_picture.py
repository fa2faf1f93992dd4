"""The picture of a trace: steps by experts, coloured by magnitude, with what is not finite in red."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from jitmoe.errors import TraceError
from jitmoe.inspect.records import Record


def heat_map(records: Iterable[Record]) -> tuple[list[str], list[str], npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Names of steps and experts, [steps, experts] float64 log10 of the largest mean magnitude, and bool not finite.

    Sums over experts have the column "all". A cell without records, or with zeros only, is NaN.
    """
    members = list(records)
    steps = list(dict.fromkeys(record.name for record in members))
    experts = sorted({record.expert for record in members if record.expert is not None})
    columns: list[int | None] = [*experts, *([None] if any(r.expert is None for r in members) else [])]
    means = np.zeros((len(steps), len(columns)))
    bad = np.zeros(means.shape, bool)
    for record in members:
        cell = steps.index(record.name), columns.index(record.expert)
        means[cell] = np.fmax(means[cell], record.absmean)
        bad[cell] |= record.bad > 0
    logarithms = np.full(means.shape, math.nan)
    np.log10(means, where=means > 0, out=logarithms)
    return steps, ["all" if c is None else str(c) for c in columns], logarithms, bad


def draw(records: Sequence[Record], title: str, path: str | Path) -> None:
    """Write the heat map of ``records`` to a PNG.

    Raises:
        TraceError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise TraceError("save_png needs matplotlib: pip install 'jitmoe[bench]'") from error

    steps, experts, means, bad = heat_map(records)
    # Not pyplot: no window, and nothing left behind in a user's session.
    figure = Figure(figsize=(min(4 + 0.25 * len(experts), 24), 2 + 0.22 * len(steps)), layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor("0.92")
    image = axes.imshow(means, aspect="auto", interpolation="nearest", cmap="viridis")
    marks = np.where(bad, 1.0, math.nan)
    axes.imshow(marks, aspect="auto", interpolation="nearest", cmap="Reds", vmin=0.0, vmax=1.2)
    shown = range(0, len(experts), math.ceil(len(experts) / 64))
    axes.set_xticks(list(shown), [experts[i] for i in shown], fontsize=7)
    axes.set_yticks(range(len(steps)), steps, fontsize=7)
    axes.set_xlabel("expert")
    axes.set_title(title, fontsize=8, wrap=True)
    figure.colorbar(image, label="log10 of the mean magnitude; red: not finite; grey: all zero, or no such cell")
    figure.savefig(path, dpi=120, format="png")
