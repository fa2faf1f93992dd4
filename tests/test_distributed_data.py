"""Replicas of a model on several processes: plain DistributedDataParallel around ours, with frozen packed weights."""

import importlib.util

import pytest
from helpers import build_kernels
from jobs_data import CASE
from ranks import run_ranks

HF = all(importlib.util.find_spec(name) for name in ("transformers", "peft"))


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    build_kernels([CASE])


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_gradients_are_those_of_the_whole_batch(world: int) -> None:
    run_ranks("jobs_data.gradients", world)


def test_a_replica_that_drifts_is_named() -> None:
    run_ranks("jobs_data.drifts", 3)


def test_processes_share_the_pages_of_a_packed_file(tmp_path) -> None:
    run_ranks("jobs_data.shares_pages", 2, str(tmp_path / "experts.packed"))


@pytest.mark.skipif(not HF, reason="transformers and PEFT are not installed")
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_peft_model_whose_experts_are_packed(world: int, tmp_path) -> None:
    run_ranks("jobs_hf.peft", world, str(tmp_path))
