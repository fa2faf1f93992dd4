"""Who could put code of theirs where we load ours from: owners, modes and links, read from what is really used.

Trusted are this user, root, and whoever owns ``/`` (in a user namespace that is how root looks from inside).
"""

import grp
import os
import pwd
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jitmoe.errors import CacheSecurityError

LINKS = 40
"""Most symbolic links in one path, as in Linux."""


def check_directory(root: Path) -> None:
    """Refuse ``root`` if it, or any directory or link on the way to it, is in the hands of somebody else.

    Raises:
        CacheSecurityError: it is; names what is wrong and how to repair it.
        OSError: something on the way cannot be looked at.
    """
    info = root.lstat()
    if stat.S_ISLNK(info.st_mode):
        raise CacheSecurityError(f"kernel cache {root} is a symbolic link. Name the real directory in JITMOE_CACHE_DIR")
    if info.st_uid not in _owners():
        raise CacheSecurityError(
            f"kernel cache {root} belongs to user id {info.st_uid}, not to you ({os.geteuid()}). "
            "Set JITMOE_CACHE_DIR to a directory of your own."
        )
    if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise CacheSecurityError(f"kernel cache {root} is writable by others. Repair it: chmod go-w {root}")
    _check_way(root)


def _check_way(root: Path) -> None:
    """Walk to the parents of ``root`` as the system does, links included, and look at each directory and link."""
    rest, here, links = [part for part in root.parent.parts if part != "/"], Path("/"), 0
    _check_parent(root, here)
    while rest:
        part = rest.pop(0)
        here = here.parent if part == ".." else here / part
        info = here.lstat()
        if not stat.S_ISLNK(info.st_mode):
            _check_parent(root, here)
            continue
        links += 1
        if info.st_uid not in _trusted() or links > LINKS:
            raise CacheSecurityError(
                f"kernel cache {root} can be replaced by others: the link {here} belongs to user id {info.st_uid}. "
                "Name the real directory in JITMOE_CACHE_DIR"
            )
        target = Path(os.readlink(here))
        here = Path("/") if target.is_absolute() else here.parent
        rest = [*(p for p in target.parts if p != "/"), *rest]


def _check_parent(root: Path, parent: Path) -> None:
    info = parent.stat()
    if info.st_uid not in _trusted():
        raise CacheSecurityError(
            f"kernel cache {root} can be replaced by others: {parent} belongs to user id {info.st_uid}. "
            "Set JITMOE_CACHE_DIR to a directory below one of your own."
        )
    if info.st_mode & stat.S_ISVTX:  # only the owner of an entry may rename it there
        return
    if info.st_mode & stat.S_IWOTH:
        raise CacheSecurityError(
            f"kernel cache {root} can be replaced by others: {parent} is writable by everybody. "
            f"Repair it (chmod o-w {parent}) or set JITMOE_CACHE_DIR."
        )
    if info.st_mode & stat.S_IWGRP and not _is_private_group(info.st_gid):
        raise CacheSecurityError(
            f"kernel cache {root} can be replaced by others: {parent} is writable by the group {info.st_gid}. "
            f"Repair it (chmod g-w {parent}) or set JITMOE_CACHE_DIR."
        )


def _owners() -> set[int]:
    return {0, os.geteuid()}


def _trusted() -> set[int]:
    return _owners() | {os.stat("/").st_uid}


def _is_private_group(gid: int) -> bool:
    """Whether ``gid`` is root's, or the group that many systems give each user for himself alone."""
    if gid == 0:
        return True
    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    return gid == user.pw_gid and group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}


@contextmanager
def opened(path: Path | str, directory: bool = False, inside: int | None = None) -> Iterator[int]:
    """A descriptor of a regular file, or of a directory, that nobody else can write to; never a link, never waiting.

    Args:
        path: its path; below the directory ``inside`` where that is given.
        directory: whether it must be a directory.
        inside: descriptor of a directory.

    Raises:
        CacheSecurityError: it belongs to somebody else or is writable by others.
        OSError: there is nothing of this kind.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | (os.O_DIRECTORY if directory else 0)
    descriptor = os.open(path, flags, dir_fd=inside)
    try:
        info = os.fstat(descriptor)
        if not directory and not stat.S_ISREG(info.st_mode):
            raise FileNotFoundError(f"{path} is no regular file")
        if info.st_uid not in _owners() or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            place = os.readlink(f"/proc/self/fd/{descriptor}")
            raise CacheSecurityError(
                f"{place} belongs to user id {info.st_uid}, mode "
                f"{stat.S_IMODE(info.st_mode):o}: somebody else can write it, so nothing is loaded. Remove it"
            )
        yield descriptor
    finally:
        os.close(descriptor)
