"""What runs on jitmoe in a model, and what does not and why."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from jitmoe.errors import UnsupportedExpertsError
from jitmoe.formats import BFLOAT16
from jitmoe.hf.experts import PREPARED, Prepared, packing_of
from jitmoe.hf.layout import PARTS
from jitmoe.hf.packed import packing_words
from jitmoe.hf.peft_lora import IMPLEMENTATION
from jitmoe.hf.understand import class_name, is_experts, understand
from jitmoe.hf.weight import PackedWeight
from jitmoe.jit.capability import describe, resolve_isa


def report(model: nn.Module) -> str:
    """Print a line for each experts module: kernel, instruction set, format and adapters, or why it is not on jitmoe.

    Returns:
        What was printed.
    """
    lines = list(_lines(model)) or [f"{type(model).__name__} has no experts modules that transformers knows"]
    text = "\n".join(lines)
    print(text)
    return text


def _lines(model: nn.Module) -> Iterator[str]:
    wrappers = _wrappers(model)
    for name, module in model.named_modules():
        looks_like = class_name(module).endswith("Experts") and not isinstance(module, nn.ModuleList)
        if is_experts(module) or looks_like:
            yield f"{name}: {_state(module, wrappers.get(id(module), []))}"


def _state(module: Any, wrappers: list[Any]) -> str:
    chosen = getattr(getattr(module, "config", None), "_experts_implementation", None)
    try:
        understood = understand(module)
    except UnsupportedExpertsError as error:
        return f"NOT on jitmoe: {error}"
    if chosen != IMPLEMENTATION:
        return f"NOT on jitmoe: its experts implementation is {chosen!r}; call set_experts_implementation('jitmoe')"
    layout = understood.layout
    sizes = f"{layout.experts} experts {layout.hidden}x{layout.intermediate}, {understood.activation}"
    sizes += ", biases" if understood.bias else ""
    prepared: Prepared | None = module.__dict__.get(PREPARED)
    isa = resolve_isa(understood.config().requested_isa) if prepared is None else prepared.base.isa
    state = f"{describe(isa)}, {_packed(module)}"
    return f"jitmoe, {sizes}, {state}, {_adapters(wrappers)}"


def _packed(module: Any) -> str:
    """The format, and the bytes that it takes beside bfloat16."""
    weights = [module._parameters[name] for name in PARTS]
    memory = [weight.packed for weight in weights if isinstance(weight, PackedWeight)]
    if len(memory) < len(weights):
        return "packed at the first call"
    packing = packing_of(module, memory)
    if not packing.quantized:
        return "packed bfloat16"
    layout = memory[0].layout
    plain = sum(layout.experts * BFLOAT16.packed_bytes(*layout.extent(part)) for one in memory for part in one.parts)
    return f"packed {packing_words(packing)}, {sum(one.nbytes for one in memory) / plain:.2f} of bfloat16"


def _adapters(wrappers: list[Any]) -> str:
    if not wrappers:
        return "no adapters"
    words = []
    for wrapper in wrappers:
        for adapter, a in wrapper.lora_A.items():
            on = adapter in wrapper.active_adapters and not wrapper.disable_adapters
            state = "merged" if adapter in wrapper.merged_adapters else "active" if on else "inactive"
            dtype = str(a.weight.dtype).removeprefix("torch.")
            words.append(f"{wrapper.parameter_name}[{adapter}] rank {wrapper.r[adapter]} {dtype} {state}")
    missing = [name for name in PARTS if name not in {wrapper.parameter_name for wrapper in wrappers}]
    words += [f"no adapter on {name}" for name in missing]
    return "; ".join(words)


def _wrappers(model: nn.Module) -> dict[int, list[Any]]:
    """PEFT's wrappers of parameters, by the identity of the module whose parameters they are."""
    found: dict[int, list[Any]] = {}
    for module in model.modules():
        if hasattr(module, "parameter_name") and hasattr(module, "lora_A"):
            found.setdefault(id(module.get_base_layer()), []).append(module)  # type: ignore[operator]
    return found
