"""Checkpoints that are whole or do not count, whatever happens to the process that writes them."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jitmoe.config import read_fields
from jitmoe.errors import ConfigError, TrainError
from jitmoe.files import replacing

SEAL = "complete.json"
"""Written last, into a folder whose files have reached the disk: their names and sizes. Without it none is resumed."""

PREFIX = "checkpoint-"
RUN = "run.json"
KEPT = 2


@dataclass(frozen=True)
class Found:
    """Checkpoints in an output folder; ``complete`` has the newest last."""

    complete: tuple[Path, ...]
    incomplete: tuple[Path, ...]


def find(output: Path) -> Found:
    """Those that are complete and those that a killed process left."""
    folders = [path for path in output.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    folders.sort(key=step_of)
    complete = [path for path in folders if _is_complete(path)]
    return Found(tuple(complete), tuple(path for path in folders if path not in complete))


def step_of(folder: Path) -> int:
    """Steps that were done when it was written."""
    return int(folder.name.removeprefix(PREFIX))


def losses_in(folder: Path) -> list[tuple[int, float]]:
    """Steps and their losses, from the first step on."""
    log = read_fields(folder / "trainer_state.json", "the state of a Trainer")["log_history"]
    return [(row["step"], row["loss"]) for row in log if "loss" in row]


def seal(folder: Path) -> None:
    """Declare ``folder`` complete, once its contents are on the disk.

    Raises:
        OSError: the system refuses.
    """
    for path in _files(folder):
        _sync(path)
    _sync(folder)
    sizes = {path.name: path.stat().st_size for path in _files(folder)}
    with replacing(folder / SEAL) as stream:
        stream.write(json.dumps(sizes, indent=1).encode())
    _sync(folder.parent)


def keep_newest(output: Path) -> None:
    """Remove complete checkpoints but the newest ones."""
    for folder in find(output).complete[:-KEPT]:
        remove(folder)


def remove(folder: Path) -> None:
    """Remove a checkpoint; one whose removal is interrupted does not count."""
    (folder / SEAL).unlink(missing_ok=True)
    shutil.rmtree(folder)


def begin(output: Path, resume: bool, run: dict[str, Any]) -> tuple[Path | None, list[str]]:
    """Make ``output`` ready for a run that is described by ``run``.

    Returns:
        The checkpoint to go on from, if any, and what is to be said about that.

    Raises:
        TrainError: without ``resume``, the folder has something in it; with it, another run.
    """
    if output.exists() and not output.is_dir():
        raise TrainError(f"{output} is a file: name a folder for the output")
    taken = output.is_dir() and any(output.iterdir())
    if taken and not resume:
        raise TrainError(f"{output} is not empty: name another --output, or go on with what is there with --resume")
    notes = []
    if taken:
        _check_run(output, run)
    output.mkdir(parents=True, exist_ok=True)
    with replacing(output / RUN) as stream:
        stream.write(json.dumps(run, indent=1).encode())
    found = find(output)
    for folder in found.incomplete:
        notes.append(f"{folder.name} is incomplete, and is removed")
        remove(folder)
    if not resume:
        return None, notes
    newest = found.complete[-1] if found.complete else None
    notes.append(f"resumes from {newest.name}" if newest else f"{output} has no complete checkpoint: begins at step 0")
    return newest, notes


def _check_run(output: Path, run: dict[str, Any]) -> None:
    try:
        before = read_fields(output / RUN, "the options of a run")
    except ConfigError as error:
        raise TrainError(f"{output} holds no run of jitmoe train that could go on: {error}") from error
    changed = sorted(name for name in before.keys() | run.keys() if before.get(name) != run.get(name))
    if changed:
        was = ", ".join(f"{name} {before.get(name)!r}, now {run.get(name)!r}" for name in changed)
        raise TrainError(f"{output} holds another run ({was}): go on with the same, or name another --output")


def _is_complete(folder: Path) -> bool:
    try:
        sizes = read_fields(folder / SEAL, "sizes of files")
        return bool(sizes) and all((folder / name).stat().st_size == nbytes for name, nbytes in sizes.items())
    except (ConfigError, OSError):
        return False


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and path.name != SEAL)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
