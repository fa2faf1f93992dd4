"""What the README shows works as it stands there."""

import re
from pathlib import Path
from typing import Any

import families
import pytest
from test_mutants import names_in

from jitmoe.cli import main

README = Path(__file__).parent.parent / "README.md"
TEXT = README.read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
PROMISES = dict(re.findall(r"^\| ([^|`]+(?:`batch_invariant`[^|]+)?) \| (`test_.*) \|$", TEXT, re.MULTILINE))
COMMANDS = sorted(
    set(re.findall(r"jitmoe (build|cache|show|bench|estimate|doctor|check|replay|train|convert-weights|convert)", TEXT))
)


def test_python_blocks_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one session, as a reader would type them."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    families.eager_model("qwen3_moe", vocab_size=1000).save_pretrained("Qwen3-30B-A3B")  # a tiny one by that name
    names: dict[str, Any] = {}
    for block in BLOCKS:
        exec(compile(block, str(README), "exec"), names)
        if "from_pretrained" in block:
            gradients = {name for name, p in names["model"].named_parameters() if p.grad is not None}
            assert len(gradients) == 2 * families.LAYERS * (2 + 2), gradients
            assert "active" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"Qwen3-30B-A3B"}


def test_what_the_readme_points_at_is_there() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert len(targets) > 10 and [target for target in targets if not (README.parent / target).exists()] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert command in capsys.readouterr().out


def test_there_are_promises() -> None:
    """As many as the rows of their table."""
    table = TEXT.partition("| promise | tests |")[2].partition("\n\n")[0]
    assert len(PROMISES) == table.count("\n|") - 1 >= 6


@pytest.mark.parametrize("promise", PROMISES)
def test_what_holds_a_promise_exists(promise: str) -> None:
    tests = re.findall(r"`([^`]+)`", PROMISES[promise])
    assert len(tests) >= 2
    for test in tests:
        file, _, name = test.partition("::")
        assert name in names_in(file), test
