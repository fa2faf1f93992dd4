"""The named edge shapes and their inputs, and the error rule of jitmoe.oracle.yardstick as an assertion."""

import functools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from jitmoe.oracle import yardstick
from jitmoe.oracle.reference import SILU, Activation, Biases, LoraTensors
from jitmoe.oracle.yardstick import SMALL_SIZE, Results, results_of_layer, results_of_reference

__all__ = [
    "CASES",
    "SMALL_SIZE",
    "Case",
    "Inputs",
    "Results",
    "check",
    "make_inputs",
    "results_of_layer",
    "results_of_reference",
]


@dataclass(frozen=True)
class Case:
    """One named set of sizes, routing and dtypes; ``seed`` decides every value."""

    name: str
    experts: int
    hidden: int
    intermediate: int
    top_k: int
    rank: int
    tokens: int
    routing: str = "random"
    scale: float = 2.0
    x_dtype: torch.dtype = torch.bfloat16
    weights_dtype: torch.dtype = torch.float32
    lora_dtype: torch.dtype = torch.float32
    activation: Activation = SILU
    bias: bool = False
    magnitudes: tuple[float, ...] = (1.0,)
    seed: int = 0

    def __str__(self) -> str:
        return self.name


APART = (0.5, 256.0)
"""Magnitudes of the tokens in turn: gate and up lie far within the limit of a clamp or far outside. At the limit its
slope jumps, and a value that is rounded there has the slope of the other side, in torch's bfloat16 as in ours."""

CASES: tuple[Case, ...] = (
    Case("small", experts=4, hidden=64, intermediate=96, top_k=2, rank=8, tokens=24),
    Case("medium", experts=8, hidden=256, intermediate=176, top_k=4, rank=16, tokens=64),
    Case("all_ones", experts=1, hidden=1, intermediate=1, top_k=1, rank=1, tokens=1),
    Case("hidden_1", experts=3, hidden=1, intermediate=48, top_k=2, rank=4, tokens=40),
    Case("intermediate_1", experts=3, hidden=48, intermediate=1, top_k=2, rank=4, tokens=40),
    Case("ragged_15", experts=3, hidden=15, intermediate=17, top_k=2, rank=1, tokens=31),
    Case("ragged_31", experts=3, hidden=31, intermediate=33, top_k=2, rank=15, tokens=17),
    Case("ragged_33", experts=3, hidden=33, intermediate=31, top_k=2, rank=17, tokens=16),
    Case("ragged_47", experts=5, hidden=47, intermediate=65, top_k=3, rank=31, tokens=33),
    Case("ragged_65", experts=5, hidden=65, intermediate=47, top_k=3, rank=33, tokens=47),
    Case("ragged_100", experts=4, hidden=100, intermediate=130, top_k=2, rank=47, tokens=65),
    Case("rank_65", experts=2, hidden=96, intermediate=100, top_k=1, rank=65, tokens=15),
    Case("one_token", experts=6, hidden=64, intermediate=80, top_k=3, rank=8, tokens=1),
    Case("one_expert_of_many", experts=4, hidden=64, intermediate=48, top_k=1, rank=8, tokens=70, routing="one_expert"),
    Case("duplicates", experts=4, hidden=48, intermediate=64, top_k=3, rank=8, tokens=20, routing="duplicates"),
    Case("every_expert", experts=5, hidden=48, intermediate=64, top_k=5, rank=8, tokens=20),
    Case("idle_experts", experts=12, hidden=64, intermediate=48, top_k=2, rank=8, tokens=30, routing="idle_experts"),
    Case("skipped_slots", experts=4, hidden=64, intermediate=48, top_k=3, rank=8, tokens=30, routing="skipped_slots"),
    Case("no_lora", experts=4, hidden=64, intermediate=96, top_k=2, rank=0, tokens=24),
    Case("bfloat16_lora", 4, 64, 96, 2, rank=8, tokens=24, lora_dtype=torch.bfloat16),
    Case("bfloat16_weights", 4, 64, 96, 2, rank=8, tokens=24, weights_dtype=torch.bfloat16),
    Case("float32_x", 4, 64, 96, 2, rank=8, tokens=24, x_dtype=torch.float32),
    Case("clamped", 4, 48, 80, 2, rank=8, tokens=40, activation=Activation("silu_clamped"), magnitudes=APART),
    Case("gpt_oss", 5, 47, 65, 3, rank=8, tokens=40, activation=Activation("gpt_oss"), bias=True, magnitudes=APART),
)
"""The edge shapes that every kernel, instruction set and LoRA dtype is tested on."""


@dataclass(frozen=True, kw_only=True)
class Inputs(yardstick.Inputs):
    """Inputs of ``case``. Every floating value is representable in bfloat16, except the ``weights`` of a case that
    asks for float32: so the error measured is that of the arithmetic."""

    case: Case


def make_inputs(case: Case) -> Inputs:
    """Inputs of ``case`` with the magnitudes of a real layer; B is not zero, or A would have no gradient."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * std).bfloat16()

    def lora_a(fan_in: int) -> Tensor:
        uniform = torch.rand(case.experts, case.rank, fan_in, generator=generator) * 2 - 1
        return (uniform / math.sqrt(fan_in)).bfloat16().to(case.lora_dtype)

    def lora_b(fan_out: int) -> Tensor:
        return normal(case.experts, fan_out, case.rank, std=0.05).to(case.lora_dtype)

    hidden, intermediate = case.hidden, case.intermediate
    magnitudes = torch.tensor(case.magnitudes).repeat(case.tokens)[: case.tokens, None].bfloat16()
    lora = None
    if case.rank:
        a_and_b = (
            (lora_a(fan_in), lora_b(out)) for fan_in, out in [(hidden, intermediate)] * 2 + [(intermediate, hidden)]
        )
        lora = LoraTensors(*(tensor for pair in a_and_b for tensor in pair))
    return Inputs(
        case=case,
        x=(normal(case.tokens, hidden) * magnitudes).to(case.x_dtype),
        topk_ids=_route(case, generator),
        weights=torch.randn(case.tokens, case.top_k, generator=generator).softmax(-1).to(case.weights_dtype),
        gate_proj=normal(case.experts, intermediate, hidden, std=hidden**-0.5),
        up_proj=normal(case.experts, intermediate, hidden, std=hidden**-0.5),
        down_proj=normal(case.experts, hidden, intermediate, std=intermediate**-0.5),
        lora=lora,
        dout=normal(case.tokens, hidden).to(case.x_dtype),
        scale=case.scale,
        activation=case.activation,
        biases=Biases(*(normal(case.experts, out, std=0.5).float() for out in (intermediate, intermediate, hidden)))
        if case.bias
        else None,
    )


def _route(case: Case, generator: torch.Generator) -> Tensor:
    """Expert ids [T, K], distinct within a token unless the routing is about something else."""
    shape = (case.tokens, case.top_k)
    if case.routing == "one_expert":
        return torch.full(shape, case.experts - 1)
    if case.routing == "duplicates":
        return torch.randint(case.experts, (case.tokens, 1), generator=generator).expand(shape).contiguous()
    chosen_from = case.experts // 3 if case.routing == "idle_experts" else case.experts
    ids = torch.rand(case.tokens, chosen_from, generator=generator).argsort(-1)[:, : case.top_k]
    if case.routing == "skipped_slots":
        skipped = torch.rand(shape, generator=generator) < 0.2
        ids = torch.where(skipped, torch.where(ids % 2 == 0, -1, case.experts), ids)
    return ids


def check(candidate: Results, inputs: Inputs) -> None:
    """Hold ``candidate`` to the error rule.

    Raises:
        AssertionError: with a row per result and the line that reproduces the inputs.
    """
    oracle, plain = (results_of_reference(inputs, dtype) for dtype in (torch.float64, torch.bfloat16))
    verdicts = yardstick.judge(candidate, inputs, oracle, plain, _errors_of_other_draws(inputs.case))
    if any(verdict.fault or verdict.doubt for verdict in verdicts):
        rows = "\n".join(map(str, verdicts))
        raise AssertionError(f"{inputs.case}: outside the error rule\n{rows}\nrepro: make_inputs({inputs.case!r})")


@functools.cache
def _errors_of_other_draws(case: Case) -> dict[str, list[Tensor]]:
    """Errors of the plain layer on other values, weights and routing included, where the case has few slots."""
    draws = range(1, yardstick.draws_needed(case.tokens * case.top_k) + 1)
    errors = [yardstick.errors_of_plain(make_inputs(replace(case, seed=case.seed + draw))) for draw in draws]
    names = ("out", "x", "weights", *(LoraTensors._fields if case.rank else ()))
    return {name: [error[name] for error in errors] for name in names}
