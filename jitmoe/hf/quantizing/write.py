"""Writes a checkpoint folder: its shards tensor by tensor, their index, and the files beside them."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from jitmoe.experts.quantize import Loss
from jitmoe.hf.quantizing.jobs import Job
from jitmoe.hf.quantizing.shards import Shard
from jitmoe.hf.quantizing.source import INDEX, Source


class Appender:
    """Puts the parts of tensors at their places in a file."""

    def __init__(self, shard: Shard, stream: BinaryIO) -> None:
        self._stream = stream
        self._next = dict(shard.starts)
        self._ends = {entry.name: shard.starts[entry.name] + entry.nbytes for entry in shard.entries}

    def append(self, name: str, part: Tensor) -> None:
        """The next part of a tensor."""
        data = part.contiguous().flatten().view(torch.uint8).numpy()
        assert self._next[name] + data.nbytes <= self._ends[name], f"more of {name} than its header says"
        self._stream.seek(self._next[name])
        self._stream.write(data.data)
        self._next[name] += data.nbytes

    def finish(self) -> None:
        """Nothing may be missing."""
        short = [name for name, place in self._next.items() if place != self._ends[name]]
        assert not short, f"less of {short[0]} than its header says"


def write_shard(folder: Path, shard: Shard, source: Source, done: Callable[[Job, Loss | None], None]) -> None:
    """One file. What is in memory at once is a part of one tensor.

    Args:
        folder: to write it to.
        shard: the file.
        source: where its tensors come from.
        done: is told each job that is finished, and what its matrix loses.
    """
    with (folder / shard.name).open("xb") as stream:
        stream.write(shard.header)
        appender = Appender(shard, stream)
        for job in shard.jobs:
            done(job, job.run(source, appender.append))
        appender.finish()
        _sync(stream)


def write_index(folder: Path, shards: Sequence[Shard]) -> None:
    """Which file has which tensor, where there are several."""
    if len(shards) == 1:
        return
    places = {entry.name: shard.name for shard in shards for entry in shard.entries}
    total = sum(entry.nbytes for shard in shards for entry in shard.entries)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))})


def write_json(path: Path, content: dict[str, Any]) -> None:
    """An object, for people and programs."""
    with path.open("xb") as stream:
        stream.write(f"{json.dumps(content, indent=2)}\n".encode())
        _sync(stream)


def copy_files(source: Path, names: Sequence[Path], folder: Path) -> None:
    """Files as they are; what a link leads to, not the link."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with (source / name).open("rb") as old, (folder / name).open("xb") as new:
            shutil.copyfileobj(old, new)
            _sync(new)


def _sync(stream: BinaryIO) -> None:
    # Contents reach the disk before the folder gets its name.
    stream.flush()
    os.fsync(stream.fileno())
