"""Safetensors files before they are written: which tensors, where each lies, and the header that says so."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jitmoe.hf.quantizing.entries import Entry
from jitmoe.hf.quantizing.jobs import Job
from jitmoe.hf.quantizing.source import SINGLE


@dataclass(frozen=True)
class Shard:
    """A file to be written.

    Attributes:
        name: of the file.
        jobs: what makes its tensors.
        starts: place of each tensor in the file, in bytes from its begin.
        header: what stands before the tensors.
        size: bytes of the file.
    """

    name: str
    jobs: Sequence[Job]
    starts: dict[str, int]
    header: bytes
    size: int

    @property
    def entries(self) -> list[Entry]:
        """All tensors."""
        return [entry for job in self.jobs for entry in job.entries]


def plan_shards(jobs: Iterable[Job], most_bytes: int) -> list[Shard]:
    """Files of at most ``most_bytes`` of tensors, or of one job where that alone has more, in the order of the jobs."""
    runs: list[list[Job]] = [[]]
    held = 0
    for job in jobs:
        size = sum(entry.nbytes for entry in job.entries)
        if runs[-1] and held + size > most_bytes:
            runs.append([])
            held = 0
        runs[-1].append(job)
        held += size
    names = [f"model-{number:05}-of-{len(runs):05}.safetensors" for number in range(1, len(runs) + 1)]
    return [_shard(name, run) for name, run in zip([SINGLE] if len(runs) == 1 else names, runs, strict=True)]


def _shard(name: str, jobs: Sequence[Job]) -> Shard:
    entries = [entry for job in jobs for entry in job.entries]
    # The widest items first, as safetensors itself does it: each tensor is aligned to its items.
    entries.sort(key=lambda entry: -entry.item_bytes)
    places, end = {}, 0
    described: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for entry in entries:
        places[entry.name], end = end, end + entry.nbytes
        offsets = [places[entry.name], end]
        described[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    starts = {entry: len(header) + place for entry, place in places.items()}
    return Shard(name, jobs, starts, header, len(header) + end)
