"""All experts of a model at once: pack them before the first call, or give them plain weights back."""

from typing import Any

from torch import nn

from jitmoe.hf.data_parallel import hide_packed
from jitmoe.hf.experts import prepare, unpack_module
from jitmoe.hf.peft_lora import IMPLEMENTATION
from jitmoe.hf.understand import is_experts


def pack(model: nn.Module) -> int:
    """Pack the experts now that would be packed at their first call, as ``torch.compile`` needs it.

    DistributedDataParallel around the model, or around a PeftModel of it, does not broadcast what is packed.

    Args:
        model: with ``experts_implementation="jitmoe"``; modules with another one are left alone.

    Returns:
        The number of experts modules that are packed.

    Raises:
        UnsupportedExpertsError: one is not understood; those before it are packed, and compute what they did.
    """
    modules = [module for module in _experts(model) if module.config._experts_implementation == IMPLEMENTATION]
    for module in modules:
        prepare(module)
    if modules:
        hide_packed(model)
    return len(modules)


def unpack(model: nn.Module) -> int:
    """Give the experts plain parameters again, bit for bit those that were packed; returns the number of modules."""
    modules = _experts(model)
    for module in modules:
        unpack_module(module)
    return len(modules)


def _experts(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if is_experts(module)]
