"""What we add to transformers' Trainer: a line of progress, checkpoints that are sealed, losses that must be finite."""

import math
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from jitmoe.errors import TrainError
from jitmoe.hf.train import checkpoints
from jitmoe.progress import counted


class Seals(TrainerCallback):  # type: ignore[misc]
    """Seals each checkpoint when it is written, and only then removes older ones."""

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Of the Trainer: all files of a checkpoint are written."""
        output = Path(args.output_dir)
        checkpoints.seal(output / f"{checkpoints.PREFIX}{state.global_step}")
        checkpoints.keep_newest(output)


class Progress(TrainerCallback):  # type: ignore[misc]
    """Steps done, with loss, tokens a second and the time left. Tokens are those that are no padding."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._loss = math.nan
        self._begun = 0.0
        self._before = (0, 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Of the Trainer: a resumed one has steps behind it."""
        self._advance = self._stack.enter_context(counted(max(1, state.max_steps), "training step"))
        self._begun, self._before = time.perf_counter(), (state.global_step, state.num_input_tokens_seen)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Of the Trainer: the loss of a step.

        Raises:
            TrainError: it is not finite.
        """
        if "loss" not in (logs or {}):
            return
        self._loss = float(logs["loss"])
        self._advance(state.global_step, self._said(state))
        if not math.isfinite(self._loss):
            raise TrainError(
                f"the loss of step {state.global_step} is {self._loss}: take a smaller --lr; the checkpoints in "
                f"{args.output_dir} are from before. JITMOE_TRACE=1 says in which expert the first such value arose"
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Of the Trainer."""
        self.close()

    def close(self) -> None:
        """Take the line away, also where training ended early."""
        self._stack.close()

    def _said(self, state: Any) -> str:
        seconds = time.perf_counter() - self._begun
        steps, tokens = state.global_step - self._before[0], state.num_input_tokens_seen - self._before[1]
        left = seconds / max(1, steps) * (state.max_steps - state.global_step)
        return f"loss {self._loss:.4f}, {tokens / seconds:.0f} tokens/s, {duration(left)} left"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, of which the first that is not zero leads."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
