"""Other implementations of the same layer on the same values. One function each, as their users would write it."""

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from jitmoe.bench.contenders import Contender, our_quantized_layer
from jitmoe.errors import BenchError
from jitmoe.formats import FORMATS, WeightFormat
from jitmoe.hf import registry
from jitmoe.hf.peft_lora import IMPLEMENTATION
from jitmoe.oracle.data import Base
from jitmoe.oracle.reference import LoraTensors, moe_reference
from jitmoe.oracle.workloads import Workload

Build = Callable[[Workload, Base, LoraTensors | None, float], Contender]
"""(sizes, weights, adapters, LoRA scale) -> contender; weights and adapters come in the peer's dtype."""


@dataclass(frozen=True)
class Peer:
    """How to get a peer.

    Attributes:
        build: makes the contender.
        dtype: of its weights and adapters.
        copies: bytes that the peer holds beyond the canonical weights, as a multiple of these.
        package: the package that must be installed, "" for torch alone.
        slow: it takes minutes, so it runs only on request.
    """

    build: Build
    dtype: torch.dtype
    copies: float
    package: str = ""
    slow: bool = False

    def missing(self) -> str | None:
        """Why the peer cannot run here, or None."""
        if self.package and importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        if self.build is grouped_mm and not hasattr(torch.nn.functional, "grouped_mm"):
            return f"torch {torch.__version__} has no grouped_mm"
        return None


def loop(workload: Workload, base: Base, lora: LoraTensors | None, scale: float) -> Contender:
    """Plain torch, expert after expert: our own reference."""
    trainable = _leaves(lora)

    def call(x: Tensor, topk_ids: Tensor, weights: Tensor) -> Tensor:
        return moe_reference(x, topk_ids, weights, base.gate_proj, base.up_proj, base.down_proj, trainable, scale)

    return _contender(workload, call, base.gate_proj.dtype, trainable)


def grouped_mm(workload: Workload, base: Base, lora: LoraTensors | None, scale: float) -> Contender:
    """torch.nn.functional.grouped_mm on rows sorted by expert; each adapter is two more such products."""
    trainable = _leaves(lora)
    pairs = (trainable[0:2], trainable[2:4], trainable[4:6]) if trainable else (None, None, None)

    def project(rows: Tensor, weight: Tensor, pair: tuple[Tensor, ...] | None, ends: Tensor) -> Tensor:
        multiply = torch.nn.functional.grouped_mm
        result = multiply(rows, weight.transpose(1, 2), offs=ends)
        if pair is None:
            return result
        low = multiply(rows, pair[0].transpose(1, 2), offs=ends)
        return result + multiply(low, pair[1].transpose(1, 2), offs=ends) * scale

    def call(x: Tensor, topk_ids: Tensor, weights: Tensor) -> Tensor:
        slots = topk_ids.flatten().argsort(stable=True)
        tokens = slots // workload.top_k
        ends = topk_ids.flatten().bincount(minlength=workload.experts).cumsum(0).to(torch.int32)
        rows = x[tokens]
        activation = silu(project(rows, base.gate_proj, pairs[0], ends)) * project(rows, base.up_proj, pairs[1], ends)
        result = project(activation, base.down_proj, pairs[2], ends)
        return torch.zeros_like(x).index_add(0, tokens, result * weights.flatten()[slots, None].to(x.dtype))

    return _contender(workload, call, base.gate_proj.dtype, trainable)


def transformers_experts(workload: Workload, base: Base, lora: LoraTensors | None, scale: float) -> Contender:
    """The experts module of transformers' Qwen3-MoE with its grouped_mm back end; no adapters."""
    experts = _transformers_module(workload, base, "grouped_mm")
    experts.requires_grad_(False)
    return _contender(workload, experts, torch.bfloat16, None)


def transformers_peft(workload: Workload, base: Base, lora: LoraTensors | None, scale: float) -> Contender:
    """What users do today: PEFT's ``target_parameters`` on that module. Gate and up share the A of gate."""
    return _peft(workload, base, lora, scale, "grouped_mm")


def peft_on_jitmoe(workload: Workload, base: Base, lora: LoraTensors | None, scale: float) -> Contender:
    """The same with ``experts_implementation="jitmoe"``."""
    registry.register()
    return _peft(workload, base, lora, scale, IMPLEMENTATION)


def _peft(workload: Workload, base: Base, lora: LoraTensors | None, scale: float, implementation: str) -> Contender:
    from peft import LoraConfig, get_peft_model

    model = nn.Module()
    model.experts = _transformers_module(workload, base, implementation)
    config = LoraConfig(
        r=workload.rank,
        lora_alpha=scale * workload.rank,
        target_modules=[],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    get_peft_model(model, config)
    if lora is not None:
        outer = model.experts
        _write(outer.base_layer, lora.gate_lora_a, torch.cat([lora.gate_lora_b, lora.up_lora_b], 1))
        _write(outer, lora.down_lora_a, lora.down_lora_b)
    parameters = tuple(p for p in model.parameters() if p.requires_grad)
    return Contender("", model.experts, parameters, torch.bfloat16, workload.rank, True, comparable="peft")


def _write(wrapper: Any, a: Tensor, b: Tensor) -> None:
    """A [E, r, in] and B [E, out, r] into PEFT's A [E r, in] and B [out, r E]."""
    (name,) = wrapper.lora_A
    with torch.no_grad():
        wrapper.lora_A[name].weight.copy_(a.flatten(0, 1))
        wrapper.lora_B[name].weight.copy_(b.permute(1, 2, 0).flatten(1))


def quantized(weight_format: WeightFormat) -> Build:
    """Our layer on quantised weights, for the price of a format beside bfloat16."""

    def build(workload: Workload, base: Base, lora: LoraTensors | None, scale: float) -> Contender:
        return our_quantized_layer(workload, base, lora, weight_format)

    return build


PEERS = {
    "torch-bf16": Peer(loop, torch.bfloat16, 0.0),
    "torch-f32": Peer(loop, torch.float32, 2.0),
    "grouped-bf16": Peer(grouped_mm, torch.bfloat16, 0.0),
    "grouped-f32": Peer(grouped_mm, torch.float32, 2.0),
    "transformers": Peer(transformers_experts, torch.bfloat16, 1.0, "transformers"),
    # Each call adds the product of the adapters to a copy of all weights, and its backward holds another.
    "peft": Peer(transformers_peft, torch.bfloat16, 5.0, "peft", slow=True),
    "peft-jitmoe": Peer(peft_on_jitmoe, torch.bfloat16, 1.0, "peft", slow=True),
    # While they are quantised, codes and packed codes are held.
    **{
        f"jitmoe-{name}": Peer(quantized(name), torch.bfloat16, 1.0, slow=True)
        for name in FORMATS
        if name != "bfloat16"
    },
}


def choose_peers(text: str) -> list[str]:
    """Names from "all" (all but the slow ones), "none" or a comma-separated list.

    Raises:
        BenchError: a name is none of :data:`PEERS`.
    """
    if text == "none":
        return []
    if text == "all":
        return [name for name, peer in PEERS.items() if not peer.slow]
    names = text.split(",")
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise BenchError(f"unknown peers {', '.join(unknown)}; known are all, none, {', '.join(PEERS)}")
    return names


def share_memory(names: Iterable[str], base_bytes: int, budget: float) -> list[list[str]]:
    """Cut ``names`` into batches that fit into ``budget`` bytes at a time, at least one peer each."""
    batches: list[list[str]] = []
    used = 0.0
    for name in names:
        needed = PEERS[name].copies * base_bytes
        if not batches or used + needed > budget:
            batches.append([])
            used = 0.0
        batches[-1].append(name)
        used += needed
    return batches


def _transformers_module(workload: Workload, base: Base, implementation: str) -> nn.Module:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(
        num_experts=workload.experts,
        hidden_size=workload.hidden,
        moe_intermediate_size=workload.intermediate,
        num_experts_per_tok=workload.top_k,
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        experts: nn.Module = Qwen3MoeExperts(config)
    experts.gate_up_proj = nn.Parameter(torch.cat([base.gate_proj, base.up_proj], dim=1))
    experts.down_proj = nn.Parameter(base.down_proj)
    return experts


def _contender(
    workload: Workload,
    call: Callable[[Tensor, Tensor, Tensor], Tensor],
    dtype: torch.dtype,
    trainable: LoraTensors | None,
) -> Contender:
    rank = workload.rank if trainable else 0
    comparable = "lora" if trainable else "base"
    return Contender("", call, tuple(trainable or ()), dtype, rank, dtype == torch.bfloat16, comparable=comparable)


def _leaves(lora: LoraTensors | None) -> LoraTensors | None:
    return lora and LoraTensors(*(tensor.detach().clone().requires_grad_() for tensor in lora))
