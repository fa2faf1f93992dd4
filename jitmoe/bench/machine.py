"""Where and when a figure was measured, and how much memory the process took."""

import datetime
import os
import platform
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from jitmoe.jit import cpu, toolchain
from jitmoe.version import __version__

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def use_threads(threads: int) -> None:
    """Let our layer and torch compute on ``threads`` threads from now on."""
    torch.set_num_threads(threads)


def describe() -> dict[str, Any]:
    """What a reader needs to judge the figures. Nothing in it names the user or the checkout."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": cpu.detect().model,
        "cpus": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "jitmoe": __version__,
        "compiler": toolchain.find_compiler().identity,
    }


def peak_bytes() -> int:
    """Most bytes that this process has held since its start."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass(frozen=True)
class Start:
    """Where a measurement of memory began.

    Attributes:
        held: bytes that the process held then.
        mark: bytes of the old high-water mark, which hides smaller peaks; 0 where a new mark was begun.
    """

    held: int
    mark: int


def start_peak() -> Start | None:
    """Start a new high-water mark; None where the system keeps no such mark."""
    try:
        _CLEAR.write_text("5")
        new = True
    except OSError:
        new = False
    mark = _high_water_mark()
    return None if mark is None else Start(_held(), 0 if new else mark)


def peak_since(start: Start | None) -> int | None:
    """Most bytes held since :func:`start_peak` beyond those held then; None where the system does not say.

    Linux counts pages on each CPU and adds them up in batches, so the figure may be off by some 100 kB a CPU. Where the
    system begins no new mark, it says nothing until the old one is exceeded.
    """
    peak = _high_water_mark()
    if start is None or peak is None or peak <= start.mark:
        return None
    return max(peak - start.held, 0)


def _held() -> int:
    return int(psutil.Process().memory_info().rss)


def _high_water_mark() -> int | None:
    """Most bytes held since the last new mark; psutil has no such figure."""
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    line = next((line for line in lines if line.startswith("VmHWM:")), None)
    return None if line is None else int(line.split()[1]) * 1024
