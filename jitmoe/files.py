"""Files that appear whole or not at all, whatever happens to the process that writes them."""

import errno
import functools
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import filelock

NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
"""What flock says where the file system has no locks (Lustre, some FUSE and network file systems)."""


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file, open for reading and writing, that takes the place of ``path`` when the block ends.

    The new file lies beside ``path`` under a fixed name, so the next write takes over what a killed process left.
    A reader that has the old file open or mapped keeps it. After an error in the block ``path`` is as before.

    Raises:
        OSError: the system refuses, or ``path`` is there and no regular file; BlockingIOError where another thread or
            process writes the same file.
    """
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory")
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is no regular file, and only those are replaced")
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
        try:
            os.fsync(folder)
        except OSError as error:  # the file is there, whatever a power cut may do to its name now
            warn_once(f"{path.parent} cannot be synchronised: {error}. A power cut may undo what was written last")


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


@contextmanager
def making_folder(path: Path) -> Iterator[Path]:
    """A new, empty folder that becomes ``path`` when the block ends, and never takes the place of anything.

    Until then it lies beside ``path`` as ``.NAME.part``. What a killed process left there is removed first; after an
    error in the block nothing is left.

    Raises:
        OSError: the system refuses; FileExistsError where ``path`` is there, BlockingIOError where another thread or
            process makes the same folder.
    """
    _check_free(path)
    path = Path(os.path.realpath(path))
    part = path.with_name(f".{path.name}.part")
    with _folder_of(path) as parent, _sole_writer(part):
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        try:
            yield part
            # Names in the folder reach the disk before its own does.
            with _folder_of(part / "*") as folder:
                os.fsync(folder)
            _check_free(path)
            part.rename(path)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        os.fsync(parent)


def _check_free(path: Path) -> None:
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, "it exists, and is not replaced", str(path))


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
        acquire(lock)
        yield
    finally:  # an interrupt can come at any line: the lock ends with this block
        if lock.is_locked:
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def acquire(lock: filelock.BaseFileLock) -> None:
    """Take ``lock``; without one, after a warning, where the file system has none.

    Raises:
        BlockingIOError: somebody else holds it.
        OSError: the system refuses otherwise.
    """
    try:
        lock.acquire()
    except filelock.Timeout:
        raise BlockingIOError(f"{lock.lock_file} is held: its file is being written by somebody else") from None
    except NotImplementedError as error:
        warn_once(f"there are no file locks in {Path(lock.lock_file).parent}: {error}. Let one process write at a time")
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        warn_once(f"there are no file locks in {Path(lock.lock_file).parent}: {error}. Let one process write at a time")


@functools.cache
def warn_once(message: str) -> None:
    """Warn of something that the system lacks and that we go on without."""
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def _open(part: Path) -> int:
    return os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
