"""What a run of the example with transformers shows and leaves behind: a few lines, and the picture."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from transformers import TrainerCallback

LINES = 4
"""Lines of progress where there is no terminal to draw a bar on."""


class Lines(TrainerCallback):
    """A line for each quarter of the training."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Of the Trainer, after each step."""
        step, total = state.global_step, state.max_steps
        if not state.is_world_process_zero:
            return
        if "loss" in logs and LINES * step // total > LINES * (step - 1) // total and not sys.stderr.isatty():
            print(f"{self.name} {step}/{total} loss {logs['loss']:.4f}", file=sys.stderr, flush=True)


def draw(train: Sequence[tuple[int, float]], validation: Mapping[int, float], path: Path) -> None:
    """Losses of training by step, and of validation by the steps done before it."""
    figure, axes = plt.subplots(figsize=(9, 5))
    axes.plot(*zip(*train, strict=True), color="tab:blue", linewidth=0.9, label="train")
    axes.plot(list(validation), list(validation.values()), "o-", color="tab:orange", label="validation")
    axes.set(
        xlabel="step", ylabel="loss (nats per token)", title="LoRA of all experts, transformers' Trainer on jitmoe"
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
