"""What the experts of a checkpoint lose, projection by projection."""

from dataclasses import asdict, dataclass
from typing import Any

from jitmoe.experts.quantize import Loss
from jitmoe.hf.quantizing.families import PROJECTIONS, Projection
from jitmoe.text import table


@dataclass(frozen=True)
class ProjectionLoss:
    """What one projection loses: W' - W over all layers and experts, beside W.

    Attributes:
        rms: root of the mean square of W' - W, over that of W.
        largest: largest magnitude of W' - W, over that of W.
        worst: rms of the matrix that loses most, likewise over its own W.
        module: name of that matrix, which has layer and expert.
    """

    rms: float
    largest: float
    worst: float
    module: str


class Losses:
    """Collects what matrices lose."""

    def __init__(self) -> None:
        self._sums: dict[Projection, Loss] = dict.fromkeys(PROJECTIONS, Loss())
        self._worst: dict[Projection, tuple[float, str]] = dict.fromkeys(PROJECTIONS, (-1.0, ""))

    def add(self, projection: Projection, module: str, loss: Loss) -> None:
        """The loss of one matrix."""
        self._sums[projection] += loss
        if loss.rms > self._worst[projection][0]:
            self._worst[projection] = loss.rms, module

    def each(self) -> dict[Projection, ProjectionLoss]:
        """By projection, when all matrices are there."""
        return {name: ProjectionLoss(loss.rms, loss.largest, *self._worst[name]) for name, loss in self._sums.items()}


def loss_table(title: str, losses: dict[Projection, ProjectionLoss]) -> str:
    """The losses as aligned text."""
    head = (title, "rms(W' - W) / rms(W)", "max|W' - W| / max|W|", "worst matrix")
    rows = [(n, f"{e.rms:.2e}", f"{e.largest:.2e}", f"{e.module}: {e.worst:.2e}") for n, e in losses.items()]
    return table([head, *rows])


def loss_json(losses: dict[Projection, ProjectionLoss]) -> dict[str, Any]:
    """The losses for a program."""
    return {name: asdict(loss) for name, loss in losses.items()}
