"""What the system leaves to this process: CPUs and memory, less what its container (control groups) may not take."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def available_memory() -> int:
    """Bytes that new allocations can take without swapping, in the system and in every control group around us."""
    return min([int(psutil.virtual_memory().available), *_headrooms()])


def usable_cpus() -> int:
    """CPUs that this process may use at once: its mask, less where the quota of a control group is smaller."""
    return max(1, min([len(os.sched_getaffinity(0)), *_quotas()]))


def _headrooms() -> Iterator[int]:
    """Bytes that each control group with a limit still has; pages of files that it would drop count as free."""
    for group in _groups("memory"):
        for limit, usage, reclaimable in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            most, used = _number(group / limit), _number(group / usage)
            if most is not None and used is not None:
                yield max(0, most - max(0, used - _statistic(group / "memory.stat", reclaimable)))


def _quotas() -> Iterator[int]:
    for group in _groups("cpu"):
        words = _words(group / "cpu.max")
        old = (_number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us"))
        quota, period = map(_parsed, words) if len(words) == 2 else old
        if quota is not None and period is not None and quota > 0 and period > 0:
            yield math.ceil(quota / period)


def _groups(controller: str) -> Iterator[Path]:
    """Directories of our control group and of all its parents, for version 2 and for ``controller`` of version 1."""
    for line in _lines(MEMBERSHIP):
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and controller not in controllers.split(","):
            continue
        top = CGROUPS / controller if controllers else CGROUPS
        inner = [part for part in path.split("/") if part not in ("", "..")]
        yield from (top.joinpath(*inner[:count]) for count in range(len(inner), -1, -1))


def _statistic(path: Path, name: str) -> int:
    found = (words for words in map(str.split, _lines(path)) if len(words) == 2 and words[0] == name)
    return _parsed(next(found, ["", "0"])[1]) or 0


def _number(path: Path) -> int | None:
    words = _words(path)
    return _parsed(words[0]) if words else None


def _parsed(word: str) -> int | None:
    """None for "max" and whatever else is no number."""
    return int(word) if word.lstrip("-").isdigit() else None


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()


def _lines(path: Path) -> list[str]:
    """Lines of a file of the system; none where it is missing."""
    try:
        return path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []
