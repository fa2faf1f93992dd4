"""Adapters of a model whose experts live on several ranks: gathered to one, whole, and handed out again."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from jitmoe.distributed.expert_parallel import ExpertParallel
from jitmoe.distributed.peers import Peers, peer_errors
from jitmoe.errors import InputError, PeerError
from jitmoe.experts.lora_state import layers_of
from jitmoe.plan.projections import LORA_NAMES


def expert_parallel_in(model: nn.Module) -> dict[str, ExpertParallel]:
    """The layers inside ``model``, or it itself, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ExpertParallel)}


def local_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that live on one rank of their group alone, under their names in ``model``.

    They are no replicas: give the names to DistributedDataParallel as ``_ddp_params_and_buffers_to_ignore`` of the
    model, and count their squares of all ranks in a norm of gradients.
    """
    return {
        f"{name}.layer.{parameter}".lstrip("."): value
        for name, parallel in expert_parallel_in(model).items()
        for parameter, value in parallel.layer.named_parameters()
    }


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The LoRA parameters of all experts, on the first rank of each layer's group; of the other ranks an empty dict.

    Keys and shapes are those of a model with a :class:`~jitmoe.MoELayer` of all experts in the place of each
    :class:`ExpertParallel`, so ``jitmoe.load_lora_state_dict`` of one process loads it, as do runs with any number of
    ranks. Layers that are no :class:`ExpertParallel` are replicas, and are the first rank's own. All ranks of the
    groups have to call this.

    Raises:
        PeerError: a rank ended or did not answer.
    """
    found: dict[str, Tensor] = {}
    first = True
    for key, parameter, parallel in _parameters(model):
        whole = parameter.detach() if parallel is None else _gathered(key, parameter, parallel)
        first = first and whole is not None
        if whole is not None:
            found[key] = whole
    return found if first else {}


def load_lora_state_dict(model: nn.Module, state: Mapping[str, Tensor] | None) -> None:
    """Load what :func:`lora_state_dict` gave, however many ranks gave it: all of it, or after an error nothing.

    All ranks of the groups have to call this.

    Args:
        model: with layers of the same names and sizes.
        state: on the first rank of each group; on the others None.

    Raises:
        InputError: a key is missing or unknown, or a shape is wrong, on the ranks with a ``state``; or another rank has
            one.
        PeerError: the first rank refused its ``state``, or a rank ended or did not answer.
    """
    parameters = list(_parameters(model))
    groups = {parallel.peers.group: parallel.peers for _, _, parallel in parameters if parallel is not None}
    peers = list(groups.values()) or [Peers.of()]
    firsts = {one.rank == 0 for one in peers}
    if len(firsts) > 1:
        raise InputError("the layers of the model are shared by groups of which this process is the first in some only")
    error = _fault(parameters, state, first=firsts == {True})
    for one in peers:
        verdicts = one.gather(torch.tensor([error is not None]), "the comparison of adapters").flatten()
        if error is None and verdicts.any():
            raise PeerError(f"rank {int(verdicts.nonzero()[0])} refused the adapters: its own error says why")
    if error is not None:
        raise InputError(error)
    with torch.no_grad():
        for key, parameter, parallel in parameters:
            one = parallel.peers if parallel is not None else peers[0]
            whole = None if state is None else state[key].to(parameter.dtype)
            parameter.copy_(_handed_out(key, whole, parameter, parallel, one))


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, ExpertParallel | None]]:
    """Key of a model in one process, parameter of this rank, and the layer that shares it out, if any."""
    parallel_in = {f"{name}.layer".lstrip("."): (name, layer) for name, layer in expert_parallel_in(model).items()}
    for name, layer in layers_of(model).items():
        prefix, parallel = parallel_in.get(name, (name, None))
        for lora in LORA_NAMES if layer.config.lora_rank else ():
            yield (f"{prefix}.{lora}" if prefix else lora), layer.get_parameter(lora), parallel


def _fault(parameters: list[tuple[str, Any, Any]], state: Mapping[str, Tensor] | None, first: bool) -> str | None:
    if not first:
        return None if state is None else "only the first rank of a group has a state, others pass None"
    if state is None:
        return "the first rank of a group has to pass the state"
    keys = {key for key, _, _ in parameters}
    missing, unknown = sorted(keys - state.keys()), sorted(state.keys() - keys)
    if missing or unknown:
        return (
            f"these adapters are not those of the model: missing {', '.join(missing) or 'none'}; "
            f"unknown {', '.join(unknown) or 'none'}"
        )
    for key, parameter, parallel in parameters:
        experts = parameter.shape[0] if parallel is None else parallel.num_experts
        if tuple(state[key].shape) != (experts, *parameter.shape[1:]):
            return f"{key} must have shape {[experts, *parameter.shape[1:]]}, got {list(state[key].shape)}"
    return None


def _gathered(key: str, parameter: Tensor, parallel: ExpertParallel) -> Tensor | None:
    """[E, ...] on the first rank."""
    peers, first = parallel.peers, parallel.peers.rank == 0
    whole = parameter.new_empty((parallel.num_experts if first else 0, *parameter.shape[1:])).detach()
    to = [parameter.shape[0]] + [0] * (peers.size - 1)
    come = parallel.counts if first else [0] * peers.size
    with peer_errors(peers.rank, f"gathering {key}"):
        dist.all_to_all_single(whole, parameter.detach().contiguous(), come, to, group=peers.group)
    return whole if first else None


def _handed_out(
    key: str, whole: Tensor | None, parameter: Tensor, parallel: ExpertParallel | None, peers: Peers
) -> Tensor:
    """This rank's part of what the first one has; of a replica all of it."""
    first = peers.rank == 0
    counts = [parameter.shape[0]] * peers.size if parallel is None else parallel.counts
    sent = parameter.new_empty(0, *parameter.shape[1:])
    if whole is not None:
        sent = torch.cat([whole] * peers.size) if parallel is None else whole.contiguous()
    mine = torch.empty_like(parameter)
    come = [parameter.shape[0]] + [0] * (peers.size - 1)
    with peer_errors(peers.rank, f"handing out {key}"):
        dist.all_to_all_single(mine, sent.detach(), come, counts if first else [0] * peers.size, group=peers.group)
    return mine
