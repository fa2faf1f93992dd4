"""Operators of torch on packed weights that give views of them, or need none of their values."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def same(func: Any, weight: Any, *_: Any, **__: Any) -> Any:
    """Of detach and the like."""
    return weight.shown(weight.experts)


def view(func: Any, weight: Any, size: Sequence[int]) -> Any:
    """Of the shape that it has, as DTensor asks for it."""
    return same(func, weight) if tuple(size) == tuple(weight.shape) else NotImplemented


def empty_like(func: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
    """Of empty_like and the like: plain."""
    kwargs.setdefault("device", "cpu")
    return func(torch.empty(weight.shape, dtype=weight.dtype, device="meta"), *args, **kwargs)


def select(func: Any, weight: Any, dim: int, index: int) -> Any:
    """Of one expert, as a view."""
    if dim not in (0, -weight.dim()) or isinstance(weight.experts, int):
        return NotImplemented
    return weight.shown(weight.experts[int(index)])


def index(func: Any, weight: Any, indices: list[Tensor | None]) -> Any:
    """Of integers along the experts: unpack these alone."""
    if len(indices) != 1 or indices[0] is None or indices[0].dtype == torch.bool or isinstance(weight.experts, int):
        return NotImplemented
    experts = weight.experts
    chosen = [experts[i] for i in indices[0].flatten().tolist()]
    read = weight.packed.read(chosen, weight.parts)
    return read.view(*indices[0].shape, *read.shape[1:]) if indices[0].dim() else read[0]


def slice_(func: Any, weight: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    """Of some experts, as a view."""
    if isinstance(weight.experts, int):
        return NotImplemented
    if dim in (0, -weight.dim()):
        return weight.shown(weight.experts[slice(start, end, step)])
    whole = slice(start, end, step).indices(weight.shape[dim]) == (0, weight.shape[dim], 1)
    return same(func, weight) if whole else NotImplemented


def split(func: Any, weight: Any, size: int, dim: int = 0) -> Any:
    """Of gate and up where they follow each other, and of the experts; as views."""
    layout, dim = weight.packed.layout, dim % weight.dim()
    if isinstance(weight.experts, int):
        return NotImplemented
    if dim == 0:
        starts = range(0, len(weight.experts), size)
        return [weight.shown(weight.experts[s : s + size]) for s in starts]
    rows = 2 if layout.transposed else 1
    if dim == rows and size == layout.intermediate and weight.parts == ("gate", "up") and not layout.interleaved:
        return [weight.shown(weight.experts, (part,)) for part in weight.parts]
    return NotImplemented


def unbind(func: Any, weight: Any, dim: int = 0) -> Any:
    """Of all experts, as views."""
    if dim != 0 or isinstance(weight.experts, int):
        return NotImplemented
    return [weight.shown(expert) for expert in weight.experts]
