"""Predicts a step of a model whose experts are shared out among machines, from the bytes that the exchange counts.

A machine is what :mod:`jitmoe.bench.predict` takes for one. Each layer waits for its slowest machine in each phase:

    forward    counts, then tokens over the network beside the own rows, then the rows that came, then sums back
    backward   the same with gradients

or, where it is faster, without the overlap: all rows in one call, which reads the experts' weights once. What every
token passes beside the experts (attention, shared experts, embeddings) is on each machine. Routing is drawn, so that
skew, duplicates on one machine and the worst machine are counted and not assumed. Every number that is on no data sheet
is in :class:`NetworkAssumptions`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from jitmoe.bench.predict import ABSENT, ASSUMED, Machine, predict
from jitmoe.config import MoEConfig
from jitmoe.errors import ConfigError
from jitmoe.memory.plan import MemoryPlan, kernels_of, plan_call
from jitmoe.oracle.workloads import Workload
from jitmoe.plan.exchange import (
    SUM_BYTES,
    RankTraffic,
    RowBytes,
    bounds_of,
    row_bytes,
    share_of,
    slots_by_rank,
    traffic,
)

DRAWN = 2048
"""Most tokens of a machine whose routing is drawn; more are scaled up from these."""

PER_LAYER = ("packed weight", "parameter", "gradient", "saved")
"""Kinds of memory that all layers hold at once."""


@dataclass(frozen=True)
class NetworkAssumptions:
    """Every number about a network and a model's other parts that is on no data sheet.

    Attributes:
        network_share: share of the line rate that an exchange among all machines reaches.
        latency: seconds of one exchange between two machines, over TCP.
        latency_each: seconds more for each further machine.
        dense_share: share of the products' peak of what is no expert.
    """

    network_share: float = 0.8
    latency: float = 60e-6
    latency_each: float = 10e-6
    dense_share: float = 0.4


@dataclass(frozen=True)
class Cluster:
    """What to predict.

    Attributes:
        config: of a layer with all experts.
        layers: layers with experts.
        tokens: of one step of each machine.
        gigabits: line rate of a machine's network, in both directions at once, in 1e9 bit/s.
        zipf: exponent of the skew: the n-th most popular expert has odds n ** -zipf; 0 is even.
        training: with backward.
        dense: parameters beside the routed experts.
        machine: each of them.
        memory: bytes of each.
        assumed: about the network.
    """

    config: MoEConfig
    layers: int
    tokens: int
    gigabits: float = 100.0
    zipf: float = 0.0
    training: bool = True
    dense: float = 0.0
    machine: Machine = ABSENT[0]
    memory: int = 512_000_000_000
    assumed: NetworkAssumptions = NetworkAssumptions()

    def __post_init__(self) -> None:
        if self.gigabits <= 0 or self.zipf < 0 or self.dense < 0 or self.memory < 1 or self.tokens < 1:
            raise ConfigError("network, memory and tokens must be positive, and skew and dense parameters not negative")


@dataclass(frozen=True)
class Step:
    """One step on a number of machines.

    Attributes:
        nodes: machines.
        seconds: of the step.
        network: seconds of these in which machines wait for the network alone.
        dense: seconds of these for what is no expert.
        sent: bytes that the machine that sends most sends in the step.
        memory: bytes that the machine with most experts and rows holds, by kind.
        imbalance: rows of the busiest machine over the mean.
        bound: of the experts' products: "arithmetic" or "memory".
        tokens: of all machines.
    """

    nodes: int
    seconds: float
    network: float
    dense: float
    sent: int
    memory: dict[str, int]
    imbalance: float
    bound: str
    tokens: int

    @property
    def rate(self) -> float:
        """Tokens a second of all machines."""
        return self.tokens / self.seconds

    @property
    def nbytes(self) -> int:
        """Memory of a machine."""
        return sum(self.memory.values())


def draw_routes(
    experts: int, top_k: int, tokens: int, zipf: float, seed: int, model_seed: int = 0
) -> npt.NDArray[np.int64]:
    """Ids [T, K] of K experts each, drawn without replacement; ``model_seed`` decides which experts are popular."""
    odds = np.arange(1, experts + 1, dtype=np.float64) ** -zipf
    odds = np.random.default_rng(model_seed).permutation(odds)
    noise = np.random.default_rng((model_seed, seed, 1)).gumbel(size=(tokens, experts))
    ids: npt.NDArray[np.int64] = np.argpartition(-(np.log(odds) + noise), top_k - 1, axis=1)[:, :top_k]
    return ids


@lru_cache(maxsize=32)
def _drawn_traffic(
    experts: int, top_k: int, tokens: int, zipf: float, nodes: int, each: RowBytes
) -> tuple[RankTraffic, ...]:
    bounds = bounds_of(experts, nodes)
    routes = (draw_routes(experts, top_k, tokens, zipf, rank) for rank in range(nodes))
    return tuple(traffic([slots_by_rank(ids, bounds) for ids in routes], each))


def predict_step(cluster: Cluster, nodes: int) -> Step:
    """Predict one step on ``nodes`` machines.

    Raises:
        ConfigError: there are fewer experts than machines.
    """
    config, assumed = cluster.config, cluster.assumed
    drawn = min(cluster.tokens, DRAWN)
    scale = cluster.tokens / drawn
    each = row_bytes(config.hidden_size, config.top_k, cluster.training)
    ranks = _drawn_traffic(config.num_experts, config.top_k, drawn, cluster.zipf, nodes, each)
    rate = assumed.network_share * cluster.gigabits * 1e9 / 8
    wait = assumed.latency + assumed.latency_each * max(nodes - 2, 0) if nodes > 1 else 0.0
    out, into = (scale * max(getattr(rank, name) for rank in ranks) for name in ("rows_out", "rows_in"))
    layer, network, bound = 0.0, 0.0, ""
    for backward in (False, True) if cluster.training else (False,):
        go, back = (each.grads, each.grad_sums) if backward else (each.tokens, each.sums)
        there, home = (wait + max(out, into) * nbytes / rate for nbytes in (go, back))
        own, rest, both = (
            _experts(cluster, ranks, name, scale, backward) for name in ("slots_here", "rows_from", "slots")
        )
        bound = both[1] if not backward else bound
        overlapped, plain = max(there, own[0]) + rest[0], there + both[0]
        work = min(overlapped, plain) if nodes > 1 else both[0]
        busy = (own[0] + rest[0] if overlapped < plain else both[0]) if nodes > 1 else both[0]
        counts = 0.0 if backward else wait
        layer += counts + work + (home if nodes > 1 else 0.0)
        network += counts + max(work - busy, 0.0) + (home if nodes > 1 else 0.0)
    dense = _dense_seconds(cluster)
    slots = [rank.slots for rank in ranks]
    return Step(
        nodes=nodes,
        seconds=cluster.layers * layer + dense,
        network=cluster.layers * network,
        dense=dense,
        sent=round(cluster.layers * scale * max(rank.sent for rank in ranks)),
        memory=_memory(cluster, nodes, ranks, scale),
        imbalance=max(slots) / (sum(slots) / nodes),
        bound=bound,
        tokens=nodes * cluster.tokens,
    )


def _experts(
    cluster: Cluster, ranks: Sequence[RankTraffic], name: str, scale: float, backward: bool
) -> tuple[float, str]:
    """Seconds of the busiest machine's experts on these slots, and what bounds their products."""
    config, nodes = cluster.config, len(ranks)
    slots = max(rank.slots - rank.slots_here if name == "rows_from" else getattr(rank, name) for rank in ranks)
    if not slots:
        return 0.0, ""
    local = len(share_of(config.num_experts, 0, nodes))
    workload = Workload(
        "", local, config.hidden_size, config.intermediate_size, 1, config.lora_rank, max(round(slots * scale), 1)
    )
    packed = config.packing.packed_bytes(config.intermediate_size, config.hidden_size)
    weight_bytes = packed / (config.intermediate_size * config.hidden_size)
    found = predict(workload, cluster.machine, backward, ASSUMED, weight_bytes)
    return found.seconds, found.bound


def _dense_seconds(cluster: Cluster) -> float:
    """Of what is no expert: bfloat16 weights that are read once a pass, frozen."""
    machine, passes = cluster.machine, 2 if cluster.training else 1
    arithmetic = 2 * cluster.dense * cluster.tokens / (machine.products * cluster.assumed.dense_share)
    return passes * max(arithmetic, 2 * cluster.dense / (machine.bandwidth * ASSUMED.read_share))


def _memory(cluster: Cluster, nodes: int, ranks: Sequence[RankTraffic], scale: float) -> dict[str, int]:
    """Bytes by kind on the machine with most experts and most rows."""
    rows = max(round(scale * (rank.rows_here + rank.rows_in)) for rank in ranks)
    most = max(rank.most_slots for rank in ranks)
    plan = plan_of_rank(cluster.config, nodes, rows, most, cluster.machine.threads, cluster.training)
    held = {kind: nbytes * (cluster.layers if kind in PER_LAYER else 1) for kind, nbytes in plan.by_kind().items()}
    found: dict[str, int] = {
        "experts": held.pop("packed weight"),
        "adapters and optimizer": held.pop("parameter", 0) * (3 if cluster.training else 1) + held.pop("gradient", 0),
        "saved for backward": held.pop("saved", 0),
        "rest of the model": round(2 * cluster.dense),
    }
    if nodes > 1:
        each = row_bytes(cluster.config.hidden_size, cluster.config.top_k, cluster.training)
        crossing = max(rank.rows_in + rank.rows_out for rank in ranks)
        found["exchange"] = round(scale * crossing * max(each.tokens + each.sums, each.grads + each.grad_sums))
        found["exchange"] += 2 * rows * cluster.config.hidden_size * SUM_BYTES  # x and its sums in float32
    return found | {"a call": sum(held.values())}


@lru_cache(maxsize=32)
def plan_of_rank(config: MoEConfig, nodes: int, rows: int, most_slots: int, threads: int, training: bool) -> MemoryPlan:
    """Memory of the largest share of a layer and its call on ``rows`` rows, of at most ``most_slots`` slots each."""
    local = replace(
        config,
        num_experts=len(share_of(config.num_experts, 0, nodes)),
        top_k=max(1, most_slots) if nodes > 1 else config.top_k,
        allow_skip=True,
    )
    return plan_call(kernels_of(local), rows, threads, training)


def assumptions_text(cluster: Cluster) -> str:
    """The machine and every assumed number, a line each."""
    machine = cluster.machine
    lines = [
        f"machine: {machine.name}, {machine.products / 1e12:.4g} TFLOP/s, {machine.bandwidth / 1e9:.4g} GB/s",
        f"  {machine.source}",
    ]
    lines += [f"{field.name} = {getattr(cluster.assumed, field.name):g}" for field in fields(cluster.assumed)]
    return "\n".join(lines)
