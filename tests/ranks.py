"""Jobs for several processes on this machine, which find each other through a file and talk over loopback.

A fresh interpreter imports everything once and forks one process for each rank: that is cheap, and a process that has
not run backward before may be forked.
"""

import faulthandler
import importlib
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from datetime import timedelta

from helpers import run_python

TIMEOUT = 60.0
"""Seconds that a collective waits."""


def run_ranks(job: str, world: int, *arguments: object, killed: Sequence[int] = (), seconds: float = 150) -> str:
    """Run ``job`` ("module.function") on each rank as ``job(rank, world, *arguments)``; returns what they print.

    Args:
        job: a function in a module beside this one.
        world: number of ranks.
        arguments: anything that repr() can write.
        killed: ranks that are to end by SIGKILL.
        seconds: after which all are killed.

    Raises:
        AssertionError: a rank failed or hung; with its stderr.
    """
    program = f"import ranks; ranks.main({job!r}, {world}, {arguments!r}, {list(killed)!r}, {seconds})"
    return run_python(program, seconds + 60, OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive", GLOO_SOCKET_IFNAME="lo")


def main(job: str, world: int, arguments: Sequence[object], killed: Sequence[int], seconds: float) -> None:
    module, _, name = job.rpartition(".")
    function = getattr(importlib.import_module(module), name)
    folder = tempfile.mkdtemp()
    children = {}
    for rank in range(world):
        child = os.fork()
        if child == 0:
            _be(rank, world, function, arguments, folder)
        children[child] = rank
    _wait(children, killed, time.monotonic() + seconds)


def _be(rank: int, world: int, function, arguments: Sequence[object], folder: str) -> None:
    import torch.distributed as dist

    status = 1
    faulthandler.register(signal.SIGTERM)
    try:
        dist.init_process_group(
            "gloo", f"file://{folder}/store", timedelta(seconds=TIMEOUT), rank=rank, world_size=world
        )
        function(rank, world, *arguments)
        status = 0
    except BaseException:
        print(f"rank {rank}:\n{traceback.format_exc()}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _wait(children: dict[int, int], killed: Sequence[int], end: float) -> None:
    wrong = []
    while children:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child == 0:
            if time.monotonic() > end:
                for process in children:
                    os.kill(process, signal.SIGTERM)
                time.sleep(1)
                for process in children:
                    os.kill(process, signal.SIGKILL)
                sys.exit(f"ranks {sorted(children.values())} hung")
            time.sleep(0.02)
            continue
        rank = children.pop(child)
        expected = -signal.SIGKILL if rank in killed else 0
        if os.waitstatus_to_exitcode(status) != expected:
            wrong.append(rank)
    if wrong:
        sys.exit(f"ranks {sorted(wrong)} failed")
