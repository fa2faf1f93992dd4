"""What the ranks of tests of data parallelism do."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import case_named, config_of, different, layer_of, set_lora, usable_isas
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from yardstick import Inputs, Results, check, make_inputs

from jitmoe.distributed import check_replicas
from jitmoe.errors import ReplicaError
from jitmoe.experts.layer import MoELayer
from jitmoe.plan.projections import LORA_NAMES

CASE = replace(case_named("ragged_47"), name="replicas", experts=7, rank=5, tokens=88)


def gradients(rank: int, world: int) -> None:
    """The mean of the ranks' gradients, times the ranks, is the gradient of all tokens, by the error rule."""
    idle = replace(CASE, name="idle", experts=12, routing="idle_experts")
    for case, empty in ((CASE, False), (replace(CASE, name="one", routing="one_expert"), False), (idle, True)):
        inputs = make_inputs(case)
        layer = layer_of(inputs, usable_isas()[0])
        parallel = DistributedDataParallel(layer)
        share = case.tokens // (world - empty)  # the last rank may get none
        mine = slice(rank * share, min((rank + 1) * share, case.tokens))
        whole = stepped(parallel, layer, inputs, [mine])
        check(whole, inputs)
        # After its first step DDP lays its buckets out anew, and gloo adds up in an order that follows from the place.
        second, third = (stepped(parallel, layer, inputs, [mine]) for _ in range(2))
        assert not different(second, third)
        check(second, inputs)
        if not empty:
            middle = (mine.start + mine.stop) // 2
            check(stepped(parallel, layer, inputs, [slice(mine.start, middle), slice(middle, mine.stop)]), inputs)


def stepped(parallel: nn.Module, layer: MoELayer, inputs: Inputs, batches: list[slice]) -> Results:
    """Results of one step of all ranks on ``batches``, of which only the last one is synchronised."""
    world = dist.get_world_size()
    layer.zero_grad()
    parts = []
    for number, batch in enumerate(batches, start=1):
        x, weights = (tensor[batch].clone().requires_grad_() for tensor in (inputs.x, inputs.weights))
        with nullcontext() if number == len(batches) else parallel.no_sync():
            out = parallel(x, inputs.topk_ids[batch], weights)
            out.backward(inputs.dout[batch])
        parts.append({"out": out.detach(), "x": x.grad, "weights": weights.grad})
    told: list[Any] = [None] * world
    lora = {name: layer.get_parameter(name).grad for name in LORA_NAMES}
    dist.all_gather_object(told, ({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, lora))
    for _, others in told:
        assert not different(others, lora)
    mine = [results for results, _ in told]
    return {name: torch.cat([one[name] for one in mine]) for name in mine[0]} | {n: g * world for n, g in lora.items()}


def drifts(rank: int, world: int) -> None:
    """Replicas that are alike pass; one that has moved is named, with its rank, on all ranks."""
    inputs = make_inputs(CASE)
    model = nn.ModuleDict({"a": layer_of(inputs, usable_isas()[0]), "b": layer_of(inputs, usable_isas()[0])})
    assert check_replicas(model) == 2 * len(LORA_NAMES)
    assert check_replicas(DistributedDataParallel(model), frozen=True) == 2 * len(LORA_NAMES)
    if rank == 1:
        with torch.no_grad():
            model["b"].down_lora_b[6, 0, 0] += 1e-3
    with pytest.raises(ReplicaError, match=r"apart: b\.down_lora_b on rank 1 "):
        check_replicas(model)
    model["a"].gate_lora_a.requires_grad_(rank != 0)
    with pytest.raises(ReplicaError, match="different names, shapes or dtypes"):
        check_replicas(model)


def shares_pages(rank: int, world: int, path: str) -> None:
    """All ranks map one packed file: its pages are in memory once, before and after a step."""
    inputs = make_inputs(CASE)
    if rank == 0:
        layer_of(inputs, usable_isas()[0]).save_packed(path)
    dist.barrier()
    layer = MoELayer.from_packed(config_of(CASE, usable_isas()[0]), path)
    set_lora(layer, inputs)
    parallel = DistributedDataParallel(layer)
    check(stepped(parallel, layer, inputs, [slice(rank, None, world)] if world == 1 else [_block(rank, world)]), inputs)
    dist.barrier()
    once_in_memory(Path(path), world)
    dist.barrier()


def _block(rank: int, world: int) -> slice:
    share = CASE.tokens // world
    return slice(rank * share, (rank + 1) * share)


def once_in_memory(path: Path, world: int) -> None:
    """Of this process's pages of the file none is its own, and each counts for one of ``world``."""
    found = [fields for name, fields in _mappings() if name == str(path)]
    total = {name: sum(fields[name] for fields in found) for name in ("Rss", "Pss", "Private_Dirty", "Shared_Clean")}
    assert total["Rss"] > 0 and total["Private_Dirty"] == 0, total
    assert total["Pss"] <= 1.1 * total["Rss"] / world, total


def _mappings() -> Iterator[tuple[str, dict[str, int]]]:
    """Files that this process maps, and kilobytes of each mapping."""
    name, fields = "", {}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            if name:
                yield name, fields
            name, fields = (words[5] if len(words) > 5 else ""), {}
        elif words[-1] == "kB":
            fields[words[0][:-1]] = int(words[1])
    if name:
        yield name, fields
