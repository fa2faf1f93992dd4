"""A layer whose experts are shared out among the ranks of a group."""

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jitmoe.config import MoEConfig
from jitmoe.distributed import exchange
from jitmoe.distributed.exchange import Shared
from jitmoe.distributed.peers import Peers
from jitmoe.distributed.traffic import Traffic
from jitmoe.errors import ConfigError, InputError, InputTypeError, PeerError
from jitmoe.experts.functional import Base
from jitmoe.experts.inputs import FLOATS, check_dense
from jitmoe.experts.layer import MoELayer
from jitmoe.experts.pack import PackedExperts, open_packed
from jitmoe.experts.passes import spec_of
from jitmoe.experts.quantized import ExpertSource, Quantized
from jitmoe.plan.exchange import share_of
from jitmoe.plan.projections import LORA_NAMES, lora_shapes

ALIKE = ("hidden_size", "intermediate_size", "top_k", "lora_rank", "allow_skip", "bias")
"""Fields of the config that must be the same on all ranks."""


class ExpertParallel(nn.Module):
    """A :class:`~jitmoe.experts.layer.MoELayer` of all experts, of which each rank of a group holds some.

    Every rank calls it with tokens of its own, as many as it likes, none too, and with global expert ids. A token's row
    goes once to each rank that has experts of it; partial sums come back in float32, are added in the order of the
    ranks and rounded once. All ranks have to call it equally often, forward and backward: a rank without tokens calls
    with T = 0 and runs backward on the empty result. Bits depend on how the experts are shared out, on ``overlap`` and
    on which tokens share a call; not on the number of threads or the run. On one rank they are those of ``MoELayer``.

    The layer is not called as a module: its hooks, and ``layer.capture``, see nothing; traces and checked kernels do.

    Gradients of LoRA belong to the experts of this rank, and are summed over the tokens of *all* ranks of the group.
    They need no synchronisation within it, and must have none: see :func:`~jitmoe.distributed.state.local_parameters`.
    Where losses are means over each rank's tokens, and the gradient of their mean over the ranks is wanted, as
    DistributedDataParallel makes it, divide them by the number of ranks. Replicas of a group (data parallel beside
    expert parallel) sum theirs over the ranks that hold the same experts.

    Args:
        layer: of this rank's experts; the shares follow each other in the order of the ranks, and may be uneven. Ids
            in the layer begin at 0, and its config has ``allow_skip=True``.
        num_experts: of all ranks.
        group: of torch.distributed; None is all processes. Its timeout bounds every wait.
        overlap: compute this rank's own tokens while others are on their way. It costs a second call of the experts,
            which reads their weights again: turn it off where a call is bound by memory. All ranks the same.
        allow_skip: skip slots whose id is no expert's instead of refusing them.

    Attributes:
        start: number of this rank's first expert.
        last_exchange: rows and bytes of the last call and of its backward pass, or None before the first.

    Raises:
        PeerError: torch.distributed is not initialised, the shares are not ``num_experts`` together, or the ranks'
            layers have other sizes.
    """

    def __init__(
        self,
        layer: MoELayer,
        num_experts: int,
        group: Any = None,
        *,
        overlap: bool = True,
        allow_skip: bool = False,
    ) -> None:
        super().__init__()
        if not layer.config.allow_skip:
            raise ConfigError(
                "the layer of a share skips slots of other ranks' experts: set allow_skip=True in its config"
            )
        self.layer, self.num_experts, self.overlap, self.allow_skip = layer, num_experts, overlap, allow_skip
        self._peers = Peers.of(group)
        self._bounds = self._agreed()
        self.last_exchange: Traffic | None = None

    @classmethod
    def shard(
        cls,
        config: MoEConfig,
        gate_proj: ExpertSource | PackedExperts,
        up_proj: ExpertSource | PackedExperts,
        down_proj: ExpertSource | PackedExperts,
        group: Any = None,
        *,
        overlap: bool = True,
        **biases: Tensor,
    ) -> "ExpertParallel":
        """This rank's share of a layer that is described as a whole.

        Of sources that are sequences or functions only this rank's experts are read. LoRA begins with the values that
        a ``MoELayer`` of all experts would have begun with from the same random numbers.

        Args:
            config: of all experts.
            gate_proj: of all experts, as for ``MoELayer``.
            up_proj: likewise.
            down_proj: likewise.
            group: as for the constructor.
            overlap: likewise.
            **biases: of all experts, as for ``MoELayer``.

        Raises:
            ConfigError: there are fewer experts than ranks.
            PeerError: as of the constructor.
        """
        peers = Peers.of(group)
        share = share_of(config.num_experts, peers.rank, peers.size)
        sources = (_part(source, share) for source in (gate_proj, up_proj, down_proj))
        own = {name: bias[share.start : share.stop] for name, bias in biases.items()}
        with torch.random.fork_rng(devices=[]):
            layer = MoELayer(replace(config, num_experts=len(share), allow_skip=True), *sources, **own)
        _begin_lora(layer, config, share)
        return cls(layer, config.num_experts, group, overlap=overlap, allow_skip=config.allow_skip)

    @classmethod
    def from_packed(
        cls,
        config: MoEConfig,
        path: str | os.PathLike[str],
        group: Any = None,
        *,
        verify: bool = True,
        overlap: bool = True,
        **biases: Tensor,
    ) -> "ExpertParallel":
        """This rank's share of the experts in a file that ``MoELayer.save_packed`` wrote of all of them.

        The file is mapped: pages of experts of other ranks stay on the disk, and ranks of one machine share theirs.

        Raises:
            PackedFileError: as of :meth:`MoELayer.from_packed`.
        """
        experts = open_packed(Path(path), config, verify)
        gate, up, down = experts.values()
        return cls.shard(config, gate, up, down, group, overlap=overlap, **biases)

    @property
    def start(self) -> int:
        """Number of this rank's first expert."""
        return self._bounds[self._peers.rank]

    @property
    def share(self) -> range:
        """Numbers of this rank's experts."""
        return range(self.start, self._bounds[self._peers.rank + 1])

    @property
    def counts(self) -> list[int]:
        """Number of experts on each rank."""
        return [stop - start for start, stop in pairwise(self._bounds)]

    @property
    def peers(self) -> Peers:
        """The ranks."""
        return self._peers

    def forward(self, x: Tensor, topk_ids: Tensor, weights: Tensor) -> Tensor:
        """Apply the experts of all ranks to this rank's tokens; see :meth:`MoELayer.forward`.

        Args:
            x: [..., H] bfloat16 or float32 (rounded to bfloat16 on entry).
            topk_ids: [..., K] int64 or int32, global ids.
            weights: [..., K] float32 or bfloat16.

        Returns:
            [..., H] in x's dtype.

        Raises:
            PeerError: another rank ended, failed, or did not answer within the timeout of the group.
            InputError: wrong shape, device or expert id.
            InputTypeError: wrong dtype.
        """
        adapters = self.layer._adapters()
        lora, scale = ([], 0.0) if adapters is None else (adapters.tensors(), adapters.scale)
        shared = Shared(self._peers, self._bounds, self.allow_skip, self.overlap, self._base_for, scale)
        try:
            self._check(x, topk_ids, weights)
        except (InputError, InputTypeError):
            exchange.refuse(shared)
            raise
        rows, ids, factors = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (x, topk_ids.long(), weights))
        out, self.last_exchange = exchange.apply(shared, rows, ids, factors, lora)
        return out.view_as(x)

    def extra_repr(self) -> str:
        """Which experts are here."""
        share = self.share
        place = f"rank {self._peers.rank} of {self._peers.size}"
        return f"experts {share.start} to {share.stop - 1} of {self.num_experts}, {place}"

    def _check(self, x: Tensor, topk_ids: Tensor, weights: Tensor) -> None:
        config = self.layer.config
        check_dense("x", x, FLOATS, config.hidden_size)
        check_dense("topk_ids", topk_ids, (torch.int64, torch.int32), config.top_k)
        check_dense("weights", weights, FLOATS, config.top_k)
        for name, tensor in (("topk_ids", topk_ids), ("weights", weights)):
            if tensor.shape[:-1] != x.shape[:-1]:
                raise InputError(f"{name} must have shape {[*x.shape[:-1], config.top_k]} to go with x")

    def _base_for(self, slots: int) -> Base:
        """This rank's experts for rows of so many slots: how many of a token's experts are here differs by the call."""
        base = self.layer._base()
        config = replace(base.config, top_k=slots)
        return replace(base, config=config, spec=spec_of(config, base.isa))

    def _agreed(self) -> list[int]:
        """Where each rank's experts begin, after all ranks have told what they hold."""
        config, peers = self.layer.config, self._peers
        facts = [config.num_experts, self.num_experts, *(int(getattr(config, name)) for name in ALIKE)]
        told = peers.gather(torch.tensor(facts), "the comparison of layers").tolist()
        for rank, (_, experts, *sizes) in enumerate(told):
            other = [
                f"{name} {theirs}, here {mine}"
                for name, theirs, mine in zip(("num_experts", *ALIKE), (experts, *sizes), facts[1:], strict=True)
                if theirs != mine
            ]
            if other:
                raise PeerError(f"rank {rank} of the group has another layer: {'; '.join(other)}")
        counts = [experts for experts, *_ in told]
        if sum(counts) != self.num_experts:
            raise PeerError(
                f"the layers of the ranks hold {' + '.join(map(str, counts))} = {sum(counts)} experts, expected "
                f"{self.num_experts}: jitmoe.distributed.share_of says which experts belong to which rank"
            )
        return [sum(counts[:rank]) for rank in range(peers.size + 1)]


def _part(source: ExpertSource | PackedExperts, share: range) -> ExpertSource | PackedExperts:
    """The source of some experts; nothing is read."""
    if isinstance(source, PackedExperts):
        return PackedExperts(source.tensor[share.start : share.stop])
    if isinstance(source, Quantized):
        return Quantized(source.values[share.start : share.stop], source.scales[share.start : share.stop])
    if callable(source):
        read = source
        return lambda expert: read(share[expert])  # type: ignore[return-value]
    part: Sequence[Tensor] | Tensor = source[share.start : share.stop]  # type: ignore[assignment]
    return part


def _begin_lora(layer: MoELayer, config: MoEConfig, share: range) -> None:
    shapes = lora_shapes(config.hidden_size, config.intermediate_size, config.num_experts, config.lora_rank)
    with torch.no_grad():
        for name in LORA_NAMES if config.lora_rank else ():
            parameter = layer.get_parameter(name)
            if name.endswith("_a"):
                bound = 1.0 / math.sqrt(parameter.shape[-1])
                whole = torch.empty(shapes[name], dtype=parameter.dtype).uniform_(-bound, bound)
                parameter.copy_(whole[share.start : share.stop])
            else:
                parameter.zero_()
