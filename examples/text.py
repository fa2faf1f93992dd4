"""The text: what every CPython carries, as bytes."""

import argparse
import inspect
import pydoc_data.topics
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 2048


@dataclass(frozen=True)
class Corpus:
    """Three parts of the text that share no byte, each a vector of int64."""

    pretraining: Tensor
    train: Tensor
    validation: Tensor


def load_corpus() -> Corpus:
    """Help topics for pre-training, a module's source for fine-tuning: every tenth block of it is held out."""
    pretraining = "".join(text for _, text in sorted(pydoc_data.topics.topics.items())).encode()
    source = inspect.getsource(argparse).encode()
    blocks = [source[i : i + BLOCK] for i in range(0, len(source), BLOCK)]
    train = b"".join(block for i, block in enumerate(blocks) if i % 10)
    return Corpus(*(torch.tensor(list(part)) for part in (pretraining, train, b"".join(blocks[::10]))))


def random_batches(text: Tensor, size: int, length: int, steps: int, seed: int) -> Iterator[Tensor]:
    """``steps`` batches [size, length + 1] of windows at random places, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    windows = text.unfold(0, length + 1, 1)
    for _ in range(steps):
        yield windows[torch.randint(len(windows), (size,), generator=generator)]


def all_windows(text: Tensor, length: int) -> Tensor:
    """The whole text, as windows [n, length + 1] that overlap by the byte that one predicts and the next is given."""
    return text.unfold(0, length + 1, length)
