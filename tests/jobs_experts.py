"""What the ranks of tests of expert parallelism do."""

import hashlib
import os
import signal
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import bits, case_named, config_of, copied, different, layer_of, same_bits, usable_isas
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from yardstick import Inputs, Results, check, make_inputs

import jitmoe
from jitmoe.distributed import ExpertParallel, load_lora_state_dict, lora_state_dict, share_of
from jitmoe.errors import ConfigError, InputError, PeerError
from jitmoe.experts.layer import MoELayer
from jitmoe.oracle.yardstick import results_of_layer
from jitmoe.plan import exchange as plan
from jitmoe.plan.projections import LORA_NAMES
from jitmoe.process import usable_threads

CASE = replace(case_named("ragged_47"), name="shared", experts=7, rank=5, tokens=90)
"""Seven experts, which neither two nor four ranks share evenly, and the sizes of a case whose kernels are there."""


def parallel_of(inputs: Inputs, batch_invariant: bool = False, **options: Any) -> ExpertParallel:
    """This rank's share of the layer of ``inputs``."""
    config = config_of(inputs.case, "auto", batch_invariant=batch_invariant)
    parallel = ExpertParallel.shard(config, **inputs.base(), **options)
    with torch.no_grad():
        for name, value in inputs.lora._asdict().items() if inputs.lora else ():
            parallel.layer.get_parameter(name).copy_(value[parallel.share.start : parallel.share.stop])
    return parallel


def tokens_of(rank: int, world: int, tokens: int, empty: tuple[int, ...] = ()) -> slice:
    """This rank's tokens: ranks that are not ``empty`` share them, unevenly."""
    ranks = [r for r in range(world) if r not in empty]
    if rank in empty:
        return slice(0, 0)
    bounds = [round(tokens * (place / len(ranks)) ** 1.5) for place in range(len(ranks) + 1)]
    place = ranks.index(rank)
    return slice(bounds[place], bounds[place + 1])


def results_of(parallel: ExpertParallel, inputs: Inputs, mine: slice) -> Results:
    """Results of this rank's tokens, and gradients of its experts."""
    parallel.zero_grad()
    x, weights = (tensor[mine].clone().requires_grad_() for tensor in (inputs.x, inputs.weights))
    out = parallel(x, inputs.topk_ids[mine], weights)
    out.backward(inputs.dout[mine])
    lora = {name: parallel.layer.get_parameter(name).grad for name in LORA_NAMES if inputs.lora}
    return {"out": out.detach(), "x": x.grad, "weights": weights.grad, **lora}


def gathered(mine: Results) -> Results:
    """Results of all ranks, one below the other: tokens and experts are in the order of the ranks."""
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, mine)
    return {name: torch.cat([one[name] for one in told]) for name in mine}


def oracle(rank: int, world: int) -> None:
    """All that is equal to one process, in one start."""
    for case in (CASE, replace(CASE, name="few", x_dtype=torch.float32, weights_dtype=torch.bfloat16, tokens=40)):
        inputs = make_inputs(case)
        for overlap in (True, False):
            parallel = parallel_of(inputs, overlap=overlap)
            assert parallel.counts == [len(share_of(case.experts, r, world)) for r in range(world)]
            mine = results_of(parallel, inputs, tokens_of(rank, world, case.tokens))
            whole = gathered(mine)
            check(whole, inputs)
            again = gathered(results_of(parallel, inputs, tokens_of(rank, world, case.tokens)))
            assert not different(again, whole)
            if world == 1:
                assert not different(whole, one_process(inputs))


def exact_sums(rank: int, world: int) -> None:
    """On the way and back nothing is rounded to less than float32: all that differs from one process is the order in
    which K slots are added up, (K - 1) roundings of at most eps / 2 of the sum of their magnitudes in each of both."""
    inputs = make_inputs(replace(CASE, name="exact", x_dtype=torch.float32, tokens=40))
    mine = tokens_of(rank, world, 40)
    ours = gathered(results_of(parallel_of(inputs, batch_invariant=True), inputs, mine))
    alone = layer_of(inputs, usable_isas()[0], batch_invariant=True)
    whole = copied(results_of_layer(alone, inputs))
    slots = []
    for slot in range(CASE.top_k):
        weights = torch.zeros_like(inputs.weights)
        weights[:, slot] = inputs.weights[:, slot]
        slots.append(copied(results_of_layer(alone, replace(inputs, weights=weights))))
    for name in ("out", "x"):
        most = (CASE.top_k - 1) * torch.finfo(torch.float32).eps * sum(one[name].abs() for one in slots)
        assert ((ours[name] - whole[name]).abs() <= most).all(), name


def digest(rank: int, world: int, threads: int) -> None:
    """Prints a digest of all results, on so many threads."""
    assert usable_threads(torch.get_num_threads()) == threads
    inputs = make_inputs(CASE)
    whole = gathered(results_of(parallel_of(inputs), inputs, tokens_of(rank, world, CASE.tokens)))
    if rank == 0:
        print(hashlib.sha256(b"".join(bits(tensor).numpy().tobytes() for tensor in whole.values())).hexdigest())


def one_process(inputs: Inputs) -> Results:
    return results_of_layer(layer_of(inputs, usable_isas()[0]), inputs)


def edges(rank: int, world: int) -> None:
    """Ranks without tokens, experts without tokens, skipped slots, wrong calls, and the bytes that were counted."""
    assert world == 4
    _some_are_idle(rank)
    inputs = make_inputs(CASE)
    parallel, mine = parallel_of(inputs), tokens_of(rank, world, CASE.tokens)
    first = copied(results_of(parallel, inputs, mine))
    _bytes_are_those_of_the_plan(parallel, inputs, mine)
    _gradients_add_up(parallel, inputs, mine, first)
    _checkpoints(parallel, inputs, mine)
    _checkpoints(parallel, make_inputs(replace(CASE, routing="one_expert")), mine)  # three ranks save nothing of it
    _wrong_calls(rank, parallel, inputs, mine)
    assert not different(results_of(parallel, inputs, mine), first)  # after all these errors
    _skipped(rank, world)


def _some_are_idle(rank: int) -> None:
    for case, empty in ((CASE, (0, 2)), (replace(CASE, name="idle", routing="one_expert"), (3,))):
        inputs = make_inputs(case)
        parallel = parallel_of(inputs)
        mine = tokens_of(rank, 4, case.tokens, empty)
        whole = gathered(results_of(parallel, inputs, mine))
        check(whole, inputs)
        if rank in empty:
            assert parallel.last_exchange.rows_here == sum(parallel.last_exchange.rows_out) == 0


def _bytes_are_those_of_the_plan(parallel: ExpertParallel, inputs: Inputs, mine: slice) -> None:
    """Counted from the ids by hand: a row for each token and rank, however many experts of it the rank has."""
    bounds = [0, *torch.tensor(parallel.counts).cumsum(0).tolist()]
    rank, traffic = dist.get_rank(), parallel.last_exchange
    pairs = {
        (token, other)
        for token, slots in enumerate(inputs.topk_ids[mine].tolist())
        for other in range(4)
        if other != rank and any(bounds[other] <= expert < bounds[other + 1] for expert in slots)
    }
    hidden, top_k = CASE.hidden, CASE.top_k
    aligned = -(-2 * hidden // 4) * 4
    assert sum(traffic.rows_out) == len(pairs) and traffic.rows_out[rank] == 0
    assert traffic.bytes_out["tokens"] == len(pairs) * (8 * top_k + aligned)
    assert traffic.bytes_in["sums"] == len(pairs) * 4 * hidden
    assert traffic.bytes_out["grads"] == len(pairs) * aligned
    assert traffic.bytes_in["grad_sums"] == len(pairs) * 4 * (hidden + top_k)
    told: list[Any] = [None] * 4
    dist.all_gather_object(told, (traffic.sent, traffic.received, traffic.rows_out, traffic.rows_in))
    assert sum(sent for sent, *_ in told) == sum(received for _, received, *_ in told)
    assert all(told[a][2][b] == told[b][3][a] for a in range(4) for b in range(4))
    all_ids = [inputs.topk_ids[tokens_of(other, 4, CASE.tokens)].numpy() for other in range(4)]
    planned = plan.traffic([plan.slots_by_rank(ids, bounds) for ids in all_ids], plan.row_bytes(hidden, top_k))[rank]
    assert (planned.sent, planned.received) == (traffic.sent, traffic.received)
    assert (planned.rows_out, planned.rows_in) == (sum(traffic.rows_out), sum(traffic.rows_in))
    assert planned.rows_here == traffic.rows_here


def _gradients_add_up(parallel: ExpertParallel, inputs: Inputs, mine: slice, first: Results) -> None:
    first = copied(first)
    parallel.zero_grad()
    x, weights = (tensor[mine].clone().requires_grad_() for tensor in (inputs.x, inputs.weights))
    out = parallel(x, inputs.topk_ids[mine], weights)
    out.backward(inputs.dout[mine], retain_graph=True)
    out.backward(inputs.dout[mine])
    assert same_bits(x.grad, 2 * first["x"])
    assert all(same_bits(parallel.layer.get_parameter(name).grad, 2 * first[name]) for name in LORA_NAMES)
    with pytest.raises(RuntimeError, match="second time"):
        out.backward(inputs.dout[mine])


def _checkpoints(parallel: ExpertParallel, inputs: Inputs, mine: slice) -> None:
    """Computed anew in backward, on all ranks alike."""
    first = copied(results_of(parallel, inputs, mine))
    parallel.zero_grad()
    x, weights = (tensor[mine].clone().requires_grad_() for tensor in (inputs.x, inputs.weights))
    out = checkpoint(parallel, x, inputs.topk_ids[mine], weights, use_reentrant=False)
    out.backward(inputs.dout[mine])
    assert same_bits(x.grad, first["x"]) and same_bits(weights.grad, first["weights"])
    assert all(same_bits(parallel.layer.get_parameter(name).grad, first[name]) for name in LORA_NAMES)


def _wrong_calls(rank: int, parallel: ExpertParallel, inputs: Inputs, mine: slice) -> None:
    """What one rank refuses, the others learn at once; the next call is a good one."""
    x, ids, weights = inputs.x[mine], inputs.topk_ids[mine], inputs.weights[mine]
    wrong = ids.clone()
    if rank == 1:
        wrong[-1, 2] = 7
        with pytest.raises(InputError, match=rf"topk_ids\[{len(ids) - 1}, 2\] is 7"):
            parallel(x, wrong, weights)
        with pytest.raises(InputError, match="x must have shape"):
            parallel(x[:, 1:], ids, weights)
    else:
        for _ in range(2):
            with pytest.raises(PeerError, match="rank 1 refused its inputs"):
                parallel(x, ids, weights)
    with pytest.raises(PeerError, match=r"rank . calls the experts with"), torch.set_grad_enabled(rank == 2):
        parallel(x, ids, weights)
    with pytest.raises(PeerError, match=f"rank {int(rank == 0)} .* num_experts 7, here 8|rank 0 .* 8, here 7"):
        ExpertParallel(parallel.layer, 7 + (rank == 0))
    with pytest.raises(PeerError, match=r"2 \+ 2 \+ 2 \+ 1 = 7 experts, expected 9"):
        ExpertParallel(parallel.layer, 9)
    with pytest.raises(ConfigError, match="allow_skip=True"):
        ExpertParallel(layer_of(make_inputs(case_named("small")), usable_isas()[0]), 4)


def _skipped(rank: int, world: int) -> None:
    inputs = make_inputs(replace(CASE, name="skips", routing="skipped_slots"))
    with torch.no_grad():
        quiet = parallel_of(inputs)(*(t[:9] for t in (inputs.x, inputs.topk_ids, inputs.weights)))
    assert not quiet.requires_grad
    check(gathered(results_of(parallel_of(inputs), inputs, tokens_of(rank, world, CASE.tokens))), inputs)


def ends(rank: int, world: int, how: str) -> None:
    """A rank is killed or stops in the middle of a job: an error on the others within the time limit, no hang."""
    inputs = make_inputs(CASE)
    parallel, mine = parallel_of(inputs, group=dist.new_group(timeout=timedelta(seconds=3))), slice(0, 30)
    results_of(parallel, inputs, mine)
    processes: list[Any] = [None] * world
    dist.all_gather_object(processes, os.getpid())
    if rank == 1:
        out = parallel(inputs.x[mine].requires_grad_(), inputs.topk_ids[mine], inputs.weights[mine])
        os.kill(os.getpid(), getattr(signal, how))
        raise AssertionError(out)
    began = time.monotonic()
    with pytest.raises(PeerError, match=f"rank {rank}: .*another process ended, or did not answer"):
        results_of(parallel, inputs, mine)
    assert time.monotonic() - began < 20
    if rank == 0 and how == "SIGSTOP":
        os.kill(processes[1], signal.SIGKILL)


def saves(rank: int, world: int, folder: str) -> None:
    """Writes the adapter of all ranks as one process would, and reads the one of another number of ranks."""
    inputs = make_inputs(CASE)
    model = nn.ModuleDict({"experts": parallel_of(inputs), "plain": layer_of(inputs, usable_isas()[0])})
    state = lora_state_dict(model)
    assert bool(state) == (rank == 0)
    path = Path(folder) / "adapter.safetensors"
    if rank == 0:
        save_file(state, path)
        assert all(same_bits(state[f"experts.{name}"], value) for name, value in inputs.lora._asdict().items())
        alone = nn.ModuleDict({name: layer_of(inputs, usable_isas()[0]) for name in model})
        jitmoe.load_lora_state_dict(alone, state)
        assert jitmoe.lora_state_dict(alone).keys() == state.keys()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    load_lora_state_dict(model, load_file(path) if rank == 0 else None)
    share = model["experts"].share
    for name, value in inputs.lora._asdict().items():
        assert same_bits(model["experts"].layer.get_parameter(name), value[share.start : share.stop])
        assert same_bits(model["plain"].get_parameter(name), value)
    error = InputError if rank == 0 else PeerError
    with pytest.raises(error, match=r"missing|rank 0 refused the adapters"):
        load_lora_state_dict(model, {} if rank == 0 else None)
    torch.manual_seed(5)
    begun = ExpertParallel.shard(config_of(CASE, "auto"), **inputs.base())
    torch.manual_seed(5)
    alone = MoELayer(config_of(CASE, "auto"), **inputs.base())
    part = slice(begun.share.start, begun.share.stop)
    assert all(same_bits(begun.layer.get_parameter(n), alone.get_parameter(n)[part]) for n in LORA_NAMES)
