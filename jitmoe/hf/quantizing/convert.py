"""From a checkpoint with plain experts to one with quantised experts, matrix by matrix."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from jitmoe.errors import CheckpointWriteError, JitmoeError
from jitmoe.experts.quantize import Loss
from jitmoe.files import making_folder
from jitmoe.hf.quantizing.families import Projection
from jitmoe.hf.quantizing.jobs import Job, Quantize
from jitmoe.hf.quantizing.loss import Losses, ProjectionLoss, loss_json, loss_table
from jitmoe.hf.quantizing.names import WrittenFormat
from jitmoe.hf.quantizing.plan import SHARD_BYTES, Plan
from jitmoe.hf.quantizing.source import CONFIG
from jitmoe.hf.quantizing.write import copy_files, write_index, write_json, write_shard
from jitmoe.progress import counted
from jitmoe.text import size
from jitmoe.version import __version__

REPORT = "jitmoe_quantization.json"
"""File in the new checkpoint that says what its experts have lost."""


@dataclass(frozen=True)
class Conversion:
    """What was written; prints as a table of what the experts lose.

    Attributes:
        weight_format: of the experts.
        losses: by projection, over all layers and experts.
        bytes_before: of the tensors that were read.
        bytes_after: of the files that were written.
        notes: what others may stumble over, for people.
    """

    weight_format: WrittenFormat
    losses: dict[Projection, ProjectionLoss]
    bytes_before: int
    bytes_after: int
    notes: tuple[str, ...]

    def __str__(self) -> str:
        return loss_table(self.weight_format, self.losses)


def convert_weights(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    weight_format: WrittenFormat = "int8_row",
    *,
    group_size: int = 32,
    max_shard_size: int = SHARD_BYTES,
) -> Conversion:
    """Write a checkpoint with quantised experts of a transformers checkpoint in bfloat16, float16 or float32.

    Routed experts become FP8 as DeepSeek ships it, or "pack-quantized" or "int-quantized" of compressed-tensors, one
    tensor for each expert; every other tensor keeps its bytes. No model is made. What is in memory at once is the
    list of tensors and some rows of one matrix, about 100 MB beside Python and torch, whatever the size of the model.

    Args:
        src: folder with config.json and safetensors files; links are followed.
        dst: folder to make. It appears when all of it is written; until then, and after a kill, there is ``.NAME.part``
            beside it, which the next call removes.
        weight_format: of the experts, each weight as the nearest code (:func:`jitmoe.quantize`).
        group_size: inputs that share a scale in "int4_group": 32, 64 or 128.
        max_shard_size: bytes of tensors in a file.

    Returns:
        What the experts lose, which is also in ``jitmoe_quantization.json`` in ``dst``.

    Raises:
        CheckpointError: ``src`` is no such checkpoint, its family has no names for single experts, or a weight is not
            finite.
        CheckpointWriteError: ``dst`` exists, there is too little space for it, or it cannot be written.
        ConfigError: an argument is none of those that there are.
    """
    return write(Plan(Path(src), weight_format, group_size, max_shard_size), Path(dst))


def write(plan: Plan, destination: Path) -> Conversion:
    """Write what is planned; see :func:`convert_weights`."""
    place = Path(os.path.realpath(destination))
    if Path(os.path.realpath(plan.source.folder)) in place.parents:
        raise CheckpointWriteError(f"{destination} lies in the checkpoint that is read: choose a place outside")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with making_folder(destination) as folder:
            _check_room(plan, place.parent)
            losses = _write_shards(plan, folder)
            done = Conversion(plan.format, losses.each(), plan.bytes_before, plan.bytes_after, plan.notes)
            write_index(folder, plan.shards)
            copy_files(plan.source.folder, plan.source.companions, folder)
            write_json(folder / CONFIG, plan.config)
            _write_report(folder / REPORT, plan, done)
    except OSError as error:
        if isinstance(error, JitmoeError):
            raise
        raise CheckpointWriteError(f"the checkpoint cannot be written to {destination}: {error}") from error
    return done


def _check_room(plan: Plan, parent: Path) -> None:
    free = shutil.disk_usage(parent).free
    if free < plan.bytes_after:
        raise CheckpointWriteError(
            f"the checkpoint will have {size(plan.bytes_after)}, and {parent} has {size(free)} left: make room, or "
            f"choose another disk"
        )


def _write_shards(plan: Plan, folder: Path) -> Losses:
    losses, count = Losses(), 0
    with counted(plan.jobs, "tensor") as advance:

        def done(job: Job, loss: Loss | None) -> None:
            nonlocal count
            count += 1
            if isinstance(job, Quantize) and loss is not None:
                losses.add(job.matrix.place.projection, job.matrix.module, loss)
            advance(count, job.entries[0].name)

        for shard in plan.shards:
            write_shard(folder, shard, plan.source, done)
    return losses


def _write_report(path: Path, plan: Plan, done: Conversion) -> None:
    content = {
        "jitmoe": __version__,
        "weight_format": done.weight_format,
        "group_size": plan.packing.group or None,
        "losses": loss_json(done.losses),
        "bytes_before": done.bytes_before,
        "bytes_after": done.bytes_after,
        "notes": list(done.notes),
    }
    write_json(path, content)
