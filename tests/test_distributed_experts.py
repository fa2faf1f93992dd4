"""Experts shared out among processes compute what one process computes, and fail as loudly."""

import pytest
from helpers import build_kernels
from jobs_experts import CASE
from ranks import launch, run_ranks

from jitmoe.distributed import share_of
from jitmoe.errors import ConfigError, PeerError


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    build_kernels([CASE], ["auto"])


@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_results_and_gradients_are_those_of_one_process(world: int) -> None:
    run_ranks("jobs_experts.oracle", world)


def test_sums_cross_the_network_in_float32() -> None:
    run_ranks("jobs_experts.exact_sums", 2)


def test_edges_of_four_ranks() -> None:
    run_ranks("jobs_experts.edges", 4)


@pytest.mark.parametrize("how", ["SIGKILL", pytest.param("SIGSTOP", marks=pytest.mark.slow)])
def test_a_rank_that_is_gone_is_an_error_and_no_hang(how: str) -> None:
    run_ranks("jobs_experts.ends", 3, how, killed=[1])


def test_one_file_holds_the_adapters_of_all_ranks(tmp_path) -> None:
    for world in (3, 2):
        run_ranks("jobs_experts.saves", world, str(tmp_path))


def test_experts_of_transformers_under_its_own_expert_parallelism() -> None:
    pytest.importorskip("transformers.distributed.expert_parallel")
    pytest.importorskip("peft")
    run_ranks("jobs_hf.expert_parallel", 2)


@pytest.mark.slow
def test_bits_do_not_depend_on_threads_or_the_launcher() -> None:
    found = {launch("jobs_experts.digest", 2, n, OMP_NUM_THREADS=str(n)) for n in (1, 2)}
    assert found == {run_ranks("jobs_experts.digest", 2, 1)}


@pytest.mark.parametrize("experts", [1, 5, 7, 64])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_shares_follow_each_other_and_are_even(experts: int, size: int) -> None:
    if experts < size:
        with pytest.raises(ConfigError, match=f"{experts} experts cannot be shared by {size} ranks"):
            share_of(experts, 0, size)
        return
    shares = [share_of(experts, rank, size) for rank in range(size)]
    assert [expert for share in shares for expert in share] == list(range(experts))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_without_a_process_group_it_says_what_to_call() -> None:
    from jitmoe.distributed import ExpertParallel

    with pytest.raises(PeerError, match="init_process_group"):
        ExpertParallel.shard(None, None, None, None)
