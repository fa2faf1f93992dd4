"""A training run before anything of it is loaded: model, data and memory are looked at, and refused if need be."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from jitmoe.errors import TrainError
from jitmoe.hf import registry
from jitmoe.hf.packed import packing_words
from jitmoe.hf.train import picture
from jitmoe.hf.train.estimate import HOW, TrainEstimate, estimate
from jitmoe.hf.train.folder import ModelFolder, open_folder
from jitmoe.hf.train.options import Options
from jitmoe.hf.train.rows import read_rows
from jitmoe.hf.train.sketch import ATTENTION, Held, Sketch, held_by_torch, sketch
from jitmoe.hf.train.tokens import Encoded, encode, load_tokenizer


@dataclass(frozen=True)
class Job:
    """A run that nothing speaks against; no weight is loaded yet.

    Attributes:
        options: of the run.
        folder: of the model.
        tokenizer: of transformers.
        data: the rows as tokens.
        sketch: the model without weights.
        estimate: of memory.
        run: what the bits depend on.
    """

    options: Options
    folder: ModelFolder
    tokenizer: Any
    data: Encoded
    sketch: Sketch
    estimate: TrainEstimate
    run: dict[str, Any]

    @property
    def steps(self) -> int:
        """Optimizer steps, as the Trainer counts them."""
        if self.options.steps is not None:
            return self.options.steps
        each = math.ceil(len(self.data.rows) / self.options.batch_size)
        return math.ceil(self.options.epochs * each)

    def facts(self) -> list[tuple[str, str]]:
        """What will be trained on what, as a table without a head."""
        options, data = self.options, self.data
        layers = sum(self.sketch.experts.values())
        attention = f"in attention on {', '.join(self.sketch.attention)}"
        if not self.sketch.attention:
            attention = f"on nothing in attention, which has none of {', '.join(ATTENTION)}"
        cut = f", {data.cut} of them cut at --max-length {options.max_length}" if data.cut else ""
        return [
            ("model", f"{self.folder.path}, {layers} layers with experts"),
            ("LoRA", f"rank {options.rank}, alpha {options.alpha:g}, on all experts and {attention}"),
            ("data", f"{len(data.rows)} rows{cut}, {data.tokens} tokens, the longest row has {data.longest}"),
            ("training", f"{self.steps} steps of {options.batch_size} rows, lr {options.lr:g} falling to 0"),
            ("time", "not known before the first steps: it depends on this machine; the line of progress says it"),
        ]

    def notes(self) -> Iterator[str]:
        """What the user should not have to find out."""
        yield HOW
        if self.estimate.unknown:
            yield f"Memory: {self.estimate.unknown}"
        other = [name for name in self.folder.dtypes if name != "BF16"]
        if self.folder.schemes:
            kept = sorted({packing_words(experts.packing) for experts in self.sketch.experts})
            yield f"Experts stay as the checkpoint has them ({'; '.join(kept)}); all other weights become bfloat16"
        elif other:
            yield f"The checkpoint has weights in {', '.join(other)}: all are loaded as bfloat16"
        if not picture.can_draw():
            yield "matplotlib is not installed: no picture of the loss will be drawn (pip install 'jitmoe[examples]')"


def prepare(options: Options) -> Job:
    """Look at model, data and memory, and refuse what cannot work; no weight is loaded.

    Raises:
        TrainError: a folder lacks something.
        DataError: a row cannot be used; names file and line.
        UnsupportedExpertsError: jitmoe does not compute the experts of the model.
    """
    folder = open_folder(options.model)
    rows, digest = read_rows(options.data)
    registry.register()
    found = sketch(options.model, folder.shards, folder.schemes)
    tokenizer = load_tokenizer(options.model)
    data = encode(rows, tokenizer, options.max_length)
    if data.largest >= found.vocabulary:
        raise TrainError(
            f"the tokenizer in {options.model} gives token {data.largest}, and the model knows {found.vocabulary} "
            f"tokens: they do not belong together"
        )
    batch = min(options.batch_size, len(data.rows))
    held = _held(found, options.rank, batch, data.longest)
    threads = torch.get_num_threads()
    expected = estimate(found, held, options.rank, batch * data.longest, threads, options.memory_budget)
    run = {**options.that_matter(), "model": folder.digest, "data": digest}
    return Job(options, folder, tokenizer, data, found, expected, run)


def _held(found: Sketch, rank: int, batch: int, length: int) -> Held | str:
    """What torch holds, or why it cannot be told: models are free to look at values, of which there are none."""
    try:
        return held_by_torch(found, rank, batch, length)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
