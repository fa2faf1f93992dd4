"""What a tensor of a call must be, checked early and once, in words."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from jitmoe.errors import InputError, InputTypeError

FLOATS = (torch.float32, torch.bfloat16)


def check_dense(name: str, tensor: Any, dtypes: tuple[torch.dtype, ...], last: int) -> None:
    """Refuse what is not a dense CPU tensor [..., last] of one of ``dtypes``."""
    check_plain(name, tensor)
    if tensor.dtype not in dtypes:
        allowed = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise InputTypeError(f"{name} must be {allowed}, got {str(tensor.dtype).removeprefix('torch.')}")
    if tensor.device.type != "cpu" or tensor.layout != torch.strided:
        raise InputError(f"{name} must be a dense CPU tensor, got device {tensor.device}, layout {tensor.layout}")
    if tensor.dim() < 1 or tensor.shape[-1] != last:
        raise InputError(f"{name} must have shape [..., {last}], got {list(tensor.shape)}")


def check_plain(name: str, tensor: Any) -> None:
    """Refuse what is no tensor, and tensors without memory of their own: a kernel gets addresses.

    What a compiler or torch.func wraps is not looked at: the passes look at the real tensors.

    Raises:
        InputTypeError: no tensor, or of a subclass, whose address may be none (DTensor, quantised tensors).
        InputError: nested, or its storage was freed.
    """
    kind = type(tensor)
    if not isinstance(tensor, Tensor):
        raise InputTypeError(f"{name} must be a torch.Tensor, got {kind.__name__}")
    if torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return
    if kind is not Tensor and kind is not torch.nn.Parameter:
        raise InputTypeError(
            f"{name} is a {kind.__module__}.{kind.__qualname__}, a subclass of torch.Tensor whose memory a kernel "
            "cannot read: pass a plain tensor (DTensor has to_local() and full_tensor(), quantised ones dequantize())"
        )
    if tensor.is_nested:
        raise InputError(f"{name} is a nested tensor; pass a dense one, one row for each token")
    if tensor.layout == torch.strided and not tensor._is_zerotensor() and _was_freed(tensor):
        raise InputError(f"{name} has {tensor.numel()} elements and no memory: its storage was freed, as FSDP does")


def _was_freed(tensor: Tensor) -> bool:
    # Asked first because it is quick. Behind a freed storage a view with an offset has an address too.
    if tensor.data_ptr() and not tensor.storage_offset():
        return False
    return tensor.device.type == "cpu" and tensor.numel() > 0 and not tensor.untyped_storage().nbytes()


def in_memory(names: Sequence[str], tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors with all their bits in memory: torch keeps a sign, or that all is zero, beside the data.

    Raises:
        InputTypeError: as of :func:`check_plain`.
        InputError: likewise.
    """
    for name, tensor in zip(names, tensors, strict=True):
        check_plain(name, tensor)
    return [tensor.clone() if tensor._is_zerotensor() else tensor.resolve_neg() for tensor in tensors]


def check_bias(name: str, bias: Tensor | None, shape: tuple[int, int]) -> Tensor:
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
    return bias.detach().to(torch.float32, copy=True).contiguous().resolve_neg()
