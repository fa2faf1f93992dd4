"""Holds the model of :mod:`jitmoe.bench.cluster` to a step of one layer on real processes of this machine.

Bytes on the network and of weights, adapters and gradients must be those predicted, exactly. Times are printed beside
each other and not judged: processes of one machine share its memory and cores, and loopback is no network.
"""

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from jitmoe.bench.ceilings import Ceilings
from jitmoe.bench.cluster import Cluster, draw_routes, predict_step
from jitmoe.bench.predict import Machine
from jitmoe.config import MoEConfig
from jitmoe.distributed import ExpertParallel, share_of
from jitmoe.errors import BenchError
from jitmoe.jit.warm import build
from jitmoe.memory.plan import kernels_of, plan_layer
from jitmoe.plan.exchange import bounds_of, row_bytes, slots_by_rank, traffic
from jitmoe.text import size, table

HEAD = ("processes", "rank", "weights", "adapters", "sent", "received", "predicted ms", "measured ms")

READ_BYTES = 1 << 28
"""Beyond the caches, and no burden where several processes follow."""

SECONDS = 300
"""Longest wait for another process."""


@dataclass(frozen=True)
class Found:
    """Bytes of one rank, predicted or measured: of base weights, of LoRA parameters, of their gradients, and moved."""

    weights: int
    parameters: int
    gradients: int
    sent: int
    received: int


def check(cluster: Cluster, nodes: Sequence[int]) -> str:
    """Run a step of one layer on each number of processes, and compare.

    Args:
        cluster: what is predicted; its machine is replaced by a core of this one.
        nodes: numbers of processes.

    Returns:
        A table of bytes and times.

    Raises:
        BenchError: a number of bytes is not what was predicted; names rank and both.
    """
    config, tokens, zipf = cluster.config, cluster.tokens, cluster.zipf
    build([replace(config, num_experts=len(share_of(config.num_experts, 0, n)), allow_skip=True) for n in nodes])
    machine = _this_machine(kernels_of(config).isa)
    rows: list[tuple[str, ...]] = [
        ("processes", "rank", "weights", "adapters", "sent", "received", "predicted ms", "measured ms")
    ]
    for number in nodes:
        expected, measured = predicted(config, tokens, number, zipf), _measured(config, tokens, number, zipf)
        seconds = predict_step(replace(cluster, machine=machine), number).seconds
        for rank, (right, (found, took)) in enumerate(zip(expected, measured, strict=True)):
            if found != right:
                raise BenchError(f"rank {rank} of {number}: predicted {right}, measured {found}")
            sizes = (size(n) for n in (found.weights, found.parameters, found.sent, found.received))
            rows.append((str(number), str(rank), *sizes, f"{1e3 * seconds:.3g}", f"{1e3 * took:.3g}"))
    return table(rows) + "\nAll bytes are those predicted. Times are not judged: the processes share this machine."


def predicted(config: MoEConfig, tokens: int, nodes: int, zipf: float) -> list[Found]:
    """Of each rank."""
    bounds = bounds_of(config.num_experts, nodes)
    slots = [slots_by_rank(_routes(config, tokens, zipf, rank).numpy(), bounds) for rank in range(nodes)]
    moved = traffic(slots, row_bytes(config.hidden_size, config.top_k))
    found = []
    for rank, one in enumerate(moved):
        share = replace(config, num_experts=len(share_of(config.num_experts, rank, nodes)))
        kinds = plan_layer(share).by_kind()
        lora = kinds.get("parameter", 0)
        found.append(Found(kinds["packed weight"], lora, lora, one.sent, one.received))
    return found


def _routes(config: MoEConfig, tokens: int, zipf: float, rank: int) -> torch.Tensor:
    return torch.from_numpy(draw_routes(config.num_experts, config.top_k, tokens, zipf, rank))


def _this_machine(isa: str) -> Machine:
    """One core of it, by its own ceilings."""
    rates = Ceilings(1, READ_BYTES).measure()
    products = rates.get({"amx": "tmul", "avx512_bf16": "bf16"}.get(isa, "fma"), rates["fma"])
    return Machine("here", isa, 1, products, rates["fma"], rates["read"], "measured")


def _measured(config: MoEConfig, tokens: int, nodes: int, zipf: float) -> list[tuple[Found, float]]:
    with tempfile.TemporaryDirectory() as folder:
        spawn(_step, (nodes, config, tokens, zipf, folder), nprocs=nodes)  # type: ignore[no-untyped-call]
        told = [json.loads(Path(folder, str(rank)).read_text()) for rank in range(nodes)]
    return [(Found(**fields), took) for fields, took in told]


def _step(rank: int, nodes: int, config: MoEConfig, tokens: int, zipf: float, folder: str) -> None:
    """One process: a step to warm up and one that is measured."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", timedelta(seconds=SECONDS), nodes, rank)
    parallel = ExpertParallel.shard(config, *_sources(config))
    ids = _routes(config, tokens, zipf, rank)
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(tokens, config.hidden_size, generator=generator).bfloat16().requires_grad_()
    weights = torch.rand(ids.shape, generator=generator, requires_grad=True)
    for _ in range(2):
        parallel.zero_grad()
        dist.barrier()
        began = time.perf_counter()
        parallel(x, ids, weights).sum().backward()
        took = time.perf_counter() - began
    exchanged = parallel.last_exchange
    assert exchanged is not None
    layer = parallel.layer
    found = Found(
        weights=sum(tensor.nbytes for tensor in layer._packed().values()) + sum(b.nbytes for b in layer.buffers()),
        parameters=sum(parameter.nbytes for parameter in layer.parameters()),
        gradients=sum(parameter.grad.nbytes for parameter in layer.parameters() if parameter.grad is not None),
        sent=exchanged.sent,
        received=exchanged.received,
    )
    Path(folder, str(rank)).write_text(json.dumps([vars(found), took]))
    dist.barrier()
    dist.destroy_process_group()


def _sources(config: MoEConfig) -> list[Any]:
    """Random matrices, one expert at a time."""

    def source(out: int, in_: int) -> Any:
        return lambda expert: (torch.randn(out, in_, generator=torch.Generator().manual_seed(expert)) * 0.02).bfloat16()

    hidden, intermediate = config.hidden_size, config.intermediate_size
    return [source(intermediate, hidden), source(intermediate, hidden), source(hidden, intermediate)]
