"""Training on several processes, as its user starts it: the example, and transformers' Trainer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import ALONE, launch

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[1] / "examples" / "finetune_distributed.py"


@pytest.mark.parametrize(("world", "share"), [(1, 1), (2, 2), (2, 1), (4, 2)])
def test_the_example_has_the_losses_of_one_process(world: int, share: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}", str(SCRIPT)]
    options = [
        "--expert-parallel",
        str(share),
        "--steps",
        "4",
        "--pretrain-steps",
        "4",
        "--compare",
        "--check-replicas",
    ]
    done = subprocess.run(
        [*command, *options, "--out", str(tmp_path)],
        env={**os.environ, **ALONE, "PYTHONPATH": str(SCRIPT.parents[1])},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok  ") == 3
    if world == 1:
        assert "largest difference from one process 0.0000" in done.stdout


def test_a_trainer_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    """Twelve rows a step, on two processes, then from step 4 on on one and on four: the same losses, by the rule."""
    pytest.importorskip("peft")
    from training import tiny_model, train, with_lora

    from jitmoe.oracle.yardstick import judge_one

    whole = losses(launch("jobs_hf.trainer", 2, str(tmp_path / "two"), "", 3, 2))
    more = {"per_device_train_batch_size": 12, "gradient_accumulation_steps": 1}
    exact, plain = (
        torch.tensor(
            [
                loss
                for _, kind, loss in train(with_lora(tiny_model("eager", dtype)), tmp_path / str(dtype), **more).losses
                if kind == "loss"  # in evaluation several processes fill up with rows of the beginning
            ],
            dtype=torch.float64,
        )
        for dtype in (torch.float64, torch.bfloat16)
    )
    for world, rows, accumulation in ((1, 3, 4), (4, 3, 1)):
        job = ("jobs_hf.trainer", world, str(tmp_path / str(world)), str(tmp_path / "two" / "checkpoint-4"))
        resumed = losses(launch(*job, rows, accumulation))
        assert len(resumed) == len(whole) == len(exact)
        for found in (whole, resumed):
            verdict = judge_one("loss", found, exact, [plain - exact], torch.ones(len(exact), dtype=bool), coarse=True)
            assert not verdict.fault, f"{world}: {verdict}\n{found}\n{exact}\n{plain}"


def losses(output: str) -> torch.Tensor:
    """What the first rank printed last."""
    return torch.tensor(json.loads(output.strip().splitlines()[-1]), dtype=torch.float64)
