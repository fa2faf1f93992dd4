"""Is the layer right, and how fast is it: on random data of any sizes, or on a recorded call."""

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from jitmoe.bench import machine, report
from jitmoe.bench.ceilings import Ceilings
from jitmoe.bench.contenders import refuse_watching
from jitmoe.bench.measure import Options
from jitmoe.bench.measure import compare as measure
from jitmoe.config import MoEConfig
from jitmoe.errors import ConfigError
from jitmoe.experts.layer import MoELayer
from jitmoe.inspect.debug import stages
from jitmoe.inspect.replay import compare, conclusion, read_recording, replay
from jitmoe.jit.cpu import resolve_isa
from jitmoe.oracle.data import batches, make_base, make_lora
from jitmoe.oracle.reference import LoraTensors
from jitmoe.oracle.workloads import Workload
from jitmoe.oracle.yardstick import Inputs

MODES = ("accuracy", "perf", "real_data", "debug")
SEED = 0


def run(arguments: Namespace, config: MoEConfig, tokens: int) -> int:
    """What ``jitmoe check`` does; 1 where the error rule is broken.

    Args:
        arguments: ``mode``, one of :data:`MODES`; ``data``, the file of "real_data".
        config: of the layer; "real_data" takes that of the file.
        tokens: T.

    Raises:
        ConfigError: a file without "real_data", or the other way round.
    """
    if (arguments.mode == "real_data") != (arguments.data is not None):
        raise ConfigError("--mode real_data takes its call from --data FILE; the other modes make their own")
    if arguments.mode == "real_data":
        return replay(read_recording(arguments.data), getattr(arguments, "isa", None))
    if arguments.mode == "perf":
        return _perf(config, tokens)
    inputs = make_call(config, tokens)
    layer = MoELayer(config, inputs.gate_proj, inputs.up_proj, inputs.down_proj)
    print(f"{tokens} tokens, {layer}")
    return _debug(layer, inputs) if arguments.mode == "debug" else _accuracy(layer, inputs)


def make_call(config: MoEConfig, tokens: int) -> Inputs:
    """A call with random weights, inputs and routing, the same in every run; B is not zero."""
    generator = torch.Generator().manual_seed(SEED)
    workload = _workload(config, tokens)
    base, lora = make_base(workload, generator), make_lora(workload, generator)
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
    )


def _accuracy(layer: MoELayer, inputs: Inputs) -> int:
    faults = []
    for what, variant in _variants(inputs):
        comparison = compare(layer, variant)
        faults += [f"{name} ({what})" for name in comparison.faults]
        print(f"\n{what}\n{comparison}", flush=True)
    print(f"\n{conclusion(faults)}")
    return 1 if faults else 0


def _variants(inputs: Inputs) -> Iterator[tuple[str, Inputs]]:
    """At the start of training B is zero: the layer equals its base, and A has no gradient yet."""
    if inputs.lora is None:
        yield "no LoRA", inputs
        return

    def zero_b(name: str, tensor: Tensor) -> Tensor:
        return torch.zeros_like(tensor) if name.endswith("_b") else tensor

    fresh = LoraTensors(*(zero_b(name, tensor) for name, tensor in inputs.lora._asdict().items()))
    yield "LoRA B zero", replace(inputs, lora=fresh)
    yield "LoRA B not zero", inputs


def _debug(layer: MoELayer, inputs: Inputs) -> int:
    for stage in stages(layer, inputs):
        print(stage, flush=True)
        if stage.deviation is not None:
            return 1
    return 0


def _perf(config: MoEConfig, tokens: int) -> int:
    refuse_watching()
    options = Options((resolve_isa(config.requested_isa),), lora_dtype=config.lora_dtype)
    threads = torch.get_num_threads()
    print(report.machine_lines(machine.describe(threads)))
    print(report.outcome_table(measure(_workload(config, tokens), options, Ceilings(threads))))
    return 0


def _workload(config: MoEConfig, tokens: int) -> Workload:
    sizes = (config.num_experts, config.hidden_size, config.intermediate_size, config.top_k, config.lora_rank)
    return Workload("check", *sizes, tokens)
