"""Finds where a wrong layer goes wrong: compares it with the oracle, expert by expert and step by step."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from jitmoe.experts.layer import MoELayer
from jitmoe.inspect.capture import node_of
from jitmoe.inspect.replay import compare
from jitmoe.oracle.reference import Biases, ExpertSteps, LoraTensors, expert_reference
from jitmoe.oracle.yardstick import Inputs, Verdict, as_operands, judge_one, noise_like, title
from jitmoe.plan.parts import parts_of
from jitmoe.plan.shapes import plan_kernels

LAST_STEPS = (
    "out", "weights", "down_lora_b", "down_lora_a",
    "gate_lora_b", "up_lora_b", "gate_lora_a", "up_lora_a", "x",
)  # fmt: skip
"""Results after gate and up, in the order in which the kernels compute them: an error spreads to those that follow."""


LEAST_ROWS = 32
"""Rows that random tokens bring an expert to, because the rms of fewer rows says nothing."""


@dataclass(frozen=True)
class Stage:
    """Verdicts on one expert alone; with ``expert`` None, on the call as it is."""

    expert: int | None
    verdicts: list[Verdict]

    @property
    def deviation(self) -> Verdict | None:
        """The first step outside the error rule."""
        return next((verdict for verdict in self.verdicts if verdict.fault), None)

    def __str__(self) -> str:
        who = "all experts together" if self.expert is None else f"expert {self.expert}"
        if self.deviation is None:
            return f"{who}: {len(self.verdicts)} steps ok"
        steps = "\n".join(map(str, self.verdicts))
        return f"{who}: the first step that deviates is {title(self.deviation.name)}\n{steps}"


def stages(layer: MoELayer, inputs: Inputs) -> Iterator[Stage]:
    """Each chosen expert alone, then the call as it is.

    An expert computes its tokens with routing weight 1, on the kernel that the call would take. The SMALL limits judge
    it: with few rows our errors and torch's are luck, and gate and up, which both round before they store them, cannot
    be better than torch's. The last stage is judged as any call.
    """
    inputs = as_operands(inputs)
    probe = _probe(layer, inputs)
    for expert in torch.unique(inputs.topk_ids[inputs.kept()]).tolist():
        yield Stage(expert, _expert_verdicts(probe, inputs, expert))
    yield Stage(None, _in_order(compare(layer, inputs).verdicts))


def _probe(layer: MoELayer, inputs: Inputs) -> MoELayer:
    """``layer`` for calls with one expert per token, with the same weights and the kernel that ``inputs`` takes."""
    kept = inputs.topk_ids[inputs.kept()]
    plan = plan_kernels(layer.config, layer.isa).by_part[0]  # the choice is the same in all parts
    shape = plan.select(kept.numel(), torch.unique(kept).numel())
    probe = copy.copy(layer)
    probe.isa = shape.isa
    probe.config = replace(layer.config, top_k=1, m_step=shape.m_step, recompute=False)
    return probe


def _expert_verdicts(probe: MoELayer, inputs: Inputs, expert: int) -> list[Verdict]:
    tokens = (inputs.topk_ids == expert).any(-1)
    filler = max(LEAST_ROWS - int(tokens.sum()), 0)
    generator = torch.Generator().manual_seed(expert)
    x, dout = (torch.cat([t[tokens], noise_like(t, filler, generator)]) for t in (inputs.x, inputs.dout))
    ids = torch.full((len(x), 1), expert)
    alone = replace(inputs, x=x, dout=dout, topk_ids=ids, weights=torch.ones(len(x), 1))
    results = compare(probe, alone, coarse=True).verdicts  # also writes the LoRA values that _before_activation needs
    return _before_activation(probe, alone, expert) + _in_order(results)


def _before_activation(probe: MoELayer, alone: Inputs, expert: int) -> list[Verdict]:
    """Verdicts on gate and up, from what the layer saved for backward."""
    steps = {dtype: _reference_steps(alone, expert, dtype) for dtype in (torch.float64, torch.bfloat16)}
    node = node_of(probe(alone.x.clone().requires_grad_(), alone.topk_ids, alone.weights))
    every_row = torch.ones(len(alone.x), dtype=torch.bool)
    saved = dict(zip(node.saved_names, node.saved_tensors[-len(node.saved_names) :], strict=True))
    verdicts = []
    for name in ("gate", "up"):
        oracle, plain = (getattr(steps[dtype], name) for dtype in (torch.float64, torch.bfloat16))
        by_part = (saved[f"{name}.saved{part.suffix}"] for part in parts_of(probe.config))
        strips = torch.cat(list(by_part)).transpose(0, 1)  # the last strip is padded
        ours = strips.flatten(1)[:, : oracle.shape[1]]
        error = (plain.double() - oracle).flatten()
        verdicts.append(judge_one(name, ours, oracle, [error[error.isfinite()]], every_row, coarse=True))
    return verdicts


def _reference_steps(alone: Inputs, expert: int, dtype: torch.dtype) -> ExpertSteps:
    def cast(tensor: Tensor) -> Tensor:
        return tensor[expert].to(dtype)

    lora = LoraTensors(*map(cast, alone.lora)) if alone.lora else None
    gate, up, down = map(cast, (alone.gate_proj, alone.up_proj, alone.down_proj))
    biases = Biases(*map(cast, alone.biases)) if alone.biases else None
    return expert_reference(alone.x.to(dtype), gate, up, down, lora, alone.scale, alone.activation, biases)


def _in_order(verdicts: list[Verdict]) -> list[Verdict]:
    return sorted(verdicts, key=lambda verdict: LAST_STEPS.index(verdict.name))
