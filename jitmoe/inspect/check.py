"""Checks that the layer is right, and how fast it is, on random data of any sizes."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from jitmoe.bench.ceilings import Ceilings
from jitmoe.bench.measure import Options, Outcome
from jitmoe.bench.measure import compare as measure
from jitmoe.config import MoEConfig
from jitmoe.errors import BenchError
from jitmoe.experts.layer import MoELayer
from jitmoe.experts.quantize import quantize
from jitmoe.experts.quantized import Quantized
from jitmoe.inspect.replay import Comparison, compare
from jitmoe.jit.capability import resolve_isa
from jitmoe.oracle.data import Base, batches, make_base, make_lora
from jitmoe.oracle.formats import dequantize
from jitmoe.oracle.reference import Activation, Biases, LoraTensors
from jitmoe.oracle.workloads import Workload
from jitmoe.oracle.yardstick import Inputs
from jitmoe.plan.projections import projections

SEED = 0


def make_call(config: MoEConfig, tokens: int) -> Inputs:
    """A call of ``tokens`` tokens with random weights, inputs and routing, the same in every run; B is not zero."""
    generator = torch.Generator().manual_seed(SEED)
    workload = _workload(config, tokens)
    base, lora = _decoded(config, make_base(workload, generator)), make_lora(workload, generator)
    batch = next(batches(workload, generator))
    return Inputs(
        x=batch.x,
        topk_ids=batch.topk_ids,
        weights=batch.weights,
        gate_proj=base.gate_proj,
        up_proj=base.up_proj,
        down_proj=base.down_proj,
        lora=LoraTensors(*(t.to(getattr(torch, config.lora_dtype)) for t in lora)) if lora else None,
        dout=batch.out_grad,
        scale=config.lora_scale,
        activation=Activation.of(config),
        biases=_make_biases(config, generator) if config.bias else None,
    )


def _make_biases(config: MoEConfig, generator: torch.Generator) -> Biases:
    outs = (config.intermediate_size, config.intermediate_size, config.hidden_size)
    return Biases(*(torch.randn(config.num_experts, out, generator=generator) / 2 for out in outs))


def make_layer(config: MoEConfig, inputs: Inputs) -> MoELayer:
    """The layer of ``config`` with the base weights of ``inputs``; what was decoded stays as it is, quantised again."""
    base: dict[str, Any] = dict(inputs.base())
    if config.packing.quantized:
        base |= _sources(config, inputs)
    return MoELayer(config, **base)


def _sources(config: MoEConfig, base: Base | Inputs) -> dict[str, Quantized]:
    weights = {
        p.base_name: getattr(base, p.base_name) for p in projections(config.hidden_size, config.intermediate_size)
    }
    return quantize(weights, config.weight_format, config.group_size, config.scale_dtype)[0]


def _decoded(config: MoEConfig, base: Base) -> Base:
    """W' of these weights in the config's format."""
    if not config.packing.quantized:
        return base
    extents = {p.base_name: (p.out, p.in_) for p in projections(config.hidden_size, config.intermediate_size)}
    return Base(
        **{
            name: dequantize(config.packing, source.values, source.scales, *extents[name])
            for name, source in _sources(config, base).items()
        }
    )


def comparisons(layer: MoELayer, inputs: Inputs) -> Iterator[tuple[str, Comparison]]:
    """``layer`` held to the error rule, with B zero and with B not zero; each comparison with its name."""
    for what, variant in _variants(inputs):
        yield what, compare(layer, variant)


def measure_speed(config: MoEConfig, tokens: int) -> Outcome:
    """Measure both passes beside this machine's ceilings, on all threads of torch.

    Raises:
        IsaError: the config names an instruction set that cannot run here.
        BenchError: another instruction set ran, or the weights are quantised: only bfloat16 is measured.
    """
    if config.packing.quantized:
        raise BenchError(f"perf measures bfloat16 weights alone, and weight_format is {config.weight_format}")
    options = Options((resolve_isa(config.requested_isa),), lora_dtype=config.lora_dtype)
    return measure(_workload(config, tokens), options, Ceilings(torch.get_num_threads()))


def _variants(inputs: Inputs) -> Iterator[tuple[str, Inputs]]:
    """At the start of training B is zero: the layer equals its base, and the gradients of A are zero."""
    if inputs.lora is None:
        yield "no LoRA", inputs
        return

    def zero_b(name: str, tensor: Tensor) -> Tensor:
        return torch.zeros_like(tensor) if name.endswith("_b") else tensor

    fresh = LoraTensors(*(zero_b(name, tensor) for name, tensor in inputs.lora._asdict().items()))
    yield "LoRA B zero", replace(inputs, lora=fresh)
    yield "LoRA B not zero", inputs


def _workload(config: MoEConfig, tokens: int) -> Workload:
    sizes = (config.num_experts, config.hidden_size, config.intermediate_size, config.top_k, config.lora_rank)
    return Workload("check", *sizes, tokens)
