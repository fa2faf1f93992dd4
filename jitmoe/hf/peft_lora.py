"""PEFT's LoRA on the parameters of an experts module: read where PEFT keeps it, never folded into the base.

PEFT wraps the module once for each target parameter, and by default folds W + s B A at every forward. Where the module
runs on jitmoe, entering a wrapper only notes which of its adapters are active, for the call inside of it.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from jitmoe.errors import AdapterError
from jitmoe.experts.functional import FusedAdapters
from jitmoe.hf.layout import PARTS, Layout

IMPLEMENTATION = "jitmoe"
"""Name of our experts implementation in transformers."""

Factors = tuple[Tensor, Tensor, float]
"""A [E, r, in], B [E, out, r] and s of one adapter on one parameter."""


class _Active(threading.local):
    """Of this thread: for each experts module that is being called, wrappers and names of their active adapters."""

    def __init__(self) -> None:
        self.wrappers: dict[int, dict[str, tuple[Any, list[str]]]] = {}


_active = _Active()


def install() -> None:
    """Make PEFT hand its factors over where the experts run on jitmoe.

    Raises:
        AdapterError: PEFT's wrapper is not as we know it.
    """
    from peft.tuners.lora import layer

    wrapper = getattr(layer, "ParamWrapper", None)
    original = getattr(wrapper, "_activate_lora", None)
    if wrapper is None or original is None:
        raise AdapterError("this version of peft has no ParamWrapper._activate_lora: install peft 0.19 or newer")
    if not hasattr(original, "folds"):
        wrapper._activate_lora = _handing_over(original)


def _handing_over(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def activate(wrapper: Any, active_adapters: list[str]) -> Any:
        module = wrapper.get_base_layer()
        if getattr(getattr(module, "config", None), "_experts_implementation", None) != IMPLEMENTATION:
            return original(wrapper, active_adapters)
        return _noted(module, wrapper, [name for name in active_adapters if name in wrapper.lora_A])

    activate.folds = original  # type: ignore[attr-defined]
    return activate


@contextmanager
def _noted(module: Any, wrapper: Any, adapters: list[str]) -> Iterator[None]:
    wrappers = _active.wrappers.setdefault(id(module), {})
    if wrapper.parameter_name not in PARTS:
        raise AdapterError(
            f"LoRA on {wrapper.parameter_name} of {type(module).__name__} is not computed by jitmoe; "
            f"target_parameters may name {' and '.join(PARTS)}"
        )
    if wrapper.parameter_name in wrappers:
        raise AdapterError(f"two wrappers of PEFT hold LoRA of one {wrapper.parameter_name}: use one PeftModel")
    wrappers[wrapper.parameter_name] = (wrapper, adapters)
    try:
        yield
    finally:
        del wrappers[wrapper.parameter_name]
        if not wrappers:
            del _active.wrappers[id(module)]


def adapters_of(module: Any, layout: Layout) -> FusedAdapters | None:
    """The adapters that are active in the present call of ``module``, as views of PEFT's tensors.

    Several are one of the sum of their ranks: A one below the other, B side by side, each with its scale in it.
    """
    wrappers = _active.wrappers.get(id(module))
    if not wrappers:
        return None
    found = {name: [_factors(wrapper, layout, one) for one in names] for name, (wrapper, names) in wrappers.items()}
    gate_up, down = found.get("gate_up_proj", []), found.get("down_proj", [])
    if not gate_up and not down:
        return None
    if len(gate_up) == len(down) == 1 and _alike(gate_up[0], down[0]):
        (gate_up_a, gate_up_b, scale), (down_a, down_b, _) = gate_up[0], down[0]
    else:
        scale = 1.0
        rank = max(sum(a.shape[1] for a, _, _ in factors) for factors in (gate_up, down))
        dtype = torch.promote_types(*(t.dtype for t in (*gate_up, *down)[0][:2]))
        hidden, intermediate = layout.hidden, layout.intermediate
        gate_up_a, gate_up_b = _concatenated(gate_up, rank, (layout.experts, 2 * intermediate, hidden), dtype)
        down_a, down_b = _concatenated(down, rank, (layout.experts, hidden, intermediate), dtype)
    return FusedAdapters(gate_up_a, layout.fused_b(gate_up_b), down_a, down_b, scale)


def _alike(one: Factors, other: Factors) -> bool:
    return one[0].shape[1] == other[0].shape[1] and one[2] == other[2] and one[0].dtype == other[0].dtype


def _concatenated(
    factors: list[Factors], rank: int, extents: tuple[int, int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """A [E, rank, in] and B [E, out, rank] whose product is the sum of all s B A; zeros fill up the rank."""
    experts, out, in_ = extents
    missing = rank - sum(a.shape[1] for a, _, _ in factors)
    zero = torch.zeros((), dtype=dtype)
    a = [a.to(dtype) for a, _, _ in factors] + [zero.expand(experts, missing, in_)]
    b = [b.to(dtype) * scale for _, b, scale in factors] + [zero.expand(experts, out, missing)]
    return torch.cat(a, 1), torch.cat(b, 2)


def _factors(wrapper: Any, layout: Layout, adapter: str) -> Factors:
    a, b = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
    parts = PARTS[wrapper.parameter_name]
    out, in_ = layout.extent(parts[0])
    out *= len(parts)
    experts = layout.experts
    rank = a.shape[0] // experts
    if a.shape != (experts * rank, in_) or b.shape != (out, rank * experts):
        raise AdapterError(
            f"adapter {adapter!r} has A {list(a.shape)} and B {list(b.shape)} for {wrapper.parameter_name}, expected "
            f"A [{experts} * r, {in_}] and B [{out}, r * {experts}]: if PEFT 0.18 or older wrote it, `jitmoe convert` "
            f"writes it anew"
        )
    return a.view(experts, rank, in_), b.view(out, rank, experts).permute(2, 0, 1), wrapper.scaling[adapter]
