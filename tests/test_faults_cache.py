"""The cache under attack: many processes at once, killed, refused or without room at any step; real file systems."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import FakeCompiler
from test_build import answer_of, instance, key_of, names, tiny_templates

from jitmoe.errors import BuildError
from jitmoe.jit import build, cache, location

__all__ = ["tiny_templates"]

pytestmark = pytest.mark.usefixtures("cold_cache", "tiny_templates")

SLOW_WITH_JUNK = """
case "$*" in *kernel.so*)
  for bytes in 1 10 100 1000; do head -c $bytes /dev/urandom > kernel.so; sleep 0.05; done
esac
exec "$REAL" "$@"
"""
"""A compiler that leaves more and more junk where the library is to be."""

KILLS_ITS_PARENT_ONCE = """
if mkdir "$0.killed" 2>/dev/null; then kill -9 $PPID; while echo junk >> kernel.so 2>/dev/null; do sleep 0.02; done; fi
exec "$REAL" "$@"
"""
"""The first one kills who started it, and goes on as an orphan for as long as its directory is there."""

USE = """
import sys
from pathlib import Path
from test_build import answer_of, instance
from jitmoe.jit import build, render
with render.templates_from(Path(sys.argv[1])):
    for report in build.build_instances([instance(int(number)) for number in sys.argv[2:]]):
        print(report.status, answer_of(report.path))
"""


def started(templates: Path, *numbers: int, before: tuple[str, ...] = ()) -> "subprocess.Popen[str]":
    """A process of its own that uses kernels; ``before`` stands in front of the command."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return subprocess.Popen(
        [*before, sys.executable, "-c", USE, str(templates), *map(str, numbers)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


class Reader:
    """Reads whatever is published for as long as others write."""

    def __init__(self, root: Path) -> None:
        self.root, self.partial, self.seen = root, [], 0
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.read)

    def read(self) -> None:
        while not self.stop.is_set():
            for entry in self.root.glob("*"):
                if len(entry.name) == cache.PREFIX_DIGITS:
                    self.seen += 1
                    if not cache.read_entry(entry).intact:
                        self.partial.append(entry)

    def __enter__(self) -> "Reader":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()


def assert_no_lock_is_held(*numbers: int) -> None:
    store = location.open_place().writable()
    for number in numbers:
        with store.lock(key_of(instance(number)), 0.1) as alone:
            assert alone


@pytest.mark.parametrize("processes", [4, pytest.param(16, marks=pytest.mark.slow)])
def test_a_cold_start_of_real_processes(
    fake_compiler: Callable[..., FakeCompiler], cold_cache: Path, tiny_templates: Path, processes: int
) -> None:
    """One compilation a key, and nobody sees a partial file."""
    compiler = fake_compiler(SLOW_WITH_JUNK)
    cold_cache.mkdir(mode=0o700)
    with Reader(cold_cache) as reader:
        children = [started(tiny_templates, 1, 2, 3) for _ in range(processes)]
        said = [child.communicate(timeout=250) for child in children]
    assert [child.returncode for child in children] == [0] * processes, said
    lines = [line for out, _ in said for line in out.splitlines()]
    assert compiler.runs == lines.count("compiled 1") + lines.count("compiled 2") + lines.count("compiled 3") == 3
    assert len(lines) == 3 * processes and {line.split()[1] for line in lines} == {"1", "2", "3"}
    assert reader.seen and not reader.partial
    assert names(cold_cache, ".tmp", ".bad", ".log") == []
    assert_no_lock_is_held(1, 2, 3)


@pytest.mark.parametrize("processes", [3, pytest.param(16, marks=pytest.mark.slow)])
def test_who_compiles_is_killed_and_the_others_go_on(
    fake_compiler: Callable[..., FakeCompiler], cold_cache: Path, tiny_templates: Path, processes: int
) -> None:
    """SIGKILL in the middle of the compilation that all wait for; its compiler goes on writing as an orphan."""
    compiler = fake_compiler(KILLS_ITS_PARENT_ONCE)
    children = [started(tiny_templates, 1) for _ in range(processes)]
    said = [child.communicate(timeout=250) for child in children]
    ends = sorted(child.returncode for child in children)
    assert ends == [-signal.SIGKILL, *[0] * (processes - 1)], said
    assert sorted(out for out, _ in said) == ["", *["cached 1\n"] * (processes - 2), "compiled 1\n"]
    assert compiler.runs == 2
    assert answer_of(build.ensure(instance(1))) == 1
    assert_no_lock_is_held(1)


def takes_room(event: str, arguments: tuple[object, ...], root: Path) -> bool:
    """Whether the interpreter is about to make something in ``root``, by what it announces."""
    if event not in ("open", "os.mkdir", "os.rename") or not str(arguments[0]).startswith(str(root)):
        return False
    return event != "open" or bool(arguments[2] & os.O_ACCMODE)


def refused_at(step: int, root: Path, work: Callable[[], object], again: Callable[[], bool]) -> bool:
    """Run both in a forked child in which the ``step``-th new thing in ``root`` finds no room; whether one did.

    Raises:
        AssertionError: ``work`` raised another error than ours, or ``again``, with room, was not True.
    """
    child = os.fork()
    if child == 0:
        status, remaining = 4, [step]

        def refuse_at_zero(event: str, arguments: tuple[object, ...]) -> None:
            if takes_room(event, arguments, root):
                remaining[0] -= 1
                if remaining[0] == -1:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        sys.addaudithook(refuse_at_zero)
        try:
            try:
                work()
            except BuildError as error:
                assert "No space left" in str(error)
            status = 3
            if again():
                status = 0 if remaining[0] < 0 else 1
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert ended in (0, 1), {3: "with room again it does not work", 4: "no named error"}.get(ended, ended)
    return ended == 0


def test_no_room_at_every_step_of_publishing(cold_cache: Path) -> None:
    """One named error or a right answer, and the next try in the same process works."""
    location.open_place().writable()
    for step in range(100):
        shutil.rmtree(cold_cache)
        cold_cache.mkdir(mode=0o700)
        use = lambda: answer_of(build.ensure(instance())) == 42  # noqa: E731
        if not refused_at(step, cold_cache, use, use):
            break
        assert names(cold_cache, ".tmp", ".bad") == []
    assert 5 < step < 99, "the loop must have gone through every step and come to an end"


MOUNTS = pytest.mark.skipif(
    subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode != 0 if shutil.which("unshare") else True,
    reason="this user cannot mount a file system of its own",
)


def in_a_mount(place: Path, options: str, prepare: str = "") -> tuple[str, ...]:
    """A command line that runs what follows where ``place`` is a tmpfs of its own, which vanishes with it."""
    script = f"mount -t tmpfs -o mode=700,{options} none '{place}' && {prepare or ':'} && exec \"$@\""
    return ("unshare", "-m", "sh", "-c", script, "sh")


@MOUNTS
@pytest.mark.parametrize(
    ("options", "prepare", "words"),
    [
        ("noexec", "", "mounted noexec"),
        ("size=64k", "mount -o remount,ro '{place}'", "it is not writable|Read-only file system"),
    ],
    ids=["noexec", "read-only"],
)
def test_a_real_file_system_that_keeps_nothing(
    cold_cache: Path, tiny_templates: Path, options: str, prepare: str, words: str
) -> None:
    cold_cache.mkdir(mode=0o700)
    child = started(tiny_templates, 1, before=in_a_mount(cold_cache, options, prepare.format(place=cold_cache)))
    out, err = child.communicate(timeout=120)
    assert (child.returncode, out) == (0, "compiled 1\n"), err
    assert any(word in err for word in words.split("|")) and err.count("RuntimeWarning") == 1


@MOUNTS
def test_a_real_file_system_that_is_read_only_and_warm(cold_cache: Path, tiny_templates: Path) -> None:
    assert started(tiny_templates, 1).communicate(timeout=120)[0] == "compiled 1\n"
    keep = f"{cold_cache}.warm"
    shutil.copytree(cold_cache, keep)
    fill = f"cp -a '{keep}/.' '{cold_cache}' && mount -o remount,ro '{cold_cache}'"
    out, err = started(tiny_templates, 1, before=in_a_mount(cold_cache, "size=1m", fill)).communicate(timeout=120)
    assert (out, err) == ("cached 1\n", "")


@MOUNTS
def test_a_real_disk_that_is_full(cold_cache: Path, tiny_templates: Path) -> None:
    """The library does not fit."""
    cold_cache.mkdir(mode=0o700)
    child = started(tiny_templates, 1, before=in_a_mount(cold_cache, "size=12k"))
    out, err = child.communicate(timeout=120)
    assert child.returncode == 1 and out == ""
    last = err.strip().splitlines()
    assert any(line.startswith("jitmoe.errors.BuildError") for line in last) and "No space left" in err, err
