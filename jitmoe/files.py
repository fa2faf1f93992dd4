"""Files that appear whole or not at all, whatever happens to the process that writes them."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import filelock


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file, open for reading and writing, that takes the place of ``path`` when the block ends.

    The new file lies beside ``path`` under a fixed name, so the next write takes over what a killed process left.
    A reader that has the old file open or mapped keeps it. After an error in the block ``path`` is as before.

    Raises:
        OSError: the system refuses; BlockingIOError where another thread or process writes the same file.
    """
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory")
    part = path.with_name(f".{path.name}.part")
    with _folder_of(path) as folder, _sole_writer(part), os.fdopen(_open(part), "r+b") as stream:
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
        os.fsync(folder)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A new, empty folder that takes the place of the folder ``path``, if there is one, when the block ends.

    After an error in the block ``path`` is as before. No system call of Python exchanges two folders: a process that is
    killed between two renames leaves the old one, whole, as ``.NAME.old``, and the next call puts it back first.

    Raises:
        OSError: the system refuses; BlockingIOError where another thread or process writes the same folder.
    """
    path = Path(os.path.realpath(path))
    part, old = path.with_name(f".{path.name}.part"), path.with_name(f".{path.name}.old")
    with _folder_of(path) as parent, _sole_writer(part):
        _put_back(path, old)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        try:
            yield part
            # Names in the folder reach the disk before its own does.
            with _folder_of(part / "*") as folder:
                os.fsync(folder)
            if path.exists():
                path.rename(old)
            part.rename(path)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            _put_back(path, old)
            raise
        os.fsync(parent)
        _put_back(path, old)


def _put_back(path: Path, old: Path) -> None:
    """Give ``old`` its name back if that is free; remove it if a new folder has taken it."""
    if old.exists() and not path.exists():
        old.rename(path)
    elif old.exists():
        shutil.rmtree(old)


@contextmanager
def _folder_of(path: Path) -> Iterator[int]:
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _sole_writer(part: Path) -> Iterator[None]:
    """Keep other writers of ``part`` out; the system frees the lock if we die.

    The lock file is removed while the lock is held: filelock notices that, and takes no lock without a name.
    """
    lock = filelock.FileLock(f"{part}.lock", timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise BlockingIOError(f"{part} is being written by somebody else") from None
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _open(part: Path) -> int:
    return os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
