"""Expert parallelism of transformers with our exchange: ``DistributedConfig(ep_implementation="jitmoe")``.

transformers' own "all_to_all" sends a row for each token and expert in bfloat16 and adds up the roundings; ours sends
one for each token and rank, adds up in float32, and computes own rows meanwhile. Experts on jitmoe run under all.
"""

from typing import Any

from torch import Tensor
from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface

from jitmoe.distributed.exchange import Shared, apply
from jitmoe.distributed.peers import Peers
from jitmoe.errors import AdapterError, UnsupportedExpertsError
from jitmoe.experts.functional import Base
from jitmoe.hf import peft_lora
from jitmoe.hf.experts import frozen_behind, prepare
from jitmoe.hf.peft_lora import IMPLEMENTATION


class JitmoeEP(EPImplementation):  # type: ignore[misc]
    """Brings the experts of one module their tokens, and the sums back.

    Raises:
        UnsupportedExpertsError: the experts run on something else, or ranks hold the same batch (tensor parallelism),
            for which every token would be computed by each of them.
    """

    def __init__(self, experts: Any, ep_mesh: Any, tp_mesh: Any) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        chosen = getattr(experts.config, "_experts_implementation", None)
        if chosen != IMPLEMENTATION:
            raise UnsupportedExpertsError(
                f"ep_implementation='jitmoe' needs experts_implementation='jitmoe', this model has {chosen!r}"
            )
        if tp_mesh.size() > 1:
            raise UnsupportedExpertsError(
                "ep_implementation='jitmoe' needs a batch of its own on each rank (tp_size=1): use 'auto' with "
                "tensor parallelism"
            )
        peers = Peers.of(ep_mesh.get_group())
        bounds = [self.num_local_experts * rank for rank in range(peers.size + 1)]
        self.experts = experts
        self.shared = Shared(peers, bounds, allow_skip=False, overlap=True, base_for=self._base_for)

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The experts' weighted sum for each of this rank's tokens."""
        adapters = peft_lora.adapters_of(self.experts, prepare(self.experts).understood.layout)
        if adapters is not None:
            raise AdapterError(
                "LoRA of experts that transformers shards is not computed under ep_implementation='jitmoe'"
            )
        out, self.last_exchange = apply(self.shared, hidden_states, top_k_index, top_k_weights)
        return frozen_behind(self.experts, out)

    def _base_for(self, slots: int) -> Base:
        return prepare(self.experts).base_for(slots)


def offer() -> None:
    """Make transformers know it."""
    EPImplementationInterface.register(IMPLEMENTATION, JitmoeEP)
