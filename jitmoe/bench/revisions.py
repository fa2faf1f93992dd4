"""Measures this tree and another commit of it in turn, in two processes on one machine."""

import io
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from jitmoe.bench import worker
from jitmoe.bench.history import Change, change
from jitmoe.errors import BenchError
from jitmoe.oracle.workloads import FORWARD, TRAINING, Workload
from jitmoe.progress import track

HERE = Path(__file__).resolve().parents[2]
"""The folder that holds this package."""

Times = tuple[float, float]
"""Seconds of forward, and of forward and backward."""


def checkout() -> Path:
    """The folder of the git checkout that this package runs from.

    Raises:
        BenchError: it runs from none, as an installed package does.
    """
    if not (HERE / ".git").exists():
        raise BenchError(f"{HERE} is no git checkout: give --against a file of --record, or run jitmoe from a checkout")
    return HERE


def commit() -> str:
    """The commit of this tree, with ``+`` where it was changed since; empty where there is no checkout."""
    try:
        root = checkout()
        found = _git(root, "rev-parse", "--short=12", "HEAD").decode().strip()
        return found + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no").strip() else "")
    except (BenchError, OSError):
        return ""


def compare_with(
    revision: str, workloads: Sequence[Workload], isa: str, threads: int, repeat: int, root: Path | None = None
) -> list[Change]:
    """Run ``repeat`` rounds in which both trees take the same inputs, one after the other, changing who is first.

    Args:
        revision: of git, such as ``main`` or ``HEAD~3``.
        workloads: sizes.
        isa: instruction set, which both trees must know.
        threads: of each.
        repeat: rounds.
        root: of the checkout that has the revision; that of this tree by default.

    Raises:
        BenchError: no checkout or no such revision, or a tree cannot run; with the last line that it wrote.
    """
    changes = []
    with _tree(root or checkout(), revision) as before:
        for workload in workloads:
            with ExitStack() as stack:
                trees = [stack.enter_context(_running(tree, workload, isa, threads)) for tree in (before, HERE)]
                pairs = [_round(trees, turn) for turn in track(range(repeat), repeat, f"{workload.name} round")]
            for place, pass_name in enumerate((FORWARD, TRAINING)):
                old, new = ([pair[tree][place] for pair in pairs] for tree in (0, 1))
                ratios = [after / earlier for earlier, after in zip(old, new, strict=True)]
                changes.append(change(workload.name, pass_name, isa, old, new, ratios))
    return changes


@contextmanager
def _tree(root: Path, revision: str) -> Iterator[Path]:
    """The files of a commit, in a folder of their own."""
    archive = _git(root, "archive", "--format=tar", revision)
    with tempfile.TemporaryDirectory(prefix="jitmoe-bench-") as folder:
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(folder, filter="data")
        yield Path(folder)


def _git(root: Path, *arguments: str) -> bytes:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, check=False)
    if done.returncode:
        raise BenchError(f"git {' '.join(arguments)} failed: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


@contextmanager
def _running(tree: Path, workload: Workload, isa: str, threads: int) -> Iterator["subprocess.Popen[str]"]:
    """A worker with ``tree`` on its path that has made its layer."""
    names = ("experts", "hidden", "intermediate", "top_k", "rank", "tokens")
    sizes: dict[str, Any] = {name: getattr(workload, name) for name in names} | {"isa": isa, "threads": threads}
    # -P: or the folder of the worker, whose modules have names of the standard library, would be searched first.
    command = ["env", f"PYTHONPATH={tree}", sys.executable, "-P", worker.__file__, json.dumps(sizes)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        _line(process, tree)
        yield process
    finally:
        process.kill()
        process.communicate()


def _round(trees: Sequence["subprocess.Popen[str]"], turn: int) -> list[Times]:
    times: list[Times] = [(0.0, 0.0)] * len(trees)
    places = range(len(trees))
    for place in places if turn % 2 == 0 else reversed(places):
        process = trees[place]
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        forward, both = _line(process, "a tree").split()
        times[place] = (float(forward), float(both))
    return times


def _line(process: "subprocess.Popen[str]", tree: object) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise BenchError(f"{tree} stopped with status {process.wait()}; what it wrote stands above")
    return line
