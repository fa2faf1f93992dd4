"""What a training run is asked to do."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jitmoe.errors import ConfigError

NO_MATTER = ("model", "data", "output", "resume", "memory_budget", "save_every")
"""Options that change no bit of the run; contents of model and data count, not their places."""


@dataclass(frozen=True)
class Options:
    """Options of a run.

    Attributes:
        model: folder of a transformers checkpoint with its tokenizer.
        data: JSONL file of rows, see :func:`~jitmoe.hf.train.rows.read_rows`.
        output: folder for checkpoints, adapter and picture.
        rank: r of LoRA on experts and attention.
        alpha: LoRA's scale is alpha / r.
        lr: largest learning rate of AdamW; it falls linearly to zero.
        epochs: passes over the data, where ``steps`` is None.
        steps: optimizer steps, instead of epochs.
        batch_size: rows of a step.
        max_length: tokens of a row at most; longer ones are cut, and counted.
        resume: go on from the newest complete checkpoint in ``output``.
        seed: of LoRA's values and of the order of the rows.
        memory_budget: bytes that training may hold; None is what the machine has free.
        save_every: steps from checkpoint to checkpoint; None is a tenth of the run.

    Raises:
        ConfigError: a number is out of range.
    """

    model: Path
    data: Path
    output: Path
    rank: int = 8
    alpha: float = 16.0
    lr: float = 2e-4
    epochs: float = 1.0
    steps: int | None = None
    batch_size: int = 4
    max_length: int = 1024
    resume: bool = False
    seed: int = 0
    memory_budget: int | None = None
    save_every: int | None = None

    def __post_init__(self) -> None:
        least: dict[str, float] = {"rank": 1, "steps": 1, "batch_size": 1, "max_length": 2, "seed": 0}
        least |= {"memory_budget": 1, "save_every": 1}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ConfigError(f"{name} must be at least {bound}, got {value}")
        for name in ("alpha", "lr", "epochs"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} must be positive and finite, got {getattr(self, name)}")

    def that_matter(self) -> dict[str, Any]:
        """The options that the bits of the run depend on."""
        return {name: value for name, value in asdict(self).items() if name not in NO_MATTER}
