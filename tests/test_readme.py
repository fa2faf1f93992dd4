"""What the README shows works as it stands there."""

import re
from pathlib import Path

import pytest

from jitmoe import cli

README = Path(__file__).parent.parent / "README.md"
TEXT = README.read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = sorted(set(re.findall(r"jitmoe (build|cache|show|bench|estimate|doctor)", TEXT)))


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0])
def test_python_block_runs(block: str) -> None:
    names: dict[str, object] = {}
    exec(compile(block, str(README), "exec"), names)
    layer, x, y = names["layer"], names["x"], names["y"]
    assert y.shape == x.shape and x.grad.count_nonzero() > 0
    assert layer.gate_lora_b.grad.count_nonzero() > 0, "B starts at zero, so its gradient is the one that is not"


def test_there_is_a_python_block() -> None:
    assert BLOCKS


@pytest.mark.parametrize("command", COMMANDS)
def test_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main([command, "--help"])
    assert exit_.value.code == 0
    assert command in capsys.readouterr().out
