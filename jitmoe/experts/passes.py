"""Forward and backward as functions of tensors: they make results, and name what goes to the kernels."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache

import torch
from torch import Tensor

from jitmoe.config import MoEConfig
from jitmoe.errors import InputTypeError
from jitmoe.experts import call as calls
from jitmoe.experts.inputs import FLOATS, in_memory
from jitmoe.experts.lora import Gradients, names_of, operands, rank_of
from jitmoe.experts.supplies import empty, supplies
from jitmoe.experts.workspace import memory_errors
from jitmoe.plan.projections import LORA_NAMES, NAMES
from jitmoe.plan.scratch import Saved, saved_tensors

Fields = dict[str, int]
"""Addresses and strides under the names of :data:`jitmoe.jit.abi.FIELDS`."""


@lru_cache(maxsize=256)
def spec_of(config: MoEConfig, isa: str) -> str:
    """What a call must know beside its tensors, as text for the operators."""
    return json.dumps({"isa": isa, "config": asdict(config)}, sort_keys=True)


@lru_cache(maxsize=256)
def read_spec(spec: str, rank: int) -> tuple[MoEConfig, str]:
    """The config of :func:`spec_of` with LoRA of this rank, and the instruction set."""
    content = json.loads(spec)
    return MoEConfig(**content["config"] | {"lora_rank": rank}), content["isa"]


def saved_of(spec: str, slots: int, rank: int, saves: bool) -> tuple[Saved, ...]:
    """What forward leaves for backward: sizes follow from T K, never from the routing at hand."""
    config, _ = read_spec(spec, 0)
    return saved_tensors(config.intermediate_size, slots, rank) if saves and not config.recompute else ()


def forward(
    x: Tensor,
    topk_ids: Tensor,
    weights: Tensor,
    base: list[Tensor],
    lora: list[Tensor],
    spec: str,
    scale: float,
    saves: bool,
) -> list[Tensor]:
    """Run forward: x [T, H], topk_ids and weights [T, K] -> out [T, H] and what backward wants.

    Unless the layer recomputes these are gate and up before the activation in bfloat16 and the three low-rank products
    in float32: 4 I + 12 r bytes a slot.
    """
    config, isa = read_spec(spec, rank_of(lora))
    with memory_errors():
        (x, topk_ids, weights), base, lora = _in_memory(x, topk_ids, weights, base, lora)
        call = calls.new_call(config, isa, topk_ids, lora, scale)
        out = empty(x.shape, x.dtype)
        wanted = saved_of(spec, topk_ids.numel(), rank_of(lora), saves)
        saved = [empty(s.shape, getattr(torch, s.dtype)) for s in wanted]
        if call.rows < topk_ids.numel():  # what skipped slots leave at the end is an output too
            for tensor in saved:
                tensor.view(-1)[tensor.numel() // topk_ids.numel() * call.rows :].zero_()
        operand, six = _operand(x), operands(call, lora)
        fields = _inputs(operand, base, six) | _result(out) | _saved(config, saved)
        calls.run("forward", call, calls.row_weights(call, weights), fields, torch.get_num_threads())
    return [out, *saved]


def backward(
    out_grad: Tensor,
    x: Tensor,
    topk_ids: Tensor,
    weights: Tensor,
    base: list[Tensor],
    lora: list[Tensor],
    saved: list[Tensor],
    spec: str,
    scale: float,
    wants: list[bool],
) -> list[Tensor]:
    """Run backward: the gradients of x, of the routing weights and of LoRA, each where ``wants`` says so, else empty.

    ``wants`` has three entries: of x, of the routing weights, of all LoRA tensors.
    """
    config, isa = read_spec(spec, rank_of(lora))
    wants_x, wants_weights, wants_lora = wants
    with memory_errors():
        (x, topk_ids, weights), base, lora = _in_memory(x, topk_ids, weights, base, lora)
        out_grad, *saved = in_memory(["the gradient of out", *["a saved tensor"] * len(saved)], [out_grad, *saved])
        _check_dtypes(out_grad, x, lora, saved, saved_of(spec, 0, rank_of(lora), True))
        call = calls.new_call(config, isa, topk_ids, lora, scale)
        operand, out_operand, six = _operand(x), _operand(out_grad), operands(call, lora)
        x_grad = empty(x.shape, x.dtype) if wants_x else None
        weights_grad = supplies().zeros(weights.shape, torch.float32)
        gradients = Gradients.of(call, lora if wants_lora else [])
        saved = [tensor.contiguous() for tensor in saved]  # hooks of saved tensors may hand back other strides
        fields = (
            _inputs(operand, base, six)
            | ({} if x_grad is None else _result(x_grad))
            | _saved(config, saved)
            | {"out_grad": out_operand.data_ptr(), "weights_grad": weights_grad.data_ptr()}
        )
        for name, grad in zip(LORA_NAMES, gradients.written(), strict=False):
            fields |= _view(_field(name) + "_grad", grad)
        calls.run("backward", call, calls.row_weights(call, weights), fields, torch.get_num_threads())
        return [
            x.new_empty(0) if x_grad is None else x_grad,
            weights_grad.to(weights.dtype) if wants_weights else x.new_empty(0),
            *gradients.results(),
        ]


def _in_memory(
    x: Tensor, topk_ids: Tensor, weights: Tensor, base: Sequence[Tensor], lora: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """All inputs as plain tensors with memory; nothing else gets to :meth:`torch.Tensor.data_ptr`."""
    base_names = [f"{kind} {name}" for kind in ("packed", "bias of") for name in NAMES]
    return (
        in_memory(("x", "topk_ids", "weights"), (x, topk_ids, weights)),
        in_memory(base_names[: len(base)], base),
        in_memory(names_of(lora), lora),
    )


def _check_dtypes(
    out_grad: Tensor, x: Tensor, lora: Sequence[Tensor], saved: Sequence[Tensor], planned: Sequence[Saved]
) -> None:
    """Refuse what hooks of saved tensors gave a compiled graph back in another dtype; others are cast before."""
    wanted = [(x, out_grad.dtype), *((tensor, lora[0].dtype) for tensor in lora)]
    wanted += [(tensor, getattr(torch, s.dtype)) for tensor, s in zip(saved, planned, strict=False)]
    for tensor, dtype in wanted:
        if tensor.dtype != dtype or dtype not in FLOATS:
            raise InputTypeError(f"a tensor that was saved as {dtype} came back as {tensor.dtype} for backward")


def _operand(tensor: Tensor) -> Tensor:
    return tensor.to(torch.bfloat16).contiguous()


def _inputs(operand: Tensor, base: Sequence[Tensor], lora: Sequence[Tensor]) -> Fields:
    fields = {"x": operand.data_ptr()}
    names = [f"{name}.{field}" for field in ("weights", "bias") for name in NAMES]
    fields |= {name: tensor.data_ptr() for name, tensor in zip(names, base, strict=False)}
    for name, tensor in zip(LORA_NAMES, lora, strict=False):
        fields |= _view(_field(name), tensor)
    return fields


def _field(lora_name: str) -> str:
    """``gate.a`` for ``gate_lora_a``."""
    return lora_name.replace("_lora_", ".")


def _view(field: str, tensor: Tensor) -> Fields:
    """A tensor [E, rows, columns] where it lies."""
    expert, row, column = tensor.stride()
    return {field: tensor.data_ptr(), f"{field}.expert": expert, f"{field}.row": row, f"{field}.column": column}


def _result(tensor: Tensor) -> Fields:
    return {"result_float" if tensor.dtype == torch.float32 else "result": tensor.data_ptr()}


def _saved(config: MoEConfig, saved: Sequence[Tensor]) -> Fields:
    names = (s.name for s in saved_tensors(config.intermediate_size, 0, config.lora_rank))
    return {name: tensor.data_ptr() for name, tensor in zip(names, saved, strict=False)}
