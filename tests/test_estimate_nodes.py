"""Predictions for several machines: bytes that are counted by hand, and what the command says of published models."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jitmoe.bench.cluster import Cluster, draw_routes, predict_step
from jitmoe.bench.cluster_report import report
from jitmoe.cli import main
from jitmoe.config import MoEConfig
from jitmoe.errors import BenchError, ConfigError
from jitmoe.memory.model import read_model
from jitmoe.memory.presets import DENSE_PARAMETERS, PRESETS
from jitmoe.plan.exchange import RowBytes, row_bytes, slots_by_rank, traffic

SMALL = MoEConfig(num_experts=16, hidden_size=64, intermediate_size=96, top_k=2, lora_rank=5, isa="avx2")
CLUSTER = Cluster(SMALL, layers=3, tokens=500, dense=1e6)


def test_rows_go_once_to_each_rank() -> None:
    """Two ranks of two experts: token 0 has both of its experts on the other rank, token 2 one here and one there."""
    slots = [slots_by_rank(np.array(ids), [0, 2, 4]) for ids in ([[2, 3], [0, 1], [1, 2]], [[0, 0]])]
    assert slots[0].tolist() == [[0, 2], [2, 0], [1, 1]]
    one, other = traffic(slots, RowBytes(tokens=100, sums=20, grads=3, grad_sums=1))
    assert (one.rows_out, one.rows_in, one.rows_here, one.slots, one.slots_here, one.most_slots) == (2, 1, 2, 5, 3, 2)
    assert one.sent == other.received == 16 + 2 * 103 + 1 * 21
    assert one.received == other.sent == 16 + 1 * 103 + 2 * 21


def test_bytes_of_a_row() -> None:
    assert row_bytes(7, 3) == RowBytes(tokens=3 * 8 + 16, sums=28, grads=16, grad_sums=40)
    assert row_bytes(7, 3, training=False).total == 40 + 28
    assert row_bytes(7, 3, wants_x=False).grad_sums == 12


def test_routes_are_drawn_with_skew_and_without_replacement() -> None:
    even, skewed = (draw_routes(16, 4, 400, zipf, seed=1) for zipf in (0.0, 2.0))
    for ids in (even, skewed):
        assert ids.min() >= 0 and ids.max() <= 15 and all(len(set(row)) == 4 for row in ids.tolist())
    assert np.bincount(skewed.ravel()).max() > 1.5 * np.bincount(even.ravel()).max()
    assert (draw_routes(16, 4, 400, 2.0, seed=1) == skewed).all()


def test_what_a_step_depends_on() -> None:
    one, four = predict_step(CLUSTER, 1), predict_step(CLUSTER, 4)
    assert one.sent == 0 and one.network == 0 and four.sent > 0 and four.network > 0
    assert four.memory["experts"] * 4 == one.memory["experts"]
    assert predict_step(replace(CLUSTER, layers=6), 4).sent == 2 * four.sent
    assert predict_step(replace(CLUSTER, gigabits=400.0), 4).rate > four.rate
    assert predict_step(replace(CLUSTER, zipf=1.5), 4).imbalance > 1.2 * four.imbalance
    assert predict_step(replace(CLUSTER, training=False), 4).sent < four.sent
    with pytest.raises(ConfigError, match="16 experts cannot be shared by 17 ranks"):
        predict_step(CLUSTER, 17)


def test_the_report_says_where_scaling_stops_and_what_helps() -> None:
    slow = report(replace(CLUSTER, gigabits=0.1, zipf=1.0, memory=1), [4, 1], "small")
    assert "It does not fit" in slow and "Scaling stops at 4 machines" in slow
    helps = re.search(r"tokens/s there: (.*)\.", slow)
    assert helps and helps[1].startswith("four times the network") and "even routing" in helps[1]
    fast = report(replace(CLUSTER, gigabits=1e6, assumed=replace(CLUSTER.assumed, latency=0.0)), [1, 2], "small")
    assert "Up to 2 machines a machine keeps" in fast
    with pytest.raises(ConfigError, match="at least 1"):
        report(CLUSTER, [0], "small")


@pytest.mark.parametrize(
    ("name", "layers", "billions", "total"),
    [("deepseek-v3", 58, 653.9, 671), ("qwen3-235b", 94, 227.1, 235.1), ("kimi-k2", 60, 1014.7, 1026.4)],
)
def test_presets_have_the_published_sizes(name: str, layers: int, billions: float, total: float) -> None:
    model = read_model(Path(name))
    fields = model.fields
    experts = 3 * layers * fields["num_experts"] * fields["hidden_size"] * fields["intermediate_size"] / 1e9
    assert model.layers == layers and fields["top_k"] == 8
    assert round(experts, 1) == billions
    assert round(experts + DENSE_PARAMETERS[name] / 1e9) == round(total)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--nodes", "2,8", "--network", "25", "--weight-format", "int4_group", "--tokens", "64", "--isa", "avx2"]
    assert main(["estimate", "qwen3-235b", *options]) == 0
    out = capsys.readouterr().out
    assert "94 layers of 128 experts 4096 x 1536, top 8, int4_group" in out and "25 Gbit/s" in out
    assert main(["estimate", "qwen3-235b", "--nodes", "two"]) == 1
    assert "numbers with commas" in capsys.readouterr().err
    assert main(["estimate", "qwen3-235b", "--check-nodes"]) == 1
    assert "goes with --nodes" in capsys.readouterr().err
    assert set(PRESETS) == set(DENSE_PARAMETERS)


@pytest.mark.slow
def test_real_processes_move_and_hold_the_predicted_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    from jitmoe.bench import cluster_check

    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    config = MoEConfig(7, 47, 65, 3, lora_rank=5)
    cluster = Cluster(config, 1, 200, zipf=1.0)
    assert "All bytes are those predicted" in cluster_check.check(cluster, [1, 2, 4])
    right = cluster_check.predicted
    monkeypatch.setattr(cluster_check, "predicted", lambda *args: [replace(f, sent=f.sent + 1) for f in right(*args)])
    with pytest.raises(BenchError, match=r"rank 0 of 2: predicted .* measured"):
        cluster_check.check(cluster, [2])
