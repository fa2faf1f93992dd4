"""The store of compiled kernels on disk: where it is, what an intact entry is, how one appears.

    <root>/<first 32 digits of the key>/kernel.so   the library
                                        kernel.cpp  the rendered instance
                                        build.log   the command and what the compiler said
                                        meta.json   the whole key, SHA-256 of kernel.so, origin
    <root>/<...>.lock .bad .log                     lock, damaged entry, failed build
    <root>/<...>.<random>.tmp                       entry in the making

An entry appears by one rename of a finished directory, so a reader sees all of it or nothing.
"""

import errno
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from jitmoe.errors import BuildError
from jitmoe.files import acquire, warn_once
from jitmoe.jit import trust

log = logging.getLogger(__name__)

LIBRARY = "kernel.so"
SOURCE = "kernel.cpp"
LOG = "build.log"
META = "meta.json"

META_BYTES = 1 << 16
"""Bytes of meta.json that are read; ours are hundreds."""

PREFIX_DIGITS = 32
_OUR_NAMES = re.compile(rf"[0-9a-f]{{{PREFIX_DIGITS}}}(\.lock|(\.[0-9a-f]+)?\.tmp|\.bad|\.log)?")

NOT_HERE = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EACCES, errno.EBADF}
"""What the system says where it does not offer modes."""

STALE_SECONDS = 3600.0
"""Age from which on an entry in the making is taken for abandoned, where there are no locks to tell."""


@dataclass(frozen=True)
class Entry:
    """One published kernel: what meta.json says, and whether the library still agrees with it."""

    directory: Path
    meta: dict[str, Any]
    intact: bool

    @property
    def nbytes(self) -> int:
        """Bytes of the files in it."""
        return sum(path.lstat().st_size for path in self.directory.iterdir()) if self.directory.is_dir() else 0


@dataclass(frozen=True)
class Cache:
    """A cache directory that nobody else can write to, as was checked; this user may be unable to write to it too."""

    root: Path

    def find(self, key: str) -> Path | None:
        """Path of the library of ``key`` if its entry is whole and its digest right, else None.

        Raises:
            CacheSecurityError: the entry belongs to somebody else, or is writable by others.
        """
        entry = read_entry(self._path(key))
        return entry.directory / LIBRARY if entry.intact and entry.meta.get("key") == key else None

    def find_source(self, source: str) -> Path | None:
        """Path of an intact library that some compiler made of these sources, else None; errors as of :meth:`find`."""
        for path in sorted(self._published()):
            entry = read_entry(path)
            if entry.intact and entry.meta.get("source") == source:
                return path / LIBRARY
        return None

    @contextmanager
    def lock(self, key: str, timeout: float) -> Iterator[bool]:
        """Hold the lock of ``key`` against other processes and threads; the system frees it if this process dies.

        Yields whether there is a lock. Without locks in the file system two processes may compile the same kernel, each
        in a directory of its own, and the first one to finish publishes it.

        Raises:
            BuildError: another process held the lock for ``timeout`` seconds.
        """
        lock = filelock.FileLock(self._path(key, ".lock"), timeout=timeout, mode=0o600, fallback_to_soft=False)
        try:
            try:
                acquire(lock)
            except BlockingIOError:
                raise BuildError(
                    f"another process held {lock.lock_file} for {timeout:g} s: "
                    "it compiles the same kernel or is stopped"
                ) from None
            yield lock.is_locked
        finally:
            lock.release()

    def log_path(self, key: str) -> Path:
        """Path of the log of a build in progress; the log stays there if the build fails."""
        return self._path(key, ".log")

    def start(self, key: str, alone: bool = True) -> Path:
        """Empty directory to build ``key`` in; ``alone`` is what :meth:`lock` yields.

        What a killed process left there is removed as far as possible: its compiler may still write there. An entry
        under this key has failed its check: it is renamed, so that a person can look at it.
        """
        entry, damaged = self._path(key), self._path(key, ".bad")
        if os.path.lexists(entry):
            log.warning("kernel cache entry %s is damaged: moved to %s, building it again", entry, damaged)
            _remove(damaged)
            entry.rename(damaged)
        for left in self.root.glob(f"{entry.name}.*tmp"):
            if alone or time.time() - left.lstat().st_mtime > STALE_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
        workspace = self._path(key, f".{secrets.token_hex(4)}.tmp")
        workspace.mkdir(mode=0o700)
        return workspace

    def publish(self, key: str, workspace: Path, origin: dict[str, Any]) -> Path:
        """Make the directory from :meth:`start` the entry of ``key``; return the library's path."""
        if self.log_path(key).exists():
            self.log_path(key).rename(workspace / LOG)
        meta = {"key": key, "digest": _digest(workspace / LIBRARY), **origin}
        (workspace / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")
        for path in workspace.iterdir():
            _restrict(path)
            _sync(path)
        # Contents reach the disk before the name does: after a power cut there is no empty library.
        _sync_directory(workspace)
        try:
            workspace.rename(self._path(key))
        except OSError:
            if self.find(key) is None:
                raise
            shutil.rmtree(workspace, ignore_errors=True)  # without locks somebody else was faster
        _sync_directory(self.root)
        return self._path(key) / LIBRARY

    def abandon(self, workspace: Path) -> None:
        """Remove what :meth:`start` made, after a failed build; call with the lock held."""
        shutil.rmtree(workspace, ignore_errors=True)

    def entries(self) -> list[Entry]:
        """All published kernels, ordered by name."""
        found = map(read_entry, self._published())
        return sorted(found, key=lambda entry: (str(entry.meta.get("name")), entry.directory.name))

    def clear(self) -> int:
        """Remove every kernel, log and leftover; return the number of kernels. Other files stay."""
        ours = [path for path in self.root.iterdir() if _OUR_NAMES.fullmatch(path.name)]
        for path in ours:
            # A process that compiles now may hold a lock file; without the file a second process would get in.
            if path.suffix != ".lock":
                _remove(path)
        return sum("." not in path.name for path in ours)

    def _published(self) -> list[Path]:
        paths = self.root.iterdir() if self.root.is_dir() else ()
        return [path for path in paths if _OUR_NAMES.fullmatch(path.name) and "." not in path.name]

    def _path(self, key: str, suffix: str = "") -> Path:
        return self.root / (key[:PREFIX_DIGITS] + suffix)


def read_entry(directory: Path) -> Entry:
    """The entry in ``directory``, its digest checked; one that is not whole, or is no entry at all, is not intact.

    Raises:
        CacheSecurityError: it, or a file in it, belongs to somebody else or is writable by others.
    """
    try:
        with trust.opened(directory, directory=True) as inside:
            meta = _read_meta(inside)
            with trust.opened(LIBRARY, inside=inside) as library:
                return Entry(directory, meta, digest_of(library) == meta.get("digest"))
    except OSError:
        return Entry(directory, {}, False)


@contextmanager
def opened_library(path: Path) -> Iterator[int]:
    """A descriptor of the library ``path`` of an entry: its owner, mode and digest were read from this descriptor.

    Raises:
        CacheSecurityError: as of :func:`read_entry`.
        OSError: the entry is no longer whole.
    """
    with trust.opened(path.parent, directory=True) as inside, trust.opened(path.name, inside=inside) as library:
        if digest_of(library) != _read_meta(inside).get("digest"):
            raise OSError(errno.EIO, "the library has changed since it was published", str(path))
        yield library


def _read_meta(inside: int) -> dict[str, Any]:
    """Contents of meta.json in a directory; empty if it is missing or not what we wrote."""
    try:
        with trust.opened(META, inside=inside) as descriptor:
            meta = json.loads(os.pread(descriptor, META_BYTES, 0))
    except (OSError, ValueError, RecursionError):
        return {}
    return meta if isinstance(meta, dict) else {}


def digest_of(descriptor: int) -> str:
    """SHA-256 of the file, in hexadecimal digits."""
    with open(descriptor, "rb", closefd=False) as stream:
        stream.seek(0)
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return digest_of(stream.fileno())


def _restrict(path: Path) -> None:
    """Mode 0600, as far as the file system has modes; whoever reads the entry looks at the mode that it got."""
    try:
        path.chmod(0o600)
    except OSError as error:
        if error.errno not in NOT_HERE:
            raise
        warn_once(f"modes cannot be set in {path.parent.parent}: {error}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_directory(path: Path) -> None:
    """Bring the names in ``path`` to the disk. Where that fails a power cut may cost the entry, and nothing more."""
    try:
        _sync(path)
    except OSError as error:
        warn_once(f"directories cannot be synchronised in {path}: {error}")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
