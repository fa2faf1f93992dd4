"""The store of compiled kernels on disk: where it is, who may write to it, what an intact entry is.

    <root>/<first 32 digits of the key>/kernel.so   the library
                                        kernel.cpp  the rendered instance
                                        build.log   the command and what the compiler said
                                        meta.json   the whole key, SHA-256 of kernel.so, origin
    <root>/<...>.lock .tmp .bad .log                lock, entry in the making, damaged entry, failed build

An entry appears by one rename of a finished directory, so a reader sees all of it or nothing.
"""

import atexit
import functools
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import platformdirs

from jitmoe import settings
from jitmoe.errors import BuildError, CacheSecurityError

log = logging.getLogger(__name__)

LIBRARY = "kernel.so"
SOURCE = "kernel.cpp"
LOG = "build.log"
META = "meta.json"

PREFIX_DIGITS = 32
_OUR_NAMES = re.compile(rf"[0-9a-f]{{{PREFIX_DIGITS}}}(\.lock|\.tmp|\.bad|\.log)?")


@dataclass(frozen=True)
class Entry:
    """One published kernel: what meta.json says, and whether the library still agrees with it."""

    directory: Path
    meta: dict[str, Any]
    intact: bool


@dataclass(frozen=True)
class Cache:
    """A cache directory that only this user can write to, as was checked."""

    root: Path

    def find(self, key: str) -> Path | None:
        """Path of the library of ``key`` if its entry is whole and its digest right, else None."""
        directory = self._path(key)
        meta = _read_meta(directory)
        return directory / LIBRARY if meta.get("key") == key and _is_intact(directory, meta) else None

    @contextmanager
    def lock(self, key: str, timeout: float) -> Iterator[None]:
        """Hold the lock of ``key`` against other processes and threads; the system frees it if this process dies.

        Raises:
            BuildError: another process held the lock for ``timeout`` seconds.
        """
        lock = filelock.FileLock(self._path(key, ".lock"), timeout=timeout, mode=0o600)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise BuildError(
                f"another process held {lock.lock_file} for {timeout:g} s: it compiles the same kernel or is stopped"
            ) from None
        try:
            yield
        finally:
            lock.release()

    def log_path(self, key: str) -> Path:
        """Path of the log of a build in progress; the log stays there if the build fails."""
        return self._path(key, ".log")

    def start(self, key: str) -> Path:
        """Empty directory to build ``key`` in; call with the lock held.

        What a killed process left there is removed. An entry under this key has failed its check: it is renamed, so
        that a person can look at it.
        """
        entry, damaged, workspace = self._path(key), self._path(key, ".bad"), self._path(key, ".tmp")
        if os.path.lexists(entry):
            log.warning("kernel cache entry %s is damaged: moved to %s, building it again", entry, damaged)
            _remove(damaged)
            entry.rename(damaged)
        _remove(workspace)
        workspace.mkdir(mode=0o700)
        return workspace

    def publish(self, key: str, workspace: Path, origin: dict[str, Any]) -> Path:
        """Make the directory from :meth:`start` the entry of ``key``; return the library's path."""
        self.log_path(key).rename(workspace / LOG)
        meta = {"key": key, "digest": _digest(workspace / LIBRARY), **origin}
        (workspace / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")
        for path in workspace.iterdir():
            path.chmod(0o600)
            _sync(path)
        # Contents reach the disk before the name does: after a power cut there is no empty library.
        _sync(workspace)
        workspace.rename(self._path(key))
        _sync(self.root)
        return self._path(key) / LIBRARY

    def abandon(self, key: str) -> None:
        """Remove what :meth:`start` made, after a failed build; call with the lock held."""
        _remove(self._path(key, ".tmp"))

    def entries(self) -> list[Entry]:
        """All published kernels, ordered by name."""
        found = []
        for directory in self.root.iterdir():
            if _OUR_NAMES.fullmatch(directory.name) and "." not in directory.name:
                meta = _read_meta(directory)
                found.append(Entry(directory, meta, _is_intact(directory, meta)))
        return sorted(found, key=lambda entry: (str(entry.meta.get("name")), entry.directory.name))

    def clear(self) -> int:
        """Remove every kernel, log and leftover; return the number of kernels. Other files stay."""
        kernels = len(self.entries())
        for path in list(self.root.iterdir()):
            # A process that compiles now may hold a lock file; without the file a second process would get in.
            if _OUR_NAMES.fullmatch(path.name) and path.suffix != ".lock":
                _remove(path)
        return kernels

    def _path(self, key: str, suffix: str = "") -> Path:
        return self.root / (key[:PREFIX_DIGITS] + suffix)


def location() -> Path:
    """Where kernels are meant to be kept: $JITMOE_CACHE_DIR, or the user's cache directory."""
    chosen: Path | None = settings.get("cache_dir")
    return platformdirs.user_cache_path("jitmoe") if chosen is None else chosen.absolute()


def open_cache() -> Cache:
    """The cache at :func:`location`, created if need be.

    Where nothing can be written or executed there, a warning is given once and a private directory takes its place
    until this process ends.

    Raises:
        CacheSecurityError: somebody else could put a library there.
    """
    root = location()
    reason = _why_unusable(root)
    return Cache(root if reason is None else _private_root(root, reason))


def _why_unusable(root: Path) -> str | None:
    """Create and check ``root``; None if kernels can be kept there."""
    if not root.is_absolute():
        return "there is no home directory"
    try:
        if root.is_symlink():
            raise CacheSecurityError(
                f"kernel cache {root} is a symbolic link. Name the real directory in JITMOE_CACHE_DIR"
            )
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_ours_alone(root)
        if os.statvfs(root).f_flag & os.ST_NOEXEC:
            return "its file system is mounted noexec"
    except OSError as error:
        return str(error)
    return None if os.access(root, os.W_OK | os.X_OK) else "it is not writable"


def _check_ours_alone(root: Path) -> None:
    info = root.lstat()
    if info.st_uid != os.geteuid():
        raise CacheSecurityError(
            f"kernel cache {root} belongs to user id {info.st_uid}, not to you ({os.geteuid()}). "
            "Set JITMOE_CACHE_DIR to a directory of your own."
        )
    if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise CacheSecurityError(f"kernel cache {root} is writable by others. Repair it: chmod go-w {root}")
    for parent in root.resolve().parents:
        mode = parent.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise CacheSecurityError(
                f"kernel cache {root} can be replaced by others: {parent} is writable by everybody. "
                f"Repair it (chmod o-w {parent}) or set JITMOE_CACHE_DIR."
            )


@functools.cache
def _private_root(intended: Path, reason: str) -> Path:
    private = Path(tempfile.mkdtemp(prefix="jitmoe-"))
    warnings.warn(
        f"kernels cannot be kept in {intended}: {reason}. They are compiled into {private} for this process "
        "only. Set JITMOE_CACHE_DIR to a directory that you can write to and execute from.",
        RuntimeWarning,
        stacklevel=4,
    )
    atexit.register(_remove_if_owner, private, os.getpid())
    return private


def _remove_if_owner(private: Path, creator: int) -> None:
    if os.getpid() == creator:  # not in a forked child, whose parent still uses it
        shutil.rmtree(private, ignore_errors=True)


def _read_meta(directory: Path) -> dict[str, Any]:
    """Contents of meta.json; empty if it is missing or not what we wrote."""
    try:
        meta = json.loads((directory / META).read_bytes())
    except (OSError, ValueError):
        return {}
    return meta if isinstance(meta, dict) else {}


def _is_intact(directory: Path, meta: dict[str, Any]) -> bool:
    """Whether the library is a regular file in a real directory and has the digest it was published with."""
    library = directory / LIBRARY
    if directory.is_symlink() or library.is_symlink() or not library.is_file():
        return False
    try:
        return _digest(library) == meta.get("digest")
    except OSError:
        return False


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
