"""What a run of the example shows and leaves behind: curves, the picture and the table."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclass
class Curves:
    """Losses of one run in nats per byte: ``train`` by step, ``validation`` by the steps done before it."""

    name: str
    train: list[float] = field(default_factory=list)
    validation: dict[int, float] = field(default_factory=dict)
    seconds: float = 0.0
    tokens: int = 0

    @property
    def before(self) -> float:
        """Validation loss before the first step."""
        return self.validation[0]

    @property
    def after(self) -> float:
        """Validation loss after the last step."""
        return self.validation[len(self.train)]

    def largest_difference(self, other: "Curves") -> float:
        """Largest distance between two runs of the same batches, over both curves."""
        pairs = [*zip(self.train, other.train, strict=True)]
        pairs += [(loss, other.validation[step]) for step, loss in self.validation.items()]
        return max(abs(mine - theirs) for mine, theirs in pairs)


def draw(ours: Curves, reference: Curves, bound: float, path: Path) -> None:
    """Both runs' curves above, and below the difference between them with the bound it must keep."""
    figure, (losses, difference) = plt.subplots(2, 1, figsize=(9, 7), sharex=True, height_ratios=[3, 1])
    steps = range(len(ours.train))
    losses.plot(steps, reference.train, color="tab:orange", linewidth=3, alpha=0.4, label=f"{reference.name}, train")
    losses.plot(steps, ours.train, color="tab:blue", linewidth=0.9, label=f"{ours.name}, train")
    losses.plot(*_points(reference), "s", color="tab:orange", markersize=10, label=f"{reference.name}, validation")
    losses.plot(*_points(ours), "o-", color="tab:blue", markersize=5, label=f"{ours.name}, validation")
    losses.set(ylabel="loss (nats per byte)", title="LoRA fine-tuning of all experts, on the same batches")
    losses.legend()

    apart = [mine - theirs for mine, theirs in zip(ours.train, reference.train, strict=True)]
    difference.plot(steps, apart, color="tab:blue", linewidth=0.9, label="train")
    apart_validation = [loss - reference.validation[step] for step, loss in ours.validation.items()]
    difference.plot(list(ours.validation), apart_validation, "o", color="tab:blue", markersize=5, label="validation")
    difference.axhspan(-bound, bound, color="tab:gray", alpha=0.2, label="bound")
    difference.set(xlabel="step", ylabel="difference")
    difference.legend(loc="upper left", ncols=3)
    for axes in (losses, difference):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _points(curves: Curves) -> tuple[list[int], list[float]]:
    return list(curves.validation), list(curves.validation.values())


def table(ours: Curves, others: Sequence[Curves]) -> str:
    """Losses, distance from ``ours`` and time of every run, one row each."""
    heading = (
        f"{'experts':16}{'loss before':>13}{'loss after':>12}{'from ' + ours.name:>14}{'seconds':>10}{'tokens/s':>10}"
    )
    rows = [
        f"{run.name:16}{run.before:13.4f}{run.after:12.4f}{ours.largest_difference(run):14.4f}"
        f"{run.seconds:10.1f}{run.tokens / run.seconds:10.0f}"
        for run in (ours, *others)
    ]
    return "\n".join([heading, *rows])
