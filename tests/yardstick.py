"""The error rule: how wrong a layer may be, measured by how wrong plain torch is.

A candidate's error against the float64 oracle is compared with the error that the plain bfloat16 torch layer makes on
the same inputs. No tolerance is tuned by hand.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from jitmoe.reference import LoraTensors, moe_reference

RMS_LIMIT, MAX_LIMIT = 0.8, 2.5
SMALL_RMS_LIMIT, SMALL_MAX_LIMIT = 1.5, 3.0
SMALL_SIZE = 256
"""Tensors with fewer elements are judged by the SMALL limits: there both errors are mostly luck."""
MOST_DRAWS = 8


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
    seed: int = 0

    def __str__(self) -> str:
        return self.name


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
)
"""The edge shapes that every kernel, instruction set and LoRA dtype is tested on."""


@dataclass(frozen=True)
class Inputs:
    """What one call of the layer and its backward get. Every floating value is representable in bfloat16,
    except the ``weights`` of a case that asks for float32: so the error measured is that of the arithmetic."""

    case: Case
    x: Tensor
    topk_ids: Tensor
    weights: Tensor
    gate_proj: Tensor
    up_proj: Tensor
    down_proj: Tensor
    lora: LoraTensors | None
    dout: Tensor


Results = dict[str, Tensor]
"""``out`` and the gradients ``x``, ``weights`` and, with LoRA, those of the six tensors under their names."""


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
    lora = None
    if case.rank:
        a_and_b = (
            (lora_a(fan_in), lora_b(out)) for fan_in, out in [(hidden, intermediate)] * 2 + [(intermediate, hidden)]
        )
        lora = LoraTensors(*(tensor for pair in a_and_b for tensor in pair))
    return Inputs(
        case=case,
        x=normal(case.tokens, hidden).to(case.x_dtype),
        topk_ids=_route(case, generator),
        weights=torch.randn(case.tokens, case.top_k, generator=generator).softmax(-1).to(case.weights_dtype),
        gate_proj=normal(case.experts, intermediate, hidden, std=hidden**-0.5),
        up_proj=normal(case.experts, intermediate, hidden, std=hidden**-0.5),
        down_proj=normal(case.experts, hidden, intermediate, std=intermediate**-0.5),
        lora=lora,
        dout=normal(case.tokens, hidden).to(case.x_dtype),
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


def results_of_reference(inputs: Inputs, dtype: torch.dtype) -> Results:
    """Results of :func:`moe_reference` with every floating tensor cast to ``dtype``."""
    base = [tensor.to(dtype) for tensor in (inputs.gate_proj, inputs.up_proj, inputs.down_proj)]
    x, weights = _leaf(inputs.x, dtype), _leaf(inputs.weights, dtype)
    lora = LoraTensors(*(_leaf(tensor, dtype) for tensor in inputs.lora)) if inputs.lora else None
    out = moe_reference(x, inputs.topk_ids, weights, *base, lora, inputs.case.scale)
    out.backward(inputs.dout.to(dtype))
    return _results(out, x, weights, lora._asdict() if lora else {})


def results_of_layer(layer: nn.Module, inputs: Inputs) -> Results:
    """Results of a layer called as ``layer(x, topk_ids, weights)``, after writing the LoRA values into it."""
    lora = {name: layer.get_parameter(name) for name in LoraTensors._fields} if inputs.lora else {}
    with torch.no_grad():
        for name, parameter in lora.items():
            parameter.copy_(getattr(inputs.lora, name))
            parameter.grad = None
    x, weights = _leaf(inputs.x, inputs.x.dtype), _leaf(inputs.weights, inputs.weights.dtype)
    out = layer(x, inputs.topk_ids, weights)
    out.backward(inputs.dout)
    return _results(out, x, weights, lora)


def _leaf(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype, copy=True).requires_grad_()


def _results(out: Tensor, x: Tensor, weights: Tensor, lora: Mapping[str, Tensor]) -> Results:
    results = {"out": out.detach()}
    for name, leaf in {"x": x, "weights": weights, **lora}.items():
        assert leaf.grad is not None, f"{name} has no gradient"
        results[name] = leaf.grad
    return results


def check(candidate: Results, inputs: Inputs) -> None:
    """Hold ``candidate`` to the error rule of this module.

    Raises:
        AssertionError: with a row per result and the line that reproduces the inputs.
    """
    oracle = results_of_reference(inputs, torch.float64)
    plain = _plain_errors(inputs)
    assert candidate.keys() == oracle.keys(), f"results {sorted(candidate)}, expected {sorted(oracle)}"
    rows = [_judge(name, candidate[name], oracle[name], plain[name], _touched(name, inputs)) for name in oracle]
    if any(row.fault for row in rows):
        table = "\n".join(str(row) for row in rows)
        raise AssertionError(f"{inputs.case}: outside the error rule\n{table}\nrepro: make_inputs({inputs.case!r})")


@dataclass(frozen=True)
class _Row:
    name: str
    rms: float
    rms_limit: float
    largest: float
    max_limit: float
    fault: str

    def __str__(self) -> str:
        ratios = f"rms {self.rms:7.3f} (<= {self.rms_limit})  max {self.largest:7.3f} (<= {self.max_limit})"
        return f"  {self.name:12}  {ratios}  {self.fault}"


def _judge(name: str, candidate: Tensor, oracle: Tensor, plain: "_PlainError", touched: Tensor) -> _Row:
    assert candidate.shape == oracle.shape, f"{name}: shape {tuple(candidate.shape)}, expected {tuple(oracle.shape)}"
    small = plain.size < SMALL_SIZE
    rms_limit, max_limit = (SMALL_RMS_LIMIT, SMALL_MAX_LIMIT) if small else (RMS_LIMIT, MAX_LIMIT)
    error = (candidate.double() - oracle)[touched]
    own_rms, own_largest = _size_of(error)
    rms, largest = _ratio(own_rms, plain.rms), _ratio(own_largest, plain.largest)
    faults = []
    if (oracle[touched] == 0).double().mean() > 0.5:
        faults.append("proves nothing: the oracle is mostly zeros")
    if candidate[~touched].count_nonzero():
        faults.append("not exactly zero where no token reaches")
    # Negated, so that a NaN is a fault.
    if not (rms <= rms_limit and largest <= max_limit):
        faults.append("TOO WRONG")
    return _Row(name, rms, rms_limit, largest, max_limit, "; ".join(faults))


def _ratio(error: float, plain: float) -> float:
    return 0.0 if error == 0 else error / plain if plain else math.inf


def _touched(name: str, inputs: Inputs) -> Tensor:
    """Which leading rows of a result any slot reaches; the others must be exactly zero and are not averaged in."""
    valid = (inputs.topk_ids >= 0) & (inputs.topk_ids < inputs.case.experts)
    if name == "weights":
        return valid
    if name in ("out", "x"):
        return valid.any(-1)
    return torch.isin(torch.arange(inputs.case.experts), inputs.topk_ids)


@dataclass(frozen=True)
class _PlainError:
    """Error of the plain bfloat16 layer in one result of ``size`` elements."""

    size: int
    rms: float
    largest: float


def _plain_errors(inputs: Inputs) -> dict[str, _PlainError]:
    others = _errors_of_other_draws(inputs.case)
    errors = {}
    for name, own in _errors_of_draw(inputs).items():
        (rms, largest), (usual_rms, usual_largest) = _size_of(own), _size_of(torch.cat([own, *others[name]]))
        errors[name] = _PlainError(own.numel(), max(rms, usual_rms), max(largest, usual_largest))
    return errors


@functools.cache
def _errors_of_other_draws(case: Case) -> dict[str, list[Tensor]]:
    """Errors of the plain layer on other values, for cases so small that one draw may be exact by luck.

    One rounding of a routing weight or of a low-rank value is shared by a whole row of a LoRA gradient, so the number
    of slots says how many independent errors a result has, however many elements it has.
    """
    draws = min(MOST_DRAWS, math.ceil(SMALL_SIZE / (case.tokens * case.top_k)) - 1)
    errors = [_errors_of_draw(make_inputs(replace(case, seed=case.seed + draw))) for draw in range(1, draws + 1)]
    names = ("out", "x", "weights", *(LoraTensors._fields if case.rank else ()))
    return {name: [error[name] for error in errors] for name in names}


def _errors_of_draw(inputs: Inputs) -> Results:
    oracle = results_of_reference(inputs, torch.float64)
    plain = results_of_reference(inputs, torch.bfloat16)
    return {name: (plain[name].double() - oracle[name])[_touched(name, inputs)].flatten() for name in oracle}


def _size_of(error: Tensor) -> tuple[float, float]:
    return error.square().mean().sqrt().item(), error.abs().max().item()
