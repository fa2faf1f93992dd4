"""The picture of the loss, for those who have matplotlib."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def draw(losses: Sequence[tuple[int, float]], title: str, path: Path) -> None:
    """Write the losses (step, nats per token) and their running mean over a tenth of the run to a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5))
    axes = figure.subplots()
    steps, values = [step for step, _ in losses], [loss for _, loss in losses]
    window = max(1, len(values) // 10)
    means = [sum(values[max(0, i - window) : i]) / min(i, window) for i in range(1, len(values) + 1)]
    axes.plot(steps, values, color="tab:blue", linewidth=0.8, alpha=0.5, label="loss of a step")
    axes.plot(steps, means, color="tab:blue", linewidth=2, label=f"mean of {window} steps")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
