"""A tensor that stands for a weight of an experts module, while the memory that it has is the packed copy.

It has the weight's shape and dtype, is saved, loaded, copied and printed like it. Views of it stay packed, copying and
adding to it packs again, and everything else reads a plain copy of what it needs. No kernel but ours can multiply by it
without that, and it says so.
"""

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from jitmoe.errors import InputError, InputTypeError
from jitmoe.experts.quantized import Quantized
from jitmoe.hf import views
from jitmoe.hf.packed import Packed
from jitmoe.hf.rewrite import rewrite

aten = torch.ops.aten

MULTIPLIES = ("t", "transpose", "mm", "bmm", "addmm", "baddbmm", "addmv", "mv", "_grouped_mm", "grouped_mm_fallback")
"""Operators with which a forward without jitmoe reads a weight, unpacking in every call."""


class PackedWeight(Tensor):
    """A weight of an experts module, [E, ...] bfloat16, in packed memory; or some experts or projections of it.

    Attributes:
        packed: the memory.
        experts: numbers of the experts that this one shows; one number is a matrix without the first axis.
        parts: the projections that it shows.
    """

    packed: Packed
    experts: Sequence[int] | int
    parts: tuple[str, ...]

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, packed: Packed, experts: Sequence[int] | int | None = None, parts: tuple[str, ...] = ()) -> Any:
        """A tensor over ``packed``; by default all of it."""
        experts = range(packed.layout.experts) if experts is None else experts
        parts = parts or packed.parts
        lead = () if isinstance(experts, int) else (len(experts),)
        with torch.inference_mode(False):  # an inference tensor could not become a parameter
            made = Tensor._make_wrapper_subclass(
                cls, (*lead, *packed.layout.matrix_shape(parts)), dtype=torch.bfloat16, device=torch.device("cpu")
            )
        made.packed, made.experts, made.parts = packed, experts, parts
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Made by ``__new__``."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operator of torch on packed weights."""
        return _dispatch(func, args, kwargs or {})

    @property
    def whole(self) -> bool:
        """It shows all of its memory."""
        return self.experts == range(self.packed.layout.experts) and self.parts == self.packed.parts

    def unpack(self) -> Tensor:
        """A plain copy, contiguous and bit for bit what was packed; of quantised weights bfloat16(code * scale)."""
        single = isinstance(self.experts, int)
        read = self.packed.read([self.experts] if isinstance(self.experts, int) else self.experts, self.parts)
        return read[0] if single else read

    def quantized(self) -> dict[str, Quantized]:
        """Values and scales as the checkpoint had them, bit for bit, by projection: stacked [E, ...] as those are.

        Raises:
            InputError: they are bfloat16 and have no scales.
        """
        if isinstance(self.experts, int):
            found = self.packed.quantized([self.experts], self.parts)
            return {part: both[0] for part, both in found.items()}
        return self.packed.quantized(self.experts, self.parts)

    def shown(self, experts: Sequence[int] | int, parts: tuple[str, ...] | None = None) -> "PackedWeight":
        """Other experts, or other projections, of the same memory."""
        return PackedWeight(self.packed, experts, parts or self.parts)

    def contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
        """A plain copy: whoever asks for contiguous memory is going to read or save it."""
        self._warn_of_expansion()
        return self.unpack()

    def _warn_of_expansion(self) -> None:
        if self.packed.packing.quantized:
            warnings.warn(
                f"experts that are kept in {self.packed.packing.format.name} are written out as bfloat16: what is "
                f"saved is a bfloat16 model, with the values that this one computes with (adapters that PEFT saves are "
                f"not concerned)",
                stacklevel=3,
            )

    def data_ptr(self) -> int:
        """Refuse: there is no memory in the weight's own layout, and savers would write nothing.

        Raises:
            InputTypeError: always.
        """
        raise InputTypeError(
            f"{self.packed.name} is packed for jitmoe and has no address; take .contiguous() for a plain copy of it"
        )

    def untyped_storage(self) -> torch.UntypedStorage:
        """Of the packed memory: frameworks tell by its address which weights are tied."""
        return self.packed.tensors[self.parts[0]].untyped_storage()

    @property
    def data(self) -> Tensor:
        """The same weight, outside of autograd. Setting it packs the new values into the memory at hand."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if isinstance(value, PackedWeight) and value.packed is self.packed:
            return
        if value.dtype != torch.bfloat16 or value.device.type != "cpu":
            raise InputTypeError(
                f"{self.packed.name} is packed for jitmoe: bfloat16 on the CPU. It cannot become {value.dtype} on "
                f"{value.device}; jitmoe.hf.unpack(model) makes plain weights of it"
            )
        if value.shape != self.shape:
            raise InputError(f"{self.packed.name} has shape {list(self.shape)} and cannot take {list(value.shape)}")
        with torch.no_grad():
            self.copy_(value)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        kept = f" in {self.packed.packing.format.name}" if self.packed.packing.quantized else ""
        return (
            f"PackedWeight({self.packed.name}, shape={list(self.shape)}, dtype={self.dtype}, packed for jitmoe{kept})"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            copied: Tensor = PackedWeight(copy.deepcopy(self.packed, memo), self.experts, self.parts)
            if isinstance(self, nn.Parameter):
                copied = nn.Parameter(copied, self.requires_grad)
            copied.__dict__.update({k: copy.deepcopy(v, memo) for k, v in vars(self).items() if k not in vars(copied)})
            memo[id(self)] = copied
        found: Tensor = memo[id(self)]
        return found

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Files hold plain weights: whoever loads them may have no jitmoe."""
        self._warn_of_expansion()
        plain = self.unpack()
        if isinstance(self, nn.Parameter):
            plain = nn.Parameter(plain, self.requires_grad)
        return plain.__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def _dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run ``func``, of whose arguments at least one is packed.

    Raises:
        InputTypeError: it would write to a packed weight in a way that is not one of copy, add and subtract.
    """
    handler = HANDLERS.get(func)
    if handler is not None:
        done = handler(func, *args, **kwargs)
        if done is not NotImplemented:
            return done
    written = _written(func, args, kwargs)
    if written is not None:
        raise InputTypeError(
            f"{written.packed.name} is packed for jitmoe and frozen: {func} cannot write to it. "
            f"Write with copy_(), or make plain weights of it with jitmoe.hf.unpack(model)"
        )
    if func.overloadpacket.__name__ in MULTIPLIES:
        warnings.warn(
            f"{func.overloadpacket.__name__} unpacks experts that are packed for jitmoe, in every call: slow. "
            f"Choose model.set_experts_implementation('jitmoe') or make plain weights with jitmoe.hf.unpack(model)",
            stacklevel=2,
        )
    return func(*_plain(args), **_plain(kwargs))


def _plain(tree: Any) -> Any:
    return tree_map_only(PackedWeight, PackedWeight.unpack, tree)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> PackedWeight | None:
    """The packed weight that ``func`` writes to, by its schema."""
    for argument, given in zip(func._schema.arguments, args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(given, PackedWeight):
            return given
    for argument in func._schema.arguments:
        given = kwargs.get(argument.name)
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(given, PackedWeight):
            return given
    return None


def _clone(func: Any, weight: PackedWeight, **_: Any) -> Any:
    if not weight.whole:
        return weight.unpack()
    with torch.inference_mode(False):
        tensors = {part: tensor.clone() for part, tensor in weight.packed.tensors.items()}
    return PackedWeight(replace(weight.packed, tensors=tensors, writes=0))


def _to(func: Any, weight: PackedWeight, **kwargs: Any) -> Any:
    device = torch.device(kwargs.get("device") or "cpu")
    if device.type != "cpu":
        raise InputTypeError(
            f"{weight.packed.name} is packed for jitmoe and stays on the CPU, it cannot go to {device}; "
            f"jitmoe.hf.unpack(model) makes plain weights of it"
        )
    if kwargs.get("dtype") in (None, torch.bfloat16):
        return _clone(func, weight)
    return weight.unpack().to(kwargs["dtype"])


def _copy(func: Any, target: Any, source: Any, non_blocking: bool = False) -> Any:
    if not isinstance(target, PackedWeight):
        return func(target, source.unpack(), non_blocking)
    if source.shape != target.shape:
        source = source.expand(target.shape)
    if isinstance(source, PackedWeight) and source.whole and target.whole and target.packed.take(source.packed):
        return target
    return _rewrite(target, lambda expert, old: source[expert].to("cpu", old.dtype))


def _add(func: Any, target: Any, other: Any, **kwargs: Any) -> Any:
    if not isinstance(target, PackedWeight):
        return NotImplemented
    full = torch.as_tensor(other, device="cpu").expand(target.shape)
    return _rewrite(target, lambda expert, old: func(old, full[expert], **kwargs))


def _rewrite(target: PackedWeight, new_of: Callable[[int, Tensor], Tensor]) -> PackedWeight:
    if not target.whole:
        raise InputTypeError(f"a part of {target.packed.name}, packed for jitmoe, cannot be written: write all of it")
    rewrite(target.packed, new_of)
    return target


HANDLERS: dict[Any, Callable[..., Any]] = {
    aten.detach.default: views.same,
    aten.alias.default: views.same,
    aten.lift_fresh.default: views.same,
    aten.view.default: views.view,
    aten.clone.default: _clone,
    aten._to_copy.default: _to,
    aten.copy_.default: _copy,
    aten.add_.Tensor: _add,
    aten.sub_.Tensor: _add,
    aten.empty_like.default: views.empty_like,
    aten.zeros_like.default: views.empty_like,
    aten.ones_like.default: views.empty_like,
    aten.select.int: views.select,
    aten.index.Tensor: views.index,
    aten.slice.Tensor: views.slice_,
    aten.split.Tensor: views.split,
    aten.unbind.int: views.unbind,
}
