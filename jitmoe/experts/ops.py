"""The experts as one differentiable torch function."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.autograd.function import once_differentiable

from jitmoe.errors import WeightsChangedError
from jitmoe.experts import call as calls
from jitmoe.experts.call import Call
from jitmoe.experts.pack import version_of
from jitmoe.experts.supplies import supplies
from jitmoe.plan.projections import LORA_NAMES

Fields = dict[str, int]
"""Addresses and strides under the names of :data:`jitmoe.jit.abi.FIELDS`."""


def versions_of(base: Mapping[str, torch.Tensor]) -> tuple[int, ...]:
    """How often each of the packed weights has been written to."""
    return tuple(map(version_of, base.values()))


@contextmanager
def _memory_errors() -> Iterator[None]:
    """Where the system has no memory left, torch's allocator says RuntimeError and everything else MemoryError."""
    try:
        yield
    except RuntimeError as error:
        if "allocate memory" in str(error):
            raise MemoryError(str(error)) from error
        raise


class MoEFunction(torch.autograd.Function):
    """x [T, H], routing weights [T, K] and six LoRA tensors of any strides -> out [T, H].

    Saves its inputs and, unless the layer recomputes, gate and up before the activation in bfloat16 and the three
    low-rank products in float32 (4 I + 12 r bytes a row); everything is kept per call, so any order of backwards is
    right.
    """

    @staticmethod
    @_memory_errors()
    def forward(ctx: Any, call: Call, x: torch.Tensor, weights: torch.Tensor, *lora: torch.Tensor) -> torch.Tensor:
        """Run the experts; see the class."""
        out = empty(x.shape, x.dtype)
        operand = x.to(torch.bfloat16)
        saved = [empty(s.shape, getattr(torch, s.dtype)) for s in call.saved()]
        fields = _inputs(call, operand, lora) | _result(out) | _saved(call, saved)
        calls.run("forward", call, _row_weight(call, weights), fields, torch.get_num_threads())
        ctx.call = call
        ctx.save_for_backward(x, weights, *lora, *saved)
        return out

    @staticmethod
    @once_differentiable
    @_memory_errors()
    def backward(ctx: Any, out_grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x, of the routing weights and of the LoRA tensors that want one."""
        call: Call = ctx.call
        x, weights, *rest = ctx.saved_tensors
        if versions_of(call.base) != call.versions:
            raise WeightsChangedError(
                "base weights were loaded or written between forward and backward: run forward again"
            )
        _, wants_x, wants_weights, *wanted = ctx.needs_input_grad
        lora, saved = rest[: len(wanted)], rest[len(wanted) :]
        operand, out_operand = (t.to(torch.bfloat16).contiguous().resolve_neg() for t in (x, out_grad))
        x_grad = empty(x.shape, x.dtype) if wants_x else None
        weights_grad = supplies().zeros(weights.shape, torch.float32)
        lora_grads = _lora_gradients(call, lora) if any(wanted) else []
        fields = (
            _inputs(call, operand, lora)
            | ({} if x_grad is None else _result(x_grad))
            | _saved(call, saved)
            | {"out_grad": out_operand.data_ptr(), "weights_grad": weights_grad.data_ptr()}
        )
        for name, grad in zip(LORA_NAMES, lora_grads, strict=False):
            fields |= _view(_field(name) + "_grad", grad)
        calls.run("backward", call, _row_weight(call, weights), fields, torch.get_num_threads())
        results = [g.to(p.dtype) if w else None for g, p, w in zip(lora_grads, lora, wanted, strict=False)]
        return (
            None,
            x_grad,
            weights_grad.to(weights.dtype) if wants_weights else None,
            *(results or [None] * len(lora)),
        )


def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A contiguous tensor of any contents; large ones reuse the memory of those of former calls."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < supplies().block_bytes:
        return supplies().empty(shape, dtype)
    memory = torch.from_numpy(supplies().blocks.take(nbytes))
    # Detached, it is no view: torch refuses writes in place, as in ``y += shared``, to one that a Function returned.
    return memory.view(dtype).view(*shape).detach()


def _lora_gradients(call: Call, lora: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Float32 gradients for the kernel, which writes those of experts with rows: zero for the others."""
    if 2 * call.route.active.size < call.num_experts:
        # Fresh pages are zero, and most of them will not be touched.
        return [supplies().zeros(p.shape, torch.float32) for p in lora]
    grads = [empty(p.shape, torch.float32) for p in lora]
    for begin, end in call.route.absent(call.num_experts):
        for grad in grads:
            grad[begin:end].zero_()
    return grads


def _row_weight(call: Call, weights: torch.Tensor) -> npt.NDArray[np.float32]:
    """[S] routing weights in the order of the rows."""
    by_slot = weights.detach().float().resolve_neg().contiguous().numpy().reshape(-1)
    by_row: npt.NDArray[np.float32] = by_slot[call.route.row_slot]
    return by_row


def _inputs(call: Call, operand: torch.Tensor, lora: Sequence[torch.Tensor]) -> Fields:
    fields = {"x": operand.data_ptr()}
    fields |= {f"{name}.weights": packed.data_ptr() for name, packed in call.base.items()}
    fields |= {name.replace("_", "."): bias.data_ptr() for name, bias in call.biases.items()}
    for name, tensor in zip(LORA_NAMES, lora, strict=False):
        fields |= _view(_field(name), tensor)
    return fields


def _field(lora_name: str) -> str:
    """``gate.a`` for ``gate_lora_a``."""
    return lora_name.replace("_lora_", ".")


def _view(field: str, tensor: torch.Tensor) -> Fields:
    """A tensor [E, rows, columns] where it lies."""
    expert, row, column = tensor.stride()
    return {field: tensor.data_ptr(), f"{field}.expert": expert, f"{field}.row": row, f"{field}.column": column}


def _result(tensor: torch.Tensor) -> Fields:
    return {"result_float" if tensor.dtype == torch.float32 else "result": tensor.data_ptr()}


def _saved(call: Call, saved: Sequence[torch.Tensor]) -> Fields:
    return {s.name: tensor.data_ptr() for s, tensor in zip(call.saved(), saved, strict=True)}
