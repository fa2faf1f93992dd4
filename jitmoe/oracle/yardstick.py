"""The error rule: how wrong a layer may be, measured by how wrong plain torch is.

The rule compares a candidate's error against the float64 oracle with the error of the plain bfloat16 torch layer on the
same inputs. No tolerance is tuned by hand.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from jitmoe.oracle.reference import SILU, Activation, Biases, LoraTensors, expert_reference

RMS_LIMIT, MAX_LIMIT = 0.8, 2.5
SMALL_RMS_LIMIT, SMALL_MAX_LIMIT = 1.5, 3.0
"""Largest ratios of a candidate's rms error, and of its largest error, to those of the plain layer."""
SMALL_SIZE = 256
"""Tensors with fewer elements are judged by the SMALL limits: there both errors are mostly luck."""
MOST_DRAWS = 8
"""Most other calls that :func:`draws_needed` asks for."""


@dataclass(frozen=True)
class Inputs:
    """What one call of the layer and its backward get.

    Shapes are those of the contract: x, dout [T, H]; topk_ids, weights [T, K]; gate_proj, up_proj [E, I, H];
    down_proj [E, H, I]; ``scale`` is LoRA's s; ``biases`` are float32. Where x and LoRA are representable in bfloat16
    the error measured is that of the arithmetic.
    """

    x: Tensor
    topk_ids: Tensor
    weights: Tensor
    gate_proj: Tensor
    up_proj: Tensor
    down_proj: Tensor
    lora: LoraTensors | None
    dout: Tensor
    scale: float
    activation: Activation = SILU
    biases: Biases | None = None

    @property
    def experts(self) -> int:
        """E."""
        return self.gate_proj.shape[0]

    def base(self) -> dict[str, Tensor]:
        """Base weights and biases under the names of the layer's constructor."""
        base = {"gate_proj": self.gate_proj, "up_proj": self.up_proj, "down_proj": self.down_proj}
        return base | {f"{name}_bias": bias for name, bias in _named(self.biases).items()}

    def kept(self) -> Tensor:
        """[T, K] bool: the slots with an expert."""
        return (self.topk_ids >= 0) & (self.topk_ids < self.experts)


Results = dict[str, Tensor]
"""``out`` and the gradients ``x``, ``weights`` and, with LoRA, those of the six tensors under their names."""


def title(name: str) -> str:
    """Name of a result or a step for people, who know gradients by their names in torch."""
    return name if name in ("out", "gate", "up") else f"{name}.grad"


Errors = dict[str, Tensor]
"""Finite differences from the oracle under the same names, flattened, at the elements that any slot reaches."""


def results_of_reference(inputs: Inputs, dtype: torch.dtype) -> Results:
    """Results of :func:`~jitmoe.oracle.reference.moe_reference` with every floating tensor cast to ``dtype``.

    Backward runs expert by expert, the last one first, as autograd does, so that only one expert's weights are cast at
    a time.
    """
    x, weights, dout = _leaf(inputs.x, dtype), _leaf(inputs.weights, dtype), inputs.dout.to(dtype)
    base = (inputs.gate_proj, inputs.up_proj, inputs.down_proj)
    cast = [torch.empty(tensor.shape[1:], dtype=dtype) for tensor in base]
    grads = {name: torch.zeros(t.shape, dtype=dtype) for name, t in _named(inputs.lora).items()}
    parts = []
    for expert in reversed(range(inputs.experts)):
        tokens, slots = torch.where(inputs.topk_ids == expert)
        if not tokens.numel():
            continue
        gate, up, down = [buffer.copy_(tensor[expert]) for buffer, tensor in zip(cast, base, strict=True)]
        lora = LoraTensors(*(_leaf(tensor[expert], dtype) for tensor in inputs.lora)) if inputs.lora else None
        biases = Biases(*(tensor[expert].to(dtype) for tensor in inputs.biases)) if inputs.biases else None
        result = expert_reference(x[tokens], gate, up, down, lora, inputs.scale, inputs.activation, biases).out
        rows = result * weights[tokens, slots, None]
        torch.autograd.backward(rows, dout[tokens])
        parts.append((tokens, rows.detach()))
        for name, leaf in _named(lora).items():
            assert leaf.grad is not None
            grads[name][expert] = leaf.grad
    out = torch.zeros_like(dout)
    for tokens, rows in reversed(parts):
        out.index_add_(0, tokens, rows)
    x_grad, weights_grad = (torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in (x, weights))
    return {"out": out, "x": x_grad.detach(), "weights": weights_grad.detach(), **grads}


def results_of_layer(layer: nn.Module, inputs: Inputs) -> Results:
    """Results of ``layer(x, topk_ids, weights)`` and its backward, after writing the LoRA values into ``layer``."""
    lora = {name: layer.get_parameter(name) for name in _named(inputs.lora)}
    with torch.no_grad():
        for name, parameter in lora.items():
            parameter.copy_(getattr(inputs.lora, name))
            parameter.grad = None
    x, weights = _leaf(inputs.x, inputs.x.dtype), _leaf(inputs.weights, inputs.weights.dtype)
    out = layer(x, inputs.topk_ids, weights)
    out.backward(inputs.dout)
    results = {"out": out.detach()}
    for name, leaf in {"x": x, "weights": weights, **lora}.items():
        assert leaf.grad is not None, f"{name} has no gradient"
        results[name] = leaf.grad
    return results


@dataclass(frozen=True)
class Verdict:
    """One result of a candidate: its errors over those of the plain layer, and the limits of these ratios.

    Attributes:
        name: of the result.
        rms: ratio of the root-mean-square errors.
        rms_limit: its limit.
        largest: ratio of the largest errors.
        max_limit: its limit.
        fault: why the error rule is broken, "" where it holds.
        doubt: why a rule that holds proves little here, else "".
    """

    name: str
    rms: float
    rms_limit: float
    largest: float
    max_limit: float
    fault: str
    doubt: str

    def __str__(self) -> str:
        ratios = f"rms {self.rms:7.3f} (<= {self.rms_limit})  max {self.largest:7.3f} (<= {self.max_limit})"
        return f"  {title(self.name):16}  {ratios}  {'; '.join(filter(None, (self.fault, self.doubt)))}"


def judge(
    candidate: Results,
    inputs: Inputs,
    oracle: Results,
    plain: Results,
    others: Mapping[str, Sequence[Tensor]],
    coarse: bool = False,
) -> list[Verdict]:
    """Hold ``candidate`` to the error rule.

    Args:
        candidate: what is judged.
        inputs: what it was computed from.
        oracle: of :func:`results_of_reference` in float64.
        plain: of :func:`results_of_reference` in bfloat16.
        others: errors of the plain layer on calls with other values, see :func:`errors_of_redraws`.
        coarse: take the SMALL limits for every result.
    """
    assert candidate.keys() == oracle.keys(), f"results {sorted(candidate)}, expected {sorted(oracle)}"
    errors = errors_of(plain, oracle, inputs)
    return [
        judge_one(
            name, candidate[name], oracle[name], [errors[name], *others.get(name, ())], reached(name, inputs), coarse
        )
        for name in oracle
    ]


def judge_one(
    name: str,
    candidate: Tensor,
    oracle: Tensor,
    plain: Sequence[Tensor],
    reached: Tensor,
    coarse: bool = False,
) -> Verdict:
    """Judge one result.

    Args:
        name: of the result.
        candidate: the result.
        oracle: what it should be.
        plain: errors of the plain layer on this call, and then on others like it.
        reached: leading axes of the result, True where a slot reaches it. Elsewhere it must be exactly zero.
        coarse: take the SMALL limits, however many elements there are.
    """
    assert candidate.shape == oracle.shape, f"{name}: shape {tuple(candidate.shape)}, expected {tuple(oracle.shape)}"
    expected = oracle[reached]
    finite = expected.to(candidate.dtype).isfinite()
    error = (candidate[reached].double() - expected)[finite]
    small = coarse or plain[0].numel() < SMALL_SIZE
    rms_limit, max_limit = (SMALL_RMS_LIMIT, SMALL_MAX_LIMIT) if small else (RMS_LIMIT, MAX_LIMIT)
    (own, own_largest), (usual, usual_largest) = _size_of(plain[0]), _size_of(torch.cat(list(plain)))
    rms, largest = _size_of(error)
    rms, largest = _ratio(rms, max(own, usual)), _ratio(largest, max(own_largest, usual_largest))
    faults = []
    if candidate[~reached].count_nonzero():
        faults.append("not exactly zero where no token reaches")
    # Negated, so that a NaN is a fault.
    if not (rms <= rms_limit and largest <= max_limit):
        faults.append("TOO WRONG")
    doubt = ""
    if expected.numel() and not finite.any():
        doubt = "proves nothing: the oracle is not finite"
    elif (expected == 0).double().mean() > 0.5:
        doubt = "proves nothing: the oracle is mostly zeros"
    return Verdict(name, rms, rms_limit, largest, max_limit, "; ".join(faults), doubt)


def reached(name: str, inputs: Inputs) -> Tensor:
    """Leading rows of a result that any slot reaches. The others must be exactly zero and count in no average."""
    kept = inputs.kept()
    if name == "weights":
        return kept
    if name in ("out", "x"):
        return kept.any(-1)
    return torch.isin(torch.arange(inputs.experts), inputs.topk_ids.flatten())  # of other strides it takes none


def errors_of(candidate: Results, oracle: Results, inputs: Inputs) -> Errors:
    """Errors of ``candidate`` at the elements that are finite and that any slot reaches."""
    errors = {name: (candidate[name].double() - oracle[name])[reached(name, inputs)].flatten() for name in oracle}
    return {name: error[error.isfinite()] for name, error in errors.items()}


def errors_of_plain(inputs: Inputs) -> Errors:
    """Errors of the plain bfloat16 layer."""
    return errors_of(results_of_reference(inputs, torch.bfloat16), results_of_reference(inputs, torch.float64), inputs)


def draws_needed(slots: int) -> int:
    """Number of other calls that show how wrong plain torch usually is, as one call of few slots may be exact by luck.

    A whole row of a LoRA gradient shares one rounding of a routing weight or of u. So the number of independent errors
    of a result follows the number of slots, not of elements.
    """
    return min(MOST_DRAWS, math.ceil(SMALL_SIZE / slots) - 1) if slots else 0


def errors_of_redraws(inputs: Inputs) -> dict[str, list[Tensor]]:
    """Errors of the plain layer on other tokens of the same magnitude, where the call itself has few."""
    draws = range(draws_needed(int(inputs.kept().sum())))
    errors = [errors_of_plain(_redraw(inputs, seed)) for seed in draws]
    return {name: [error[name] for error in errors] for name in ("out", "x", "weights", *_named(inputs.lora))}


def as_operands(inputs: Inputs) -> Inputs:
    """``inputs`` with x, dout and LoRA rounded to bfloat16 and kept in their own dtypes."""

    def representable(tensor: Tensor) -> Tensor:
        return tensor.to(torch.bfloat16).to(tensor.dtype)

    lora = LoraTensors(*map(representable, inputs.lora)) if inputs.lora else None
    return replace(inputs, x=representable(inputs.x), dout=representable(inputs.dout), lora=lora)


def noise_like(tensor: Tensor, rows: int, generator: torch.Generator) -> Tensor:
    """[rows, ...] normal values with the rms of the finite values of ``tensor``, representable in bfloat16."""
    rms, _ = _size_of(tensor[tensor.isfinite()].double())
    noise = torch.randn(rows, *tensor.shape[1:], generator=generator) * rms
    return noise.to(torch.bfloat16).to(tensor.dtype)


def _redraw(inputs: Inputs, seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    x, dout = (noise_like(tensor, len(tensor), generator) for tensor in (inputs.x, inputs.dout))
    return replace(inputs, x=x, dout=dout)


def _named(lora: LoraTensors | Biases | None) -> dict[str, Tensor]:
    return lora._asdict() if lora else {}


def _leaf(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype, copy=True).requires_grad_()


def _ratio(error: float, plain: float) -> float:
    return 0.0 if error == 0 else error / plain if plain else math.inf


def _size_of(error: Tensor) -> tuple[float, float]:
    """Root mean square and largest magnitude; zeros of an empty tensor."""
    return (error.square().mean().sqrt().item(), error.abs().max().item()) if error.numel() else (0.0, 0.0)
