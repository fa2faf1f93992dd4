"""What a tensor of a call must be, checked early and once, in words."""

from typing import Any

import torch

from jitmoe.errors import InputError, InputTypeError

FLOATS = (torch.float32, torch.bfloat16)


def check_dense(name: str, tensor: Any, dtypes: tuple[torch.dtype, ...], last: int) -> None:
    """Refuse what is not a dense CPU tensor [..., last] of one of ``dtypes``."""
    if not isinstance(tensor, torch.Tensor):
        raise InputTypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        allowed = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise InputTypeError(f"{name} must be {allowed}, got {str(tensor.dtype).removeprefix('torch.')}")
    if tensor.device.type != "cpu" or tensor.layout != torch.strided:
        raise InputError(f"{name} must be a dense CPU tensor, got device {tensor.device}, layout {tensor.layout}")
    if tensor.dim() < 1 or tensor.shape[-1] != last:
        raise InputError(f"{name} must have shape [..., {last}], got {list(tensor.shape)}")


def check_bias(name: str, bias: torch.Tensor | None, shape: tuple[int, int]) -> torch.Tensor:
    """The bias as float32 [E, out], a copy of its own.

    Raises:
        InputError: it is missing, or has the wrong shape or device.
        InputTypeError: it is neither bfloat16 nor float32.
    """
    if bias is None:
        raise InputError(f"{name} is missing: the config has bias=True, so all three projections have one")
    check_dense(name, bias, FLOATS, shape[1])
    if tuple(bias.shape) != shape:
        raise InputError(f"{name} must have shape {list(shape)}, got {list(bias.shape)}")
    return bias.detach().to(torch.float32, copy=True).contiguous()
