"""Whether processes that should hold the same parameters do: for the end of a step, while something is amiss."""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from jitmoe.distributed.peers import Peers
from jitmoe.distributed.state import expert_parallel_in
from jitmoe.errors import ReplicaError


def check_replicas(model: nn.Module, group: Any = None, *, frozen: bool = False) -> int:
    """Compare the parameters of all ranks of ``group``, bit for bit, by digests; all have to call it.

    Experts of an :class:`~jitmoe.distributed.ExpertParallel` whose ranks are in ``group`` too are different ones, and
    are left out; compare them in the group of the ranks that hold the same experts.

    Args:
        model: the same on all ranks; a DistributedDataParallel is looked into.
        group: of torch.distributed; None is all processes.
        frozen: compare parameters and buffers without gradients too. Packed ones are unpacked for it.

    Returns:
        The number of tensors that were compared.

    Raises:
        ReplicaError: a tensor differs; names tensors and ranks. All ranks raise.
        PeerError: a rank ended or did not answer.
    """
    peers = Peers.of(group)
    named = dict(_tensors(model, peers, frozen))
    names = "\n".join(f"{name} {tensor.dtype} {list(tensor.shape)}" for name, tensor in named.items())
    digests = torch.stack([_digest(names.encode()), *map(_digest_of, named.values())])
    counts = peers.gather(torch.tensor([len(digests)]), "the comparison of replicas").flatten()
    told = peers.gather(digests, "the comparison of replicas") if len(set(counts.tolist())) == 1 else None
    if told is None or _ranks_apart(told[:, 0]):
        raise ReplicaError(
            f"rank {peers.rank}: the ranks have parameters of different names, shapes or dtypes:\n{names}"
        )
    apart = {name: ranks for place, name in enumerate(named, start=1) if (ranks := _ranks_apart(told[:, place]))}
    if apart:
        lines = "; ".join(f"{name} on rank {', '.join(map(str, ranks))}" for name, ranks in apart.items())
        raise ReplicaError(
            f"replicas have drifted apart: {lines} (most ranks, or the lower ones, hold something else). Either they "
            "began with other values, or a gradient of this step was not synchronised"
        )
    return len(named)


def _tensors(model: nn.Module, peers: Peers, frozen: bool) -> Iterator[tuple[str, Tensor]]:
    model = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    ranks = set(dist.get_process_group_ranks(peers.group) if peers.group is not None else range(dist.get_world_size()))
    local: set[int] = set()
    for parallel in expert_parallel_in(model).values():
        theirs = parallel.peers.group
        shared = ranks & set(dist.get_process_group_ranks(theirs) if theirs is not None else ranks)
        if len(shared) > 1:
            local |= {id(tensor) for tensor in (*parallel.parameters(), *parallel.buffers())}
    tensors = [*model.named_parameters(), *(model.named_buffers() if frozen else ())]
    yield from ((name, t) for name, t in tensors if id(t) not in local and (frozen or t.requires_grad))


def _digest_of(tensor: Tensor) -> Tensor:
    return _digest(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)


def _digest(content: Any) -> Tensor:
    return torch.frombuffer(bytearray(hashlib.sha256(content).digest()), dtype=torch.int64)


def _ranks_apart(digests: Tensor) -> list[int]:
    """Ranks whose digest [ranks, 4] is not that of most; of equally many, that of the lowest rank counts."""
    rows = [tuple(row) for row in digests.tolist()]
    usual = max(dict.fromkeys(rows), key=rows.count)
    return [rank for rank, row in enumerate(rows) if row != usual]
