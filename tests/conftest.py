"""What every test file shares: the kernel cache of the test run, golden files, the ``isa`` marker."""

import difflib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from jitmoe.jit import capability, toolchain

GOLDEN_DIR = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden files instead of comparing")
    parser.addoption(
        "--isa", help="of the tests for one instruction set run those for this one; 'best' of this machine"
    )
    parser.addoption("--examples", type=int, default=500, help="that each slow test of make fuzz draws")
    parser.addoption("--tiles", help="the set whose tiles are emulated: amx, or amx_avx2 as on CPUs without AVX-512")


def pytest_configure(config: pytest.Config) -> None:
    # Kept between runs, so that only changed kernels are compiled again, and apart from the user's own
    # cache. A test that examines the cache itself takes the `cold_cache` fixture instead.
    os.environ["JITMOE_CACHE_DIR"] = str(config.cache.mkdir("jitmoe") / "kernels")
    import emulated

    emulated.choose_tiles(config.getoption("--tiles"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("--isa")
    if not wanted:
        return
    import helpers

    helpers.only_isa = helpers.usable_isas()[0] if wanted == "best" else wanted
    others = [item for item in items if any(mark.args[0] != helpers.only_isa for mark in item.iter_markers("isa"))]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in others]


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("isa"):
        skip_unless_usable(marker.args[0])


def skip_unless_usable(isa: str) -> None:
    """Skip the calling test, with the reason, where this machine cannot execute ``isa``."""
    found = next(entry for entry in capability.capabilities() if entry.isa == isa)
    if not found.usable:
        pytest.skip(f"{isa}: {found.reason}")


@pytest.fixture
def cold_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty kernel cache that only this test sees."""
    location = tmp_path / "kernels"
    monkeypatch.setenv("JITMOE_CACHE_DIR", str(location))
    return location


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare a text with ``tests/golden/<name>``; ``--update-golden`` writes it instead."""
    update = request.config.getoption("--update-golden")

    def check(name: str, text: str) -> None:
        path = GOLDEN_DIR / name
        if update:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        assert path.is_file(), f"{path} does not exist: run pytest --update-golden and read the diff"
        expected = path.read_text(encoding="utf-8")
        diff = difflib.unified_diff(expected.splitlines(), text.splitlines(), "golden", "now", lineterm="")
        assert text == expected, "\n".join(diff)

    return check


@dataclass(frozen=True)
class FakeCompiler:
    """A shell script that answers for the real compiler and counts the compilations asked of it."""

    path: Path
    counter: Path

    @property
    def runs(self) -> int:
        """Number of compilations started so far, in all processes."""
        return len(self.counter.read_text().splitlines()) if self.counter.exists() else 0


@pytest.fixture
def fake_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeCompiler]:
    """Make ``$JITMOE_CXX`` a script whose compilations run ``body``; "$REAL" in it is the real compiler."""
    real = toolchain.find_compiler().path

    def make(body: str = '"$REAL" "$@"', name: str = "fake-g++") -> FakeCompiler:
        path, counter = tmp_path / name, tmp_path / "compiler-runs"
        path.write_text(
            f"#!/bin/sh\nREAL='{real}'\n"
            'case "$1" in --version|-dumpmachine) exec "$REAL" "$1";; -dM) exec "$REAL" "$@";; esac\n'
            f"echo run >> '{counter}'\n{body}\n",
            encoding="utf-8",
        )
        path.chmod(0o755)
        monkeypatch.setenv("JITMOE_CXX", str(path))
        return FakeCompiler(path, counter)

    return make
