"""Comparisons with another time or commit: their arithmetic, and that both trees really run."""

import json
import random
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from test_bench import TINY

from jitmoe.bench import history, revisions
from jitmoe.bench.ceilings import Ceilings
from jitmoe.bench.history import change, interval
from jitmoe.bench.measure import Options, compare
from jitmoe.bench.report import as_json
from jitmoe.errors import BenchError


@pytest.mark.parametrize(("n", "place"), [(1, 0), (5, 0), (6, 0), (8, 0), (9, 1), (12, 2), (20, 5)])
def test_bounds_of_a_median_are_those_of_the_table(n: int, place: int) -> None:
    """Places in sorted values from the binomial table: 2 P(Bin(n, 1/2) < place + 1) <= 0.05."""
    values = random.Random(0).sample(range(1000), n)
    assert interval(values) == (sorted(values)[place], sorted(values)[n - 1 - place])


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ([1.1] * 6 + [0.9], "same within the noise"),
        ([1.02] * 9 + [0.9], "SLOWER"),
        ([0.98] * 9 + [1.2], "faster"),
        ([0.9, 1.1, 1.0], "same within the noise"),
    ],
)
def test_a_change_counts_beyond_the_noise_of_its_rounds(ratios: list[float], verdict: str) -> None:
    found = change("W", "forward", "ref", [1.0] * len(ratios), ratios, ratios)
    assert found.verdict == verdict
    named = "slower: W forward (ref)" in history.changes_table([found], "before")
    assert named == (verdict == "SLOWER")


@pytest.fixture(scope="module")
def outcome():
    return compare(TINY, Options(isas=("ref",), repeat=6), Ceilings(1, 1 << 20, 1000))


def test_a_record_is_compared_by_the_ceilings_of_its_run(outcome, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_text(json.dumps(as_json([outcome], 0)))
    record = history.read_record(path)
    assert [c.ratio for c in history.compare_with_record(record, [outcome])] == [1.0, 1.0]
    assert {c.verdict for c in history.compare_with_record(record, [outcome])} == {"same within the noise"}
    for result in record["workloads"][0]["results"]:
        result["seconds"] = [seconds / 100 for seconds in result["seconds"]]
    assert {c.verdict for c in history.compare_with_record(record, [outcome])} == {"SLOWER"}
    for result in record["workloads"][0]["results"]:  # as long ago, on a machine a hundred times as fast
        result["least_seconds"] /= 100
    assert [c.ratio for c in history.compare_with_record(record, [outcome])] == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"workloads": [{"name": 1, "results": [{}]}]}', "[" * 100000])
def test_another_file_is_no_record(tmp_path: Path, content: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(BenchError, match=r"other\.json is no record"):
        history.read_record(path)


def test_a_record_without_these_workloads_is_refused(outcome) -> None:
    other = replace(outcome, workload=replace(TINY, name="other"))
    with pytest.raises(BenchError, match="none of these workloads"):
        history.compare_with_record(as_json([outcome], 0), [other])


@pytest.fixture
def slow_commit(tmp_path: Path) -> Path:
    """A checkout whose only commit is this tree with a pause in every call."""
    for folder in ("jitmoe", "templates"):
        shutil.copytree(revisions.HERE / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    call = tmp_path / "jitmoe/experts/call.py"
    before = "    watcher = observer.current()"
    assert before in call.read_text()
    call.write_text(call.read_text().replace(before, f"    __import__('time').sleep(0.2)\n{before}"))
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.com"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "slow"]):
        subprocess.run([*git, *command], check=True)
    return tmp_path


def test_another_commit_is_measured_in_turn(slow_commit: Path) -> None:
    forward, both = revisions.compare_with("HEAD", [TINY], "ref", 1, 2, slow_commit)
    assert forward.before > 0.2 and both.before > 0.4, "the commit's own code did not run"
    assert 0 < forward.low <= forward.ratio <= forward.high and both.now > 0


@pytest.mark.parametrize(("isa", "revision", "words"), [("ref", "no-such", "no-such"), ("foo", "HEAD", "status 1")])
def test_what_cannot_run_is_an_error(slow_commit: Path, isa: str, revision: str, words: str) -> None:
    with pytest.raises(BenchError, match=words):
        revisions.compare_with(revision, [TINY], isa, 1, 1, slow_commit)
