"""Where kernels are kept: the user's directory, or one for this process alone where nothing can be written there."""

import atexit
import functools
import os
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from jitmoe import settings
from jitmoe.errors import BuildError
from jitmoe.jit import trust
from jitmoe.jit.cache import Cache, Entry

LONGEST_NAME = 120
"""Bytes that names in a cache directory add to its path, with room to spare."""

LONGEST_PATH = 4096
"""Bytes of a path, as Linux allows."""


@dataclass(frozen=True)
class Place:
    """Where kernels are kept.

    Attributes:
        root: the directory that was checked.
        reason: why no kernel can be put there; None where one can.
        readable: kernels that lie there can be loaded.
    """

    root: Path
    reason: str | None = None
    readable: bool = True

    def find(self, key: str) -> Path | None:
        """As :meth:`Cache.find`, in all directories of this process."""
        return next(filter(None, (cache.find(key) for cache in self._caches())), None)

    def find_source(self, source: str) -> Path | None:
        """As :meth:`Cache.find_source`, likewise."""
        return next(filter(None, (cache.find_source(source) for cache in self._caches())), None)

    def entries(self) -> list[Entry]:
        """As :meth:`Cache.entries`, likewise."""
        return [entry for cache in self._caches() for entry in cache.entries()]

    def writable(self) -> Cache:
        """The cache for new kernels: where none can be put into ``root``, a private directory until this process ends.

        Raises:
            BuildError: nothing in the private directory could be executed.
        """
        return Cache(self.root if self.reason is None else _private_root(self.root, self.reason))

    def _caches(self) -> list[Cache]:
        private = [_Private.root] if self.reason is not None and _Private.root is not None else []
        return [Cache(root) for root in ([self.root] if self.readable else []) + private]


class _Private:
    """The private directory of this process, once it was needed."""

    root: Path | None = None


def location() -> Path:
    """Where kernels are meant to be kept: $JITMOE_CACHE_DIR, or the user's cache directory."""
    chosen: Path | None = settings.get("cache_dir")
    if chosen is not None:
        return _absolute(chosen)
    try:
        return platformdirs.user_cache_path("jitmoe")
    except RuntimeError:  # there is neither HOME nor an entry of this user in passwd
        return Path("~/.cache/jitmoe")


@functools.cache
def _absolute(path: Path) -> Path:
    """Absolute once and for all: a later chdir does not move the cache."""
    return path.absolute()


def open_place() -> Place:
    """The place at :func:`location`, created if need be.

    Raises:
        CacheSecurityError: somebody else could put a library there.
    """
    root = location()
    if not root.is_absolute():
        return Place(root, "there is no home directory", readable=False)
    if len(os.fsencode(root)) + LONGEST_NAME > LONGEST_PATH:
        return Place(root, "its path is too long", readable=False)
    try:
        _make(root)
        trust.check_directory(root)
        if os.statvfs(root).f_flag & os.ST_NOEXEC:
            return Place(root, "its file system is mounted noexec", readable=False)
    except OSError as error:
        return Place(root, str(error), readable=False)
    return Place(root, None if os.access(root, os.W_OK | os.X_OK) else "it is not writable")


def _make(root: Path) -> None:
    """Create ``root`` and what lacks above it with mode 0700, whatever the umask: others must not replace it."""
    if not os.path.lexists(root):
        _make(root.parent)
        root.mkdir(mode=0o700, exist_ok=True)
    elif not root.is_dir() and not root.is_symlink():
        raise FileExistsError(f"File exists: {root} is no directory")


@functools.cache
def _private_root(intended: Path, reason: str) -> Path:
    private = Path(tempfile.mkdtemp(prefix="jitmoe-"))
    if os.statvfs(private).f_flag & os.ST_NOEXEC:
        private.rmdir()
        raise BuildError(
            f"kernels can be loaded neither from {intended} ({reason}) nor from {private.parent} (mounted noexec). Set "
            "JITMOE_CACHE_DIR to a directory that you can write to, on a file system without noexec."
        )
    warnings.warn(
        f"kernels cannot be kept in {intended}: {reason}. They are compiled into {private} for this process "
        "only. Set JITMOE_CACHE_DIR to a directory that you can write to and execute from.",
        RuntimeWarning,
        stacklevel=4,
    )
    atexit.register(_remove_if_owner, private, os.getpid())
    _Private.root = private
    return private


def _remove_if_owner(private: Path, creator: int) -> None:
    if os.getpid() == creator:  # not in a forked child, whose parent still uses it
        shutil.rmtree(private, ignore_errors=True)
