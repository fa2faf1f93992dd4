"""Pictures: the roofline with a point for each measurement, and a sweep beside its roofline."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jitmoe.bench.measure import Measurement, Outcome
from jitmoe.bench.sweep import Sweep
from jitmoe.errors import BenchError
from jitmoe.oracle.workloads import FORWARD, TRAINING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS = ("#c1272d", "#e8743b", "#7b1fa2", "#8d6e63")
PEERS = ("#1b4f72", "#2e86c1", "#117864", "#45b39d", "#7d6608", "#616a6b")
MARKERS = {FORWARD: "o", TRAINING: "s"}


def require_matplotlib() -> None:
    """Fail before the measurement, not after it.

    Raises:
        BenchError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise BenchError("--plot needs matplotlib: pip install 'jitmoe[bench]'") from error


def plot_roofline(outcomes: Sequence[Outcome], title: str, path: Path) -> None:
    """Write a PNG: useful operations a second over operations per byte, under the measured ceilings (Williams 2009)."""
    figure, axes = _figure()
    rates = {name: max(outcome.rates()[name] for outcome in outcomes) for name in outcomes[0].rates()}
    intensities = [m.work.flop / m.work.nbytes for outcome in outcomes for m in outcome.measurements]
    left, right = min(intensities) / 2, max(max(intensities), _ridge(rates)) * 2
    _draw_roof(axes, rates, left, right)
    names = list(dict.fromkeys(m.contender.name for outcome in outcomes for m in outcome.measurements))
    ours = {m.contender.name for outcome in outcomes for m in outcome.measurements if m.contender.isa}
    colors = _colors(names, ours)
    for outcome in outcomes:
        for measurement in outcome.measurements:
            _draw_point(axes, measurement, colors[measurement.contender.name])
        best = max(outcome.measurements, key=lambda m: m.flops)
        place = (best.work.flop / best.work.nbytes, best.flops / 1e9)
        axes.annotate(outcome.workload.name, place, (0, 9), textcoords="offset points", ha="center", fontsize=9)
    for name in names:
        axes.plot([], [], "o", color=colors[name], fillstyle="full" if name in ours else "none", label=name)
    for pass_name, marker in MARKERS.items():
        axes.plot([], [], marker, color="black", fillstyle="none", label=pass_name)
    axes.set(xscale="log", yscale="log", xlim=(left, right), title=title)
    axes.set(xlabel="useful FLOP per byte that must move", ylabel="useful GFLOP/s")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(_minor_tick)
    axes.grid(alpha=0.25, which="both")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.savefig(path, dpi=150, format="png")


def plot_sweep(sweep: Sweep, title: str, path: Path) -> None:
    """Write a PNG: milliseconds over the axis for both passes, the roofline dashed."""
    figure, axes = _figure()
    values = [point.value for point in sweep.points]
    for pass_name, color in zip((FORWARD, TRAINING), OURS, strict=False):
        milliseconds, least = ([1e3 * s for s in series(pass_name)] for series in (sweep.seconds, sweep.roofline))
        axes.plot(
            values, milliseconds, marker=MARKERS[pass_name], color=color, label=f"jitmoe {sweep.isa}, {pass_name}"
        )
        axes.plot(values, least, "--", color=color, alpha=0.7, label=f"roofline, {pass_name}")
    # A rank of zero has no place on a logarithmic axis.
    axes.set(xscale="log" if min(values) else "linear", yscale="log", title=title)
    axes.set(xticks=values, xticklabels=[str(value) for value in values], xlabel=sweep.axis, ylabel="ms")
    axes.set_xticks([], minor=True)
    # A sweep may lie between two powers of ten, where there are no major ticks.
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(_minor_tick)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=150, format="png")


def _figure() -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    # Not pyplot: no window, and nothing left behind in a user's session.
    figure = Figure(figsize=(9.0, 5.4), layout="constrained")
    return figure, figure.add_subplot()


def _minor_tick(value: float, _: float) -> str:
    """Label 2, 3 and 5 of each decade: all nine would run into each other."""
    return f"{value:g}" if f"{value:e}"[0] in "235" else ""


def _ridge(rates: dict[str, float]) -> float:
    return max(rates["fma"], rates.get("bf16", 0.0), rates.get("tmul", 0.0)) / rates["read"]


def _draw_roof(axes: "Axes", rates: dict[str, float], left: float, right: float) -> None:
    bandwidth = rates["read"]
    for name, label, style, below in (
        ("fma", "float32 FMA", "--", -11),
        ("bf16", "bf16 dot products", "-", 3),
        ("tmul", "bf16 tile products", "-", 3),
    ):
        if name in rates:
            ridge = rates[name] / bandwidth
            axes.plot(
                [left, ridge, right], [left * bandwidth / 1e9, *[rates[name] / 1e9] * 2], style, color="0.35", lw=1.2
            )
            text = f"{label} {rates[name] / 1e9:.0f} GFLOP/s"
            place = (right, rates[name] / 1e9)
            axes.annotate(text, place, (-4, below), textcoords="offset points", fontsize=8, color="0.35", ha="right")
    text = f"memory read {bandwidth / 1e9:.1f} GB/s"
    axes.annotate(text, (left, left * bandwidth / 1e9), (14, -8), textcoords="offset points", fontsize=8, color="0.35")


def _draw_point(axes: "Axes", measurement: Measurement, color: str) -> None:
    fill = "full" if measurement.contender.isa else "none"
    place = (measurement.work.flop / measurement.work.nbytes, measurement.flops / 1e9)
    axes.plot(*place, MARKERS[measurement.pass_name], color=color, fillstyle=fill, markersize=7, clip_on=False)


def _colors(names: Sequence[str], ours: set[str]) -> dict[str, str]:
    """Warm colours for our layer, cold ones for peers."""
    warm, cold = ([name for name in names if (name in ours) == wanted] for wanted in (True, False))
    colors = {name: OURS[i % len(OURS)] for i, name in enumerate(warm)}
    return colors | {name: PEERS[i % len(PEERS)] for i, name in enumerate(cold)}
