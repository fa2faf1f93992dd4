"""The adapters of all layers of a model alone: saved, loaded, switched off, made trainable; the base stays packed."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from jitmoe.errors import InputError
from jitmoe.experts.layer import MoELayer
from jitmoe.plan.projections import LORA_NAMES


def layers_of(model: nn.Module) -> dict[str, MoELayer]:
    """The layers inside ``model``, or it itself, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoELayer)}


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The LoRA parameters of every :class:`MoELayer` in ``model``, under the keys of ``model.state_dict()``.

    ``model.state_dict()`` also unpacks the whole base. The tensors are those of the parameters, detached, no copies.
    """
    return {key: parameter.detach() for key, parameter in _parameters(model).items()}


def load_lora_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load what :func:`lora_state_dict` gave: all of it, or after an error nothing.

    Args:
        model: with layers of the same names and sizes.
        state: one tensor for each LoRA parameter; values are cast to the dtype of the parameter.

    Raises:
        InputError: a key is missing or unknown, or a shape is wrong; names the keys.
    """
    parameters = _parameters(model)
    missing, unknown = sorted(parameters.keys() - state.keys()), sorted(state.keys() - parameters.keys())
    if missing or unknown:
        raise InputError(
            f"these adapters are not those of the model: missing {', '.join(missing) or 'none'}; "
            f"unknown {', '.join(unknown) or 'none'}"
        )
    for key, parameter in parameters.items():
        if state[key].shape != parameter.shape:
            raise InputError(f"{key} must have shape {list(parameter.shape)}, got {list(state[key].shape)}")
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(state[key])


def train_lora(model: nn.Module) -> None:
    """Let the LoRA parameters of every :class:`MoELayer` in ``model`` want gradients, after something froze them."""
    for parameter in _parameters(model).values():
        parameter.requires_grad_(True)


@contextmanager
def lora_disabled(model: nn.Module) -> Iterator[None]:
    """Every :class:`MoELayer` in ``model`` computes its base alone until the block ends."""
    before = {layer: layer.lora_enabled for layer in layers_of(model).values()}
    for layer in before:
        layer.lora_enabled = False
    try:
        yield
    finally:
        for layer, enabled in before.items():
            layer.lora_enabled = enabled


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        f"{prefix}.{name}" if prefix else name: layer.get_parameter(name)
        for prefix, layer in layers_of(model).items()
        for name in (LORA_NAMES if layer.config.lora_rank else ())
    }
