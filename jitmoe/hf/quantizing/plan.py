"""What will be written for a checkpoint, known to the byte before anything is."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from jitmoe.errors import ConfigError
from jitmoe.formats import GROUP_SIZES, SQUARE, Packing, packing_of
from jitmoe.hf.quantizing.entries import Entry
from jitmoe.hf.quantizing.experts import Matrix, find_experts
from jitmoe.hf.quantizing.families import expert_count, family_of
from jitmoe.hf.quantizing.jobs import Copy, Job, Quantize
from jitmoe.hf.quantizing.names import CONFIG_KEY, HEAD, LAYOUTS, WrittenFormat, quantization_config
from jitmoe.hf.quantizing.shards import plan_shards
from jitmoe.hf.quantizing.source import Source
from jitmoe.text import size

SHARD_BYTES = 2_000_000_000
"""Bytes of tensors in a file, unless asked for otherwise."""


class Plan:
    """The checkpoint to be written.

    Args:
        folder: the checkpoint to read.
        weight_format: of the experts.
        group_size: inputs that share a scale in "int4_group".
        max_shard_size: bytes of tensors in a file.

    Attributes:
        format: of the experts.
        packing: likewise, with its group.
        source: the checkpoint to read.
        shards: files to write.
        config: content of config.json.
        matrices: number of matrices to quantise.
        jobs: number of tensors to quantise or copy.
        bytes_before: of the tensors of the source.
        bytes_after: of the files to write.
        notes: what others may stumble over, for people.

    Raises:
        CheckpointError: the source cannot be converted.
        ConfigError: an argument is none of those that there are.
    """

    def __init__(self, folder: Path, weight_format: WrittenFormat, group_size: int, max_shard_size: int) -> None:
        if weight_format not in LAYOUTS or group_size not in GROUP_SIZES or max_shard_size <= 0:
            raise ConfigError(
                f"weight_format {weight_format!r}, group_size {group_size}, max_shard_size {max_shard_size}: choose "
                f"one of {', '.join(LAYOUTS)}, of {', '.join(map(str, GROUP_SIZES))}, and a positive size"
            )
        self.format, self.packing = weight_format, packing_of(weight_format, group_size)
        self.source = Source(folder)
        jobs = list(self._jobs())
        self.shards = plan_shards(jobs, max_shard_size)
        self.config = {**self.source.config, CONFIG_KEY: quantization_config(self.packing, _plain(jobs))}
        matrices = [job.matrix for job in jobs if isinstance(job, Quantize)]
        self.matrices, self.jobs = len(matrices), len(jobs)
        self.bytes_before = sum(Entry(name, *outline).nbytes for name, outline in self.source.outlines.items())
        beside = sum((folder / name).stat().st_size for name in self.source.companions)
        self.bytes_after = sum(shard.size for shard in self.shards) + beside
        left_out = (f"LEFT OUT: {name}" for name in self.source.left_out)
        self.notes = (*_readers(self.packing), *_ragged(self.packing, matrices), *left_out)

    def __str__(self) -> str:
        files = "1 file" if len(self.shards) == 1 else f"{len(self.shards)} files"
        sizes = f"{size(self.bytes_before)} become {size(self.bytes_after)} in {files}"
        return f"{self.matrices} matrices of experts to {self.format}: {sizes}"

    def _jobs(self) -> Iterator[Job]:
        """In the order in which the tensors lie in the files."""
        family = family_of(self.source.config)
        found = find_experts(self.source, family, expert_count(self.source.config))
        stacked = any(matrix.lead for matrices in found.values() for matrix in matrices)
        for name, outline in self.source.outlines.items():
            if name in found:
                yield from (Quantize(matrix, self.packing, LAYOUTS[self.format]) for matrix in found[name])
            else:
                yield Copy(name, Entry(family.shipped(name) if stacked else name, *outline))


def _plain(jobs: Iterable[Job]) -> list[str]:
    """Names of the modules with a matrix that stays as it is."""
    entries = (job.entry for job in jobs if isinstance(job, Copy))
    names = (entry.name for entry in entries if len(entry.shape) > 1 and entry.name.endswith(".weight"))
    return sorted({HEAD, *(name.removesuffix(".weight") for name in names)})


def _readers(packing: Packing) -> Iterator[str]:
    """Who does not read the layout, as seen on 2026-11-25."""
    if packing.format.name == "int8_row":
        yield (
            "READERS: transformers 5.23 stops at int-quantized experts; jitmoe reads them, and so does the compressor "
            "of compressed-tensors"
        )


def _ragged(packing: Packing, matrices: Iterable[Matrix]) -> Iterator[str]:
    """What readers do not expect: squares or groups that are not full."""
    square = packing.format.sharing == "square"
    step = SQUARE if square else packing.group
    extents = {extent for matrix in matrices for extent in ((matrix.out, matrix.in_) if square else (matrix.in_,))}
    if step and (ragged := sorted(extent for extent in extents if extent % step)):
        wrong = "transformers refuses such a matrix, or spreads its scales evenly, which is wrong"
        yield (
            f"RAGGED SIZES: {', '.join(map(str, ragged))}, no multiples of {step}. jitmoe reads squares and groups "
            f"that are not full; {wrong if square else 'compressed-tensors refuses them'}"
        )
