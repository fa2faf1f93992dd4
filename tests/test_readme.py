"""What the README shows works as it stands there."""

import re
from pathlib import Path
from typing import Any

import pytest

from jitmoe.cli import main

README = Path(__file__).parent.parent / "README.md"
TEXT = README.read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = sorted(set(re.findall(r"jitmoe (build|cache|show|bench|estimate|doctor|check|replay|train)", TEXT)))


def test_python_blocks_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one session, as a reader would type them."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for number, block in enumerate(BLOCKS):
        exec(compile(block, str(README), "exec"), names)
        if number == 0:
            layer, x, y = names["layer"], names["x"], names["y"]
            assert y.shape == x.shape and x.grad.count_nonzero() > 0
            # B starts at zero, so its gradient is the one that is not.
            assert layer.gate_lora_b.grad.count_nonzero() > 0
    out = capsys.readouterr().out
    assert "packed_gate" in out
    assert re.search(
        r"^layer 0, call 0 \(forward\): x of expert \d+ has 1 NaN .*token 3,.*column 17", out, re.MULTILINE
    )
    assert {path.name for path in tmp_path.iterdir()} == {"experts.packed", "trace.png", "call.pt"}
    assert main(["replay", "call.pt"]) == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert command in capsys.readouterr().out
