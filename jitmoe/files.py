"""Files that appear whole or not at all, whatever happens to the process that writes them."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file, open for reading and writing, that takes the place of ``path`` when the block ends.

    It is made beside ``path`` under a fixed name, so that what a killed process leaves is used up by the next write.
    Who has the old file open or mapped keeps it. After an error in the block nothing has changed.

    Raises:
        OSError: as the system says it; BlockingIOError where somebody else writes the same file now.
    """
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory")
    part = path.with_name(f".{path.name}.part")
    with os.fdopen(_open_locked(part), "r+b") as stream:
        try:
            stream.truncate()
            yield stream
            stream.flush()
            # Contents reach the disk before the name does: after a power cut the name stands for a whole file.
            os.fsync(stream.fileno())
            part.rename(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    _sync_folder(path.parent)


def _open_locked(part: Path) -> int:
    """``part``, locked against other writers; the system frees the lock if we die."""
    descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between our open and our lock another writer may have finished: what we hold is then the published file.
        if not (part.exists() and os.path.samestat(part.stat(), os.fstat(descriptor))):
            raise BlockingIOError
    except BlockingIOError:
        os.close(descriptor)
        raise BlockingIOError(f"{part} is being written by somebody else") from None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
