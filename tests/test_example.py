"""The example runs as its user runs it, and refuses to call a wrong layer right."""

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from jitmoe.oracle.reference import LoraTensors

SCRIPT = Path(__file__).parents[1] / "examples" / "finetune.py"
SHORT = ("--steps", "3", "--pretrain-steps", "3")

SABOTAGED = """
import sys
sys.path.insert(0, sys.argv[1])
del sys.argv[1]
import finetune, jitmoe
forward = jitmoe.MoELayer.forward
jitmoe.MoELayer.forward = lambda self, x, ids, weights: forward(self, x, ids, weights) * 1.05
sys.exit(finetune.main())
"""


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


def test_a_short_run_keeps_its_promises_and_leaves_its_files(tmp_path: Path) -> None:
    done = run(SCRIPT, "--out", tmp_path, *SHORT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok  ") == 3
    assert "torch bfloat16" in done.stdout and "loss after" in done.stdout
    assert done.stderr.count("pre-training ") == 3 and "\r" not in done.stderr
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    with safe_open(tmp_path / "adapter.safetensors", framework="pt") as adapter:
        expected = {f"blocks.{layer}.experts.{name}" for layer in range(2) for name in LoraTensors._fields}
        assert set(adapter.keys()) == expected
        assert all(adapter.get_tensor(name).any() for name in expected)


def test_a_layer_that_is_wrong_by_5_percent_fails_the_run(tmp_path: Path) -> None:
    done = run("-c", SABOTAGED, SCRIPT.parent, "--out", tmp_path, *SHORT)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILED  largest difference" in done.stdout


@pytest.mark.parametrize("arguments", [("--steps", "0"), ("--isa", "sse2")])
def test_an_option_that_makes_no_run_is_refused(arguments: tuple[str, str], tmp_path: Path) -> None:
    done = run(SCRIPT, "--out", tmp_path, "--pretrain-steps", "1", *arguments)
    assert done.returncode != 0
    assert arguments[1] in done.stderr
