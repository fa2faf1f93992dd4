"""Seeded bugs: a change of one line or so of a copy of the tree, or of the templates alone in this process.

Named tests are run on a copy of the tree with one bug in it; those bugs are in mutants.py. A test that needs a kernel
with a bug of its own takes :func:`broken_templates`.

A mutant is killed only where a test failed. A kernel that does not compile, a test that could not be collected, a
fixture that broke or a run past the limit of time proves nothing about the tests and is reported as what it is.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

COPIED = ("jitmoe", "templates", "tests", "pyproject.toml")
"""What the tests need of the tree."""

BEST = "best"
"""The best instruction set that this machine executes."""

MEANS_A_BROKEN_MUTANT = "jitmoe.errors.BuildError"
"""In the message of a test that failed because the mutated kernel does not compile."""

TESTS_FAILED = 1
ELSEWHERE = 90
"""Exit status where the tests would have run on another tree."""

# An editable install of the tree is on the path too, and must not be what is tested.
LAUNCH = f"""
import importlib.util, pathlib, sys
origin = importlib.util.find_spec("jitmoe").origin
if not pathlib.Path(origin).resolve().is_relative_to(pathlib.Path.cwd().resolve()):
    print("the tests would import", origin)
    sys.exit({ELSEWHERE})
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


class MutationError(Exception):
    """The mutants cannot be judged."""


@dataclass(frozen=True)
class Mutant:
    """One seeded bug.

    Attributes:
        name: short, unique.
        file: to change, from the root of the tree.
        text: what stands there now, in exactly one place.
        replacement: what the bug makes of it.
        tests: that must catch it, ``file.py::Class::test`` below tests/; one failure is enough. None where the test
            that makes it catches it.
        bug: one sentence.
        isa: instruction set whose tests are run. A bug in the code of one set names it, and tests that are marked with
            their set: they are skipped where the machine lacks it.
        ends_process: the tests catch it by a fence that ends the process.
    """

    name: str
    file: str
    text: str
    replacement: str
    tests: tuple[str, ...] = ()
    bug: str = ""
    isa: str = BEST
    ends_process: bool = False

    def mutated(self, tree: Path) -> str:
        """What the file in ``tree`` becomes.

        Raises:
            MutationError: where the text is not in exactly one place.
        """
        path = tree / self.file
        before = path.read_text(encoding="utf-8") if path.is_file() else ""
        if (places := before.count(self.text)) != 1:
            raise MutationError(f"{self.name}: its text is in {places} places of {self.file}, expected one")
        return before.replace(self.text, self.replacement)

    def put_into(self, tree: Path) -> None:
        """Change the file in ``tree``, a copy.

        Raises:
            MutationError: as :meth:`mutated`.
        """
        (tree / self.file).write_text(self.mutated(tree), encoding="utf-8")


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant.

    Attributes:
        mutant: which.
        status: "killed", "survived", "broken", "timeout", or "not run" where the machine can run none of its tests.
        detail: the first test that failed, or the end of what the run said.
        seconds: wall time.
        message: of that test, its first line: whether the test failed by the bug or by a mutant badly made.
    """

    mutant: Mutant
    status: str
    detail: str
    seconds: float
    message: str = ""

    @property
    def good(self) -> bool:
        """Whether nothing speaks against the tests or the mutant."""
        return self.status in ("killed", "not run")


@dataclass(frozen=True)
class TestRun:
    """One run of pytest; ``status`` is None past the limit of time.

    Attributes:
        status: exit status of the process, negative for a signal.
        output: what it said.
        passed: number of tests that passed.
        failed: test and message of each failure, in the order of the run; an error in a fixture is none.
    """

    __test__ = False  # for pytest, which takes it for a class of tests

    status: int | None
    output: str
    passed: int = 0
    failed: tuple[tuple[str, str], ...] = ()

    def end(self) -> str:
        """The last lines of the output, indented."""
        return "\n".join("    " + line for line in self.output.rstrip().splitlines()[-12:])


def run_mutants(mutants: Sequence[Mutant], root: Path, jobs: int, limit: float) -> list[Outcome]:
    """Judge ``mutants`` of the tree at ``root``, ``jobs`` at a time, with a line on stdout for each.

    All are made from one copy, so an edit in the meantime makes no difference. Compiled kernels are kept in
    out/mutants: their keys hold the text of the templates, so one tree's can't be taken for another's.

    Args:
        mutants: what to judge.
        root: of the tree.
        jobs: how many at a time.
        limit: seconds that one run may take.

    Raises:
        MutationError: a mutant does not apply, or a test fails on the tree as it is.
    """
    cache = root / "out" / "mutants"
    with tempfile.TemporaryDirectory(prefix="jitmoe-mutants-") as folder:
        original = Path(folder) / "original"
        copy_tree(root, original)
        for mutant in mutants:
            mutant.mutated(original)  # all of them before any is run: one that does not fit is soon found
        prove_tests_pass(mutants, original, cache, limit * len(mutants))
        with ThreadPoolExecutor(jobs) as pool:
            futures = [pool.submit(run_mutant, mutant, original, cache, limit) for mutant in mutants]
            try:
                return _collect(futures)
            except BaseException:
                pool.shutdown(cancel_futures=True)  # an interrupt waits for those under way, and begins no other
                raise


def _collect(futures: Sequence[Future[Outcome]]) -> list[Outcome]:
    for count, future in enumerate(as_completed(futures), 1):
        found = future.result()
        line = f"[{count}/{len(futures)}] {found.mutant.name}: {found.status}, {found.seconds:.0f} s  {found.message}"
        print(line.rstrip()[:120], flush=True)
    return [future.result() for future in futures]


def prove_tests_pass(mutants: Sequence[Mutant], original: Path, cache: Path, limit: float) -> None:
    """Raise :class:`MutationError` if a test fails on the tree as it is: it would "catch" every mutant."""
    for isa in dict.fromkeys(mutant.isa for mutant in mutants):
        tests = dict.fromkeys(test for mutant in mutants if mutant.isa == isa for test in mutant.tests)
        run = run_tests(original, list(tests), isa, cache, limit)
        if run.status != 0:
            failed = ", ".join(test for test, _ in run.failed) or f"exit status {run.status}"
            raise MutationError(f"without any mutant the tests do not pass: {failed}\n{run.end()}")


def run_mutant(mutant: Mutant, original: Path, cache: Path, limit: float) -> Outcome:
    """Judge one mutant in a copy of ``original``."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"jitmoe-{mutant.name}-") as folder:
        tree = Path(folder) / "tree"
        copy_tree(original, tree)
        mutant.put_into(tree)
        run = run_tests(tree, mutant.tests, mutant.isa, cache, limit, "-x")
    status, detail = judge(mutant, run)
    message = run.failed[0][1].partition("\n")[0] if run.failed else ""
    return Outcome(mutant, status, detail, time.monotonic() - start, message)


def judge(mutant: Mutant, run: TestRun) -> tuple[str, str]:
    """Status and detail of the :class:`Outcome` of a run."""
    if run.status is None:
        return "timeout", run.end()
    if mutant.ends_process and run.status == -signal.SIGSEGV:
        return "killed", f"{mutant.tests[0]} (SIGSEGV)"
    if run.status == 0:
        return ("survived", ", ".join(mutant.tests)) if run.passed else ("not run", "every test was skipped")
    if run.status != TESTS_FAILED or not run.failed or MEANS_A_BROKEN_MUTANT in run.failed[0][1]:
        return "broken", f"exit status {run.status}\n{run.end()}"
    return "killed", run.failed[0][0]


@contextlib.contextmanager
def broken_templates(*mutants: Mutant) -> Iterator[None]:
    """Kernels of this process are made of templates with these bugs, until the block ends.

    Raises:
        MutationError: as :meth:`Mutant.mutated`.
    """
    from jitmoe.jit import kernels, render

    with tempfile.TemporaryDirectory(prefix="jitmoe-broken-") as folder:
        shutil.copytree(str(render.template_dir()), Path(folder) / "templates")
        for mutant in mutants:
            mutant.put_into(Path(folder))
        kernels.load.cache_clear()
        try:
            with render.templates_from(Path(folder) / "templates"):
                yield
        finally:
            kernels.load.cache_clear()


def copy_tree(root: Path, target: Path) -> None:
    """Copy what the tests need. Numba's cached machine code comes along: it is dated by the source it was made of."""
    target.mkdir()
    for name in COPIED:
        source = root / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("*.pyc"))
        elif source.exists():
            shutil.copy2(source, target / name)


def run_tests(tree: Path, tests: Sequence[str], isa: str, cache: Path, limit: float, *options: str) -> TestRun:
    """Run pytest in ``tree``, on that tree's package."""
    report = tree / "report.xml"
    selected = [f"tests/{test}" for test in tests]
    # pytest's own limit would make a failed test of one that hangs.
    arguments = ["-q", "--no-header", "--timeout=0", "-o", f"cache_dir={cache}", f"--junitxml={report}"]
    command = [sys.executable, "-c", LAUNCH, *arguments, f"--isa={isa}", *options, *selected]
    path = os.pathsep.join(filter(None, (str(tree), os.environ.get("PYTHONPATH"))))
    status, output = _run(command, tree, {**os.environ, "PYTHONPATH": path}, limit)
    if not report.is_file():
        return TestRun(status, output)
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [(_name(case), found.get("message", "")) for case in cases if (found := case.find("failure")) is not None]
    return TestRun(status, output, sum(len(case) == 0 for case in cases), tuple(failed))


def _name(case: ElementTree.Element) -> str:
    """As ``file.py::Class::test``, from the dotted name in the report."""
    module, *classes = case.get("classname", "").removeprefix("tests.").split(".")
    return "::".join([f"{module}.py", *classes, case.get("name", "")])


def _run(command: Sequence[str], folder: Path, environment: dict[str, str], limit: float) -> tuple[int | None, str]:
    """Exit status, None past the limit, and output. Compilers and other children end with the run."""
    with tempfile.TemporaryFile() as stream:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
        status: int | None = None
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(limit)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        stream.seek(0)
        return status, stream.read().decode(errors="replace")
