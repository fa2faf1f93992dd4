"""The seeded bugs fit the tree and name tests that exist; what runs them tells a caught one from everything else."""

import ast
from dataclasses import replace
from pathlib import Path

import mutants
import pytest
from mutation import Mutant, MutationError, Outcome, run_mutant, run_mutants

MUTANTS = mutants.MUTANTS
EVERY_MUTANT = pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)


def names_in(file: str) -> set[str]:
    """Names of the tests in a file and of its classes of tests, as they stand behind the file's in a node id."""
    found = set()
    for node in ast.parse((mutants.ROOT / "tests" / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            inner = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
            found |= {node.name, *(f"{node.name}::{name}" for name in inner)}
    return {name for name in found if name.split("::")[-1].startswith(("test_", "Test"))}


@EVERY_MUTANT
def test_it_changes_one_place(mutant: Mutant) -> None:
    assert mutant.mutated(mutants.ROOT) != (mutants.ROOT / mutant.file).read_text(encoding="utf-8")


@EVERY_MUTANT
def test_its_tests_exist(mutant: Mutant) -> None:
    assert mutant.tests and mutant.bug.endswith(".")
    for test in mutant.tests:
        file, _, name = test.partition("::")
        assert name in names_in(file), test


def test_there_are_enough_and_names_are_unique() -> None:
    assert len(MUTANTS) >= 15
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


def test_each_bug_of_the_ancestor_is_among_them() -> None:
    named = {test for mutant in MUTANTS for test in mutant.tests}
    assert {f"test_ancestor.py::{name}" for name in names_in("test_ancestor.py")} <= named


TINY = {
    "jitmoe/__init__.py": "ANSWER = 42\n",
    "tests/conftest.py": "def pytest_addoption(parser):\n    parser.addoption('--isa')\n",
    "tests/test_tiny.py": """
import jitmoe, pytest, time

@pytest.fixture
def answer():
    assert jitmoe.ANSWER, "a fixture breaks"
    return jitmoe.ANSWER

def test_right(answer):
    assert answer in (42, 43), "jitmoe.errors.BuildError" if answer == -1 else "wrong"

def test_skipped():
    pytest.skip("not on this machine")

class TestSlow:
    def test_ends(self):
        while jitmoe.ANSWER == 1:
            time.sleep(0.1)
""",
}


SIGNAL = "__import__('signal').raise_signal"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    for name, text in TINY.items():
        path = tmp_path / "tiny" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path / "tiny"


def answering(answer: str, test: str = "test_right") -> Mutant:
    return Mutant(answer, "jitmoe/__init__.py", "42", answer, (f"test_tiny.py::{test}",), "Another answer.")


def test_only_a_failed_test_kills(tiny: Path) -> None:
    """A do-nothing mutant survives; what cannot be judged is not counted as caught."""
    expected = {
        answering("42"): ("survived", "test_tiny.py::test_right"),
        answering("43"): ("survived", "test_tiny.py::test_right"),
        answering("44"): ("killed", "test_tiny.py::test_right"),
        answering("40", test="test_skipped"): ("not run", ""),
        answering("-1"): ("broken", "BuildError"),
        answering("0"): ("broken", "a fixture breaks"),
        answering("("): ("broken", "SyntaxError"),
        answering("__import__('os')._exit(1)"): ("broken", "exit status 1"),
        answering(f"{SIGNAL}(11)"): ("broken", "exit status -11"),
        replace(answering(f"{SIGNAL}(6)"), ends_process=True): ("broken", "exit status -6"),
        replace(answering(f"{SIGNAL} (11)"), ends_process=True): ("killed", "SIGSEGV"),
    }
    outcomes = run_mutants(list(expected), tiny, jobs=4, limit=60)
    found = {outcome.mutant.name: (outcome.status, outcome.detail) for outcome in outcomes}
    for mutant, (status, words) in expected.items():
        assert found[mutant.name][0] == status and words in found[mutant.name][1], found[mutant.name]
    assert (tiny / "jitmoe/__init__.py").read_text(encoding="utf-8") == TINY["jitmoe/__init__.py"]


def test_a_hang_is_not_a_kill(tiny: Path) -> None:
    outcome = run_mutant(answering("1", test="TestSlow"), tiny, tiny / "out", limit=3)
    assert (outcome.status, outcome.good) == ("timeout", False)


def test_a_test_that_fails_anyway_proves_nothing(tiny: Path) -> None:
    (tiny / "jitmoe/__init__.py").write_text("ANSWER = 4200\n", encoding="utf-8")
    with pytest.raises(MutationError, match=r"without any mutant .* test_tiny.py::test_right"):
        run_mutants([answering("1")], tiny, jobs=1, limit=60)


@pytest.mark.parametrize("text", ["", "ANSWER = 42, 42\n"])
def test_a_mutant_that_does_not_fit_is_an_error(tiny: Path, text: str) -> None:
    (tiny / "jitmoe/__init__.py").write_text(text, encoding="utf-8")
    with pytest.raises(MutationError, match=r"in [02] places of jitmoe/__init__.py"):
        run_mutants([answering("1")], tiny, jobs=1, limit=60)


def test_the_command_fails_where_one_survives(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    killed, survived = (Outcome(MUTANTS[i], status, "a test", 1.0) for i, status in enumerate(("killed", "survived")))
    for outcomes, status in (([killed], 0), ([killed, survived], 1)):
        monkeypatch.setattr(mutants, "run_mutants", lambda *_, outcomes=outcomes: outcomes)
        assert mutants.main([]) == status
    assert "SURVIVED" in capsys.readouterr().out
    assert mutants.main(["--list"]) == 0
    with pytest.raises(SystemExit):
        mutants.main(["no_such_mutant"])
