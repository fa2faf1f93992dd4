"""Forward and backward as functions of tensors: they make results, and name what goes to the kernels."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from jitmoe.config import MoEConfig
from jitmoe.errors import InputTypeError
from jitmoe.experts import call as calls
from jitmoe.experts.call import Call
from jitmoe.experts.inputs import FLOATS, in_memory
from jitmoe.experts.lora import Gradients, names_of, operands, rank_of, total
from jitmoe.experts.observer import PassName
from jitmoe.experts.slices import base_of, lora_of
from jitmoe.experts.supplies import empty, supplies
from jitmoe.experts.teams import by_part
from jitmoe.experts.workspace import memory_errors
from jitmoe.plan.parts import Part, parts_of
from jitmoe.plan.projections import LORA_NAMES, NAMES
from jitmoe.plan.scratch import Saved, saved_tensors
from jitmoe.plan.teams import Team

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
    if not saves or config.recompute:
        return ()
    return tuple(
        replace(s, name=f"{s.name}{part.suffix}")
        for part in parts_of(config)
        for s in saved_tensors(part.config.intermediate_size, slots, rank)
    )


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
        (x, topk_ids, weights), base, lora = _in_memory(config, x, topk_ids, weights, base, lora)
        pieces = _pieces(config, isa, topk_ids, base, lora, scale)
        call = pieces[0].call
        outs = _summands(pieces, x.shape, x.dtype)
        wanted = saved_of(spec, topk_ids.numel(), rank_of(lora), saves)
        saved = [empty(s.shape, getattr(torch, s.dtype)) for s in wanted]
        if call.rows < topk_ids.numel():  # what skipped slots leave at the end is an output too
            for tensor in saved:
                tensor.view(-1)[tensor.numel() // topk_ids.numel() * call.rows :].zero_()
        operand = _operand(x)
        for piece, out in zip(pieces, outs, strict=True):
            piece.fields |= {"x": operand.data_ptr()} | _result(out) | _saved(piece.part, saved)
        _run("forward", pieces, calls.row_weights(call, weights))
        return [_rounded(outs, x.dtype), *saved]


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
        (x, topk_ids, weights), base, lora = _in_memory(config, x, topk_ids, weights, base, lora)
        out_grad, *saved = in_memory(["the gradient of out", *["a saved tensor"] * len(saved)], [out_grad, *saved])
        _check_dtypes(out_grad, x, lora, saved, saved_of(spec, 0, rank_of(lora), True))
        pieces = _pieces(config, isa, topk_ids, base, lora, scale)
        call = pieces[0].call
        operand, out_operand = _operand(x), _operand(out_grad)
        x_grads = _summands(pieces, x.shape, x.dtype) if wants_x else []
        weights_grads = [supplies().zeros(weights.shape, torch.float32) for _ in pieces]
        gradients = Gradients.of(call, lora if wants_lora else [], len(pieces))
        saved = [tensor.contiguous() for tensor in saved]  # hooks of saved tensors may hand back other strides
        for piece, weights_grad in zip(pieces, weights_grads, strict=True):
            piece.fields |= {"x": operand.data_ptr(), "out_grad": out_operand.data_ptr()}
            piece.fields |= {"weights_grad": weights_grad.data_ptr()} | _saved(piece.part, saved)
            for name, grad in zip(LORA_NAMES, gradients.written(piece.part), strict=False):
                piece.fields |= _view(_field(name) + "_grad", grad)
        for piece, x_grad in zip(pieces, x_grads, strict=False):
            piece.fields |= _result(x_grad)
        _run("backward", pieces, calls.row_weights(call, weights))
        return [
            _rounded(x_grads, x.dtype) if wants_x else x.new_empty(0),
            _rounded(weights_grads, weights.dtype) if wants_weights else x.new_empty(0),
            *gradients.results(),
        ]


@dataclass(eq=False)
class _Piece:
    """What the kernels of a part are given.

    Attributes:
        part: the columns of I.
        call: routed.
        held: tensors of this pass alone, kept while the kernels read them.
        fields: so far.
    """

    part: Part
    call: Call
    held: list[Tensor]
    fields: Fields


def _pieces(
    config: MoEConfig, isa: str, topk_ids: Tensor, base: Sequence[Tensor], lora: Sequence[Tensor], scale: float
) -> list[_Piece]:
    """One for each part, with the fields of its base and LoRA."""
    parts, routed = parts_of(config), calls.new_calls(config, isa, topk_ids, lora, scale)
    six = operands(routed[0], lora)
    pieces = []
    for part, call in zip(parts, routed, strict=True):
        mine, views = base_of(base, part, len(parts)), lora_of(six, part)
        pieces.append(_Piece(part, call, [*mine, *views], _parameters(mine, views)))
    return pieces


def _run(pass_name: PassName, pieces: Sequence[_Piece], row_weight: npt.NDArray[np.float32]) -> None:
    def run(part: Part, team: Team) -> None:
        piece = pieces[part.index]
        node = team.node.number if team.node else None
        calls.run(pass_name, piece.call, row_weight, piece.fields, team.threads, node)

    by_part([piece.part for piece in pieces], torch.get_num_threads(), run)


def _summands(pieces: Sequence[_Piece], shape: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    """Where the parts write what is added, as float32; the only part writes the result itself, rounded."""
    return [empty(shape, dtype if len(pieces) == 1 else torch.float32) for _ in pieces]


def _rounded(summands: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The sum in the order of the parts, rounded once."""
    found = total(summands)
    return found if found.dtype == dtype else empty(found.shape, dtype).copy_(found)


def _in_memory(
    config: MoEConfig, x: Tensor, topk_ids: Tensor, weights: Tensor, base: Sequence[Tensor], lora: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """All inputs as plain tensors with memory; nothing else gets to :meth:`torch.Tensor.data_ptr`."""
    packed = [f"packed {name}" for part in parts_of(config) for name in part.names()]
    base_names = [*packed, *(f"bias of {name}" for name in NAMES)]
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


def _parameters(base: Sequence[Tensor], lora: Sequence[Tensor]) -> Fields:
    names = [f"{name}.{field}" for field in ("weights", "bias") for name in NAMES]
    fields = {name: tensor.data_ptr() for name, tensor in zip(names, base, strict=False)}
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


def _saved(part: Part, saved: Sequence[Tensor]) -> Fields:
    """Those of ``saved`` that are the part's, which come part after part."""
    names = [s.name for s in saved_tensors(part.end - part.first, 0, part.config.lora_rank)]
    mine = saved[len(names) * part.index : len(names) * (part.index + 1)]
    return {name: tensor.data_ptr() for name, tensor in zip(names, mine, strict=False)}
