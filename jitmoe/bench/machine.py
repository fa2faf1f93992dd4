"""Where and when a figure was measured, and how much memory the process took."""

import datetime
import os
import platform
import resource
from pathlib import Path
from typing import Any

import torch

import jitmoe
from jitmoe import cpu, toolchain

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def describe(threads: int) -> dict[str, Any]:
    """What a reader needs to judge the figures; nothing that names the user or the checkout."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": cpu.detect().model,
        "cpus": len(os.sched_getaffinity(0)),
        "threads": threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "jitmoe": jitmoe.__version__,
        "compiler": toolchain.find_compiler().identity,
    }


def peak_bytes() -> int:
    """The most memory that this process has held since its start."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def start_peak() -> int | None:
    """Start a new high-water mark; bytes held now, or None where the system keeps no such mark."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return None
    return _status_bytes("VmRSS")


def peak_since(start: int | None) -> int | None:
    """The most bytes held since :func:`start_peak` beyond the ``start`` that it returned."""
    return None if start is None else max(_status_bytes("VmHWM") - start, 0)


def _status_bytes(field: str) -> int:
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    line = next(line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
