"""LoRA as the kernels read it and write its gradients: six views, whoever owns the tensors and however they lie.

The tensors come as six, A and B of gate, up and down, or as four: an A that gate and up share, B [E, 2, I, r] of both,
and A and B of down. PEFT keeps B with the expert innermost. The kernels can read and write that, but those steps that
take one expert after the other touch a cache line for each element of gate's and up's B: 6 ms a pass at W1, where
turning it takes 1.5 (2026-11-25). So where many experts have rows, these are turned first and their gradients last.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jitmoe.experts.call import Call
from jitmoe.experts.slices import lora_of
from jitmoe.experts.supplies import empty, supplies
from jitmoe.plan.parts import Part
from jitmoe.plan.projections import LORA_NAMES

FUSED = 4
"""Tensors of adapters in which gate and up are one."""

FUSED_NAMES = ("gate_up_lora_a", "gate_up_lora_b", "down_lora_a", "down_lora_b")
"""Their names in messages."""

FEW = 4
"""B is read where it lies if fewer than one in so many experts has rows."""


def rank_of(lora: Sequence[Tensor]) -> int:
    """r of the adapters; 0 where there are none."""
    return lora[0].shape[1] if lora else 0


def names_of(lora: Sequence[Tensor]) -> Sequence[str]:
    """Names of the tensors in messages."""
    return FUSED_NAMES if len(lora) == FUSED else LORA_NAMES[: len(lora)]


def operands(call: Call, lora: Sequence[Tensor]) -> Sequence[Tensor]:
    """A and B of gate, up and down, as a pass should read them."""
    return _six([_turned(tensor) if _turns(call, lora, place) else tensor for place, tensor in enumerate(lora)])


@dataclass(frozen=True, eq=False)
class Gradients:
    """Float32 memory for gradients of LoRA during backward.

    Attributes:
        lora: the tensors that they belong to.
        summands: for each of these lists of tensors of its shape. The gradient is the sum of their sums, each taken
            in its order: of an A that gate and up share there are two lists, else there is one.
    """

    lora: Sequence[Tensor]
    summands: list[list[list[Tensor]]]

    @classmethod
    def of(cls, call: Call, lora: Sequence[Tensor], parts: int) -> "Gradients":
        """Memory for the kernels of so many parts, which write gradients of experts with rows: zero for the others."""
        # What has no axis I is written by every part, and a shared A by gate and by up: each has memory of its own, or
        # two threads would add to one element.
        fused = len(lora) == FUSED
        counts = [[parts] * 2, [1], [1], [parts]] if fused else [[parts], [1], [parts], [1], [1], [parts]]
        found = [[[_memory(call, lora, at) for _ in range(n)] for n in counts[at]] for at in range(len(lora))]
        return cls(lora, found)

    def written(self, part: Part) -> Sequence[Tensor]:
        """The six that the kernel of a part writes."""
        if not self.summands:
            return []
        mine = [[tensors[part.index % len(tensors)] for tensors in lists] for lists in self.summands]
        if len(mine) == FUSED:
            (gate_a, up_a), (b,), (down_a,), (down_b,) = mine
            return lora_of([gate_a, b[:, 0], up_a, b[:, 1], down_a, down_b], part)
        return lora_of([tensor for (tensor,) in mine], part)

    def results(self) -> list[Tensor]:
        """The gradients in the layout and dtype of their owners, rounded once."""
        return [
            _result(total([total(tensors) for tensors in lists]), owner)
            for lists, owner in zip(self.summands, self.lora, strict=True)
        ]


def total(summands: Iterable[Tensor]) -> Tensor:
    """Their sum in this order, in the memory of the first."""
    first, *others = summands
    for summand in others:
        first.add_(summand)
    return first


def _six(lora: Sequence[Tensor]) -> Sequence[Tensor]:
    if len(lora) != FUSED:
        return lora
    a, b, down_a, down_b = lora
    return [a, b[:, 0], a, b[:, 1], down_a, down_b]


def _turns(call: Call, lora: Sequence[Tensor], place: int) -> bool:
    """Whether the tensor in this place is B of gate or up, its expert is innermost, and many experts have rows."""
    of_gate_up = place in ((1,) if len(lora) == FUSED else (1, 3))
    return of_gate_up and FEW * call.route.active.size >= call.num_experts and _expert_innermost(lora[place])


def _expert_innermost(tensor: Tensor) -> bool:
    return tensor.stride(0) == 1 and tensor.shape[0] > 1 and tensor.permute(_order(tensor)).is_contiguous()


def _order(tensor: Tensor) -> list[int]:
    """Axes from the outermost in memory to the innermost."""
    return sorted(range(tensor.dim()), key=tensor.stride, reverse=True)


def _turned(tensor: Tensor) -> Tensor:
    """The same values with the expert outermost, each expert's in one piece."""
    order = _order(tensor)
    flat = tensor.detach().permute(order).reshape(-1, tensor.shape[0])
    return _unflattened(flat.t().contiguous(), tensor, order)


def _unflattened(flat: Tensor, like: Tensor, order: list[int]) -> Tensor:
    """[E, ...] as the shape of ``like``, whose axes but the first lie in ``order`` in ``flat``."""
    outer = [0, *order[:-1]]
    inverse = [outer.index(axis) for axis in range(like.dim())]
    return flat.view([like.shape[axis] for axis in outer]).permute(inverse)


def _memory(call: Call, lora: Sequence[Tensor], place: int) -> Tensor:
    owner = lora[place]
    if 2 * call.route.active.size < call.num_experts:
        memory = supplies().zeros((owner.numel(),), torch.float32)  # fresh pages, and most of them stay untouched
        return _in_layout_of(owner, memory)
    memory = empty((owner.numel(),), torch.float32)
    if _turns(call, lora, place):
        grad = _unflattened(memory.view(owner.shape[0], -1), owner, _order(owner))
    else:
        grad = _in_layout_of(owner, memory)
    for begin, end in call.route.absent(call.num_experts):
        grad[begin:end].zero_()
    return grad


def _in_layout_of(tensor: Tensor, memory: Tensor) -> Tensor:
    """``memory`` with the shape of ``tensor`` and, where that fills its memory, its strides; else contiguous."""
    if tensor.is_contiguous():
        return memory.view(tensor.shape)
    like = torch.empty_like(tensor, device="meta", dtype=torch.float32)
    return memory.as_strided(like.shape, like.stride()).detach()


def _result(gradient: Tensor, owner: Tensor) -> Tensor:
    if _expert_innermost(owner) and gradient.stride() != owner.stride():
        order = _order(owner)
        flat = empty((owner.numel() // owner.shape[0], owner.shape[0]), torch.float32)
        flat.copy_(gradient.permute(0, *order[:-1]).reshape(owner.shape[0], -1).t())
        gradient = flat.view([owner.shape[axis] for axis in order]).permute(
            [order.index(a) for a in range(owner.dim())]
        )
    return gradient.detach().to(owner.dtype)  # torch refuses writes in place to views that a Function returned
