"""The example with transformers runs as its user runs it, on the base that it makes and on a folder that is given."""

import subprocess
import sys
from pathlib import Path

import pytest
from helpers import same_bits

pytest.importorskip("transformers", reason="the example needs transformers")
pytest.importorskip("peft", reason="the example needs PEFT")

from safetensors.torch import load_file

SCRIPT = Path(__file__).parents[1] / "examples" / "finetune_hf.py"
ADAPTER = Path("adapter") / "adapter_model.safetensors"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


SHORT = ("--pretrain-steps", "5", "--steps", "5", "--length", "48")


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """What a run on its own base left and said."""
    out = tmp_path_factory.mktemp("own")
    return out, run("--out", out, *SHORT)


def test_a_short_run(own: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, done = own
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok      validation loss falls" in done.stdout
    assert done.stdout.count(": jitmoe, 16 experts 128x64") == 2 and "NOT on jitmoe" not in done.stdout
    lines = [line for line in done.stderr.splitlines() if "training " in line or "tuning " in line]
    assert len(lines) == 8 and all(" loss " in line for line in lines)
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sum(".experts." in name for name in load_file(out / ADAPTER)) == 2 * 2 * 2


@pytest.mark.slow
def test_a_folder_that_is_given(own: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    out, _ = own
    done = run(out / "base", "--out", tmp_path, *SHORT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pre-training" not in done.stderr and not (tmp_path / "base").exists()
    one, other = (load_file(folder / ADAPTER) for folder in (out, tmp_path))
    assert one.keys() == other.keys() and all(same_bits(one[name], other[name]) for name in one)


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path / "nowhere")
    assert done.returncode == 2 and "is not a folder with config.json" in done.stderr
