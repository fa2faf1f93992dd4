"""Jobs for several processes on this machine, which find each other through a file and talk over loopback.

One fresh interpreter imports everything once and forks a process for each rank of each job: that is cheap, and who has
not run backward before may be forked. Forked processes compute on one thread; :func:`launch` starts others.
"""

import ast
import atexit
import faulthandler
import functools
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

TIMEOUT = 60.0
"""Seconds that a collective waits."""

ALONE = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "GLOO_SOCKET_IFNAME": "lo"}


def run_ranks(job: str, world: int, *arguments: object, killed: Sequence[int] = (), seconds: float = 150) -> str:
    """Run ``job`` ("module.function") on each rank as ``job(rank, world, *arguments)``; returns what they print.

    Args:
        job: a function in a module beside this one.
        world: number of ranks.
        arguments: literals.
        killed: ranks that are to end by SIGKILL.
        seconds: after which all are killed.

    Raises:
        AssertionError: a rank failed or hung; with what all printed.
    """
    server = _server()
    assert server.stdin and server.stdout
    print(repr((job, world, arguments, list(killed), seconds)), file=server.stdin, flush=True)
    answer = server.stdout.readline()
    assert answer, f"the process that forks ranks has ended with status {server.wait(10)}"
    fault, output = ast.literal_eval(answer)
    assert not fault, f"{job}: {fault}\n{output}"
    return output


def launch(job: str, world: int, *arguments: object, seconds: float = 200, **environment: str) -> str:
    """The same under torchrun, in processes that were not forked, with ``environment``."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    done = subprocess.run(
        [*command, __file__, job, repr(arguments)],
        env={**os.environ, **_path(), **ALONE, **environment},
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@functools.cache
def _server() -> "subprocess.Popen[str]":
    server = subprocess.Popen(
        [sys.executable, "-c", "import ranks; ranks.serve()"],
        env={**os.environ, **_path(), **ALONE},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(server.kill)
    return server


def _path() -> dict[str, str]:
    here = Path(__file__).parent
    return {"PYTHONPATH": os.pathsep.join([str(here.parent), str(here), *filter(None, sys.path)])}


def serve() -> None:
    """Run the jobs that standard input names, one a line, and answer each with a line: (fault, output)."""
    for line in sys.stdin:
        job, world, arguments, killed, seconds = ast.literal_eval(line)
        with tempfile.TemporaryDirectory() as folder:
            fault = _run(job, world, arguments, killed, seconds, folder)
            output = Path(folder, "output").read_text(errors="replace")
        print(repr((fault, output)), flush=True)


def _run(job: str, world: int, arguments: Sequence[object], killed: Sequence[int], seconds: float, folder: str) -> str:
    module, _, name = job.rpartition(".")
    function = getattr(importlib.import_module(module), name)
    children = {}
    for rank in range(world):
        child = os.fork()
        if child == 0:
            output = os.open(f"{folder}/output", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(output, 1)
            os.dup2(output, 2)
            _be(rank, world, f"file://{folder}/store", function, arguments)
        children[child] = rank
    return _wait(children, killed, time.monotonic() + seconds)


def _be(rank: int, world: int, store: str, function, arguments: Sequence[object]) -> None:
    import torch.distributed as dist

    status = 1
    faulthandler.register(signal.SIGTERM)
    try:
        dist.init_process_group("gloo", store, timedelta(seconds=TIMEOUT), rank=rank, world_size=world)
        function(rank, world, *arguments)
        status = 0
    except BaseException:
        print(f"rank {rank}:\n{traceback.format_exc()}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _wait(children: dict[int, int], killed: Sequence[int], end: float) -> str:
    """Why the job failed, or nothing."""
    wrong = []
    while children:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            rank = children.pop(child)
            if os.waitstatus_to_exitcode(status) != (-signal.SIGKILL if rank in killed else 0):
                wrong.append(rank)
        elif time.monotonic() > end:
            for number in (signal.SIGTERM, signal.SIGKILL):
                for process in children:
                    os.kill(process, number)
                time.sleep(0.5)
            for process in children:
                os.waitpid(process, 0)
            return f"ranks {sorted(children.values())} hung"
        else:
            time.sleep(0.02)
    return f"ranks {sorted(wrong)} failed" if wrong else ""


if __name__ == "__main__":
    _be(
        int(os.environ["RANK"]),
        int(os.environ["WORLD_SIZE"]),
        "env://",
        getattr(importlib.import_module(sys.argv[1].rpartition(".")[0]), sys.argv[1].rpartition(".")[2]),
        ast.literal_eval(sys.argv[2]),
    )
