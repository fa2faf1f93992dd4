"""What an experts module of transformers computes, found by asking it; what is not understood is refused by name."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from jitmoe.config import Activation, MoEConfig
from jitmoe.errors import UnsupportedExpertsError
from jitmoe.formats import BFLOAT16, Packing
from jitmoe.hf.layout import PARTS, Layout, options_of
from jitmoe.oracle import reference

BIASES = ("gate_up_proj_bias", "down_proj_bias")

FACTS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm", "num_experts")
"""Attributes of every module that transformers' decorator made an experts module."""


@dataclass(frozen=True)
class Understood:
    """An experts module whose computation jitmoe has kernels for.

    Attributes:
        layout: where its weights lie.
        activation: between gate, up and down.
        alpha: of the activation.
        limit: of the activation.
        bias: it has biases.
        packing: what its weights are kept in; a module whose weights are not packed does not know it.
    """

    layout: Layout
    activation: Activation
    alpha: float
    limit: float
    bias: bool
    packing: Packing = BFLOAT16

    def config(self) -> MoEConfig:
        """Of the base; top_k and skipping are facts of a call."""
        layout = self.layout
        return MoEConfig(
            num_experts=layout.experts,
            hidden_size=layout.hidden,
            intermediate_size=layout.intermediate,
            top_k=1,
            lora_rank=0,
            allow_skip=True,
            activation=self.activation,
            activation_alpha=self.alpha,
            activation_limit=self.limit,
            bias=self.bias,
            **options_of(self.packing),
        )


def is_experts(module: nn.Module) -> bool:
    """Whether transformers' experts interface runs this module."""
    return all(hasattr(module, fact) for fact in FACTS) and hasattr(module, "_apply_gate")


def understand(module: nn.Module) -> Understood:
    """What ``module`` computes.

    Raises:
        UnsupportedExpertsError: something that jitmoe has no kernel for, or does not know; names class and reason.
    """
    if not is_experts(module):
        missing = [fact for fact in (*FACTS, "_apply_gate") if not hasattr(module, fact)]
        raise refused(module, f"it is not on transformers' experts interface (it has no {', '.join(missing)})")
    if not module.has_gate:
        raise refused(module, "its experts have no gate")
    if module.has_post_expert_norm:
        raise refused(module, "it normalises the outputs of its experts")
    if getattr(module, "parametrizations", None):
        names = ", ".join(module.parametrizations)  # type: ignore[arg-type]
        raise refused(module, f"its {names} are parametrised by something that jitmoe does not know")
    known = {*PARTS, *(BIASES if module.has_bias else ())}
    found = {name for name, _ in module.named_parameters()}
    if found != known:
        raise refused(module, f"its parameters are {', '.join(sorted(found))}, expected {', '.join(sorted(known))}")
    layout = _layout(module)
    activation, alpha, limit = _activation(module, layout)
    return Understood(layout, activation, alpha, limit, bool(module.has_bias))


def refused(module: nn.Module, reason: str) -> UnsupportedExpertsError:
    """The error that names the class of ``module`` and why jitmoe does not run it."""
    return UnsupportedExpertsError(
        f"{class_name(module)} cannot run on jitmoe: {reason}. Use experts_implementation='eager' for this model, or "
        f"jitmoe.hf.register(unsupported='eager') to leave modules like this one to transformers"
    )


def class_name(module: nn.Module) -> str:
    """Of the module; a parametrised module's class has another name."""
    return type(module).__name__.removeprefix("Parametrized")


def _layout(module: Any) -> Layout:
    gate_up, down = module.gate_up_proj, module.down_proj
    if gate_up.dim() != 3 or down.dim() != 3:
        raise refused(
            module, f"its weights have shapes {list(gate_up.shape)} and {list(down.shape)}, expected three axes"
        )
    experts = gate_up.shape[0]
    hidden, intermediate = down.shape[1:]
    if module.is_transposed:
        hidden, intermediate = intermediate, hidden
    layout = Layout(experts, hidden, intermediate, bool(module.is_transposed), not module.is_concatenated)
    for name, parts in PARTS.items():
        expected = (module.num_experts, *layout.matrix_shape(parts))
        if tuple(getattr(module, name).shape) != expected:
            found = list(getattr(module, name).shape)
            raise refused(module, f"its {name} has shape {found}, expected {list(expected)}")
    return layout


PROBE_ROWS, PROBE_COLUMNS = 64, 5


def _activation(module: Any, layout: Layout) -> tuple[Activation, float, float]:
    """The one of our activations that gives what the module's own gate gives for values on both sides of its limit."""
    candidates = list(_candidates(module))
    beyond = 2 * max(limit for _, _, limit in candidates)
    generator = torch.Generator().manual_seed(0)
    gate, up = (
        torch.randn(2, PROBE_ROWS, PROBE_COLUMNS, generator=generator, device="cpu", dtype=torch.float32) * beyond
    )
    fused = torch.stack([gate, up], -1).flatten(-2) if layout.interleaved else torch.cat([gate, up], -1)
    try:
        with torch.no_grad():
            found = module._apply_gate(fused)
    except Exception as error:
        raise refused(module, f"its gate cannot be asked what it computes ({type(error).__name__}: {error})") from error
    for activation, alpha, limit in candidates:
        expected = reference.Activation(activation, alpha, limit)(gate, up)
        if found.shape == expected.shape and torch.allclose(found.float(), expected, rtol=1e-4, atol=1e-5):
            return activation, alpha, limit
    function = getattr(module, "act_fn", None)
    name = type(function).__name__ if function is not None else "its own"
    raise refused(module, f"its activation ({name}) is none of silu, clamped silu and gpt-oss's")


def _candidates(module: Any) -> Iterator[tuple[Activation, float, float]]:
    """Activations to try, with the limits and factors that the module or its config name."""
    default = MoEConfig(1, 1, 1, 1)
    yield "silu", default.activation_alpha, default.activation_limit
    holders = (module, getattr(module, "config", None))
    names = ("limit", "swiglu_limit", "alpha", "swiglu_alpha")
    named = {name: getattr(holder, name, None) for holder in reversed(holders) for name in names}
    named |= {name: value for name in names if (value := getattr(module, name, None)) is not None}
    numbers = {name: float(value) for name, value in named.items() if isinstance(value, (int, float))}
    limits = {numbers[name] for name in ("limit", "swiglu_limit") if numbers.get(name, 0.0) > 0}
    alphas = {numbers[name] for name in ("alpha", "swiglu_alpha") if name in numbers} or {default.activation_alpha}
    for limit in limits:
        yield "silu_clamped", default.activation_alpha, limit
        for alpha in alphas:
            yield "gpt_oss", alpha, limit
