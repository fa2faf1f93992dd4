"""The experts as a function: packed base weights, and adapters that somebody else owns."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from jitmoe.config import MoEConfig
from jitmoe.errors import InputError, InputTypeError
from jitmoe.experts import ops
from jitmoe.experts.homes import check_homes, prefer_home
from jitmoe.experts.inputs import FLOATS, check_bias, check_dense, check_plain
from jitmoe.experts.lora import FUSED_NAMES, names_of
from jitmoe.experts.pack import PackedExperts, empty_packed, pack_parts
from jitmoe.experts.passes import spec_of
from jitmoe.experts.quantized import ExpertSource
from jitmoe.experts.seal import Seal
from jitmoe.experts.slices import extent_of
from jitmoe.jit import kernels
from jitmoe.jit.capability import resolve_isa
from jitmoe.memory.budget import check_call, check_layer
from jitmoe.plan.parts import parts_of
from jitmoe.plan.projections import Projection, lora_shapes, projections
from jitmoe.plan.shapes import plan_kernels


@dataclass(frozen=True, eq=False)
class Base:
    """The frozen side of a layer's experts, made by :func:`pack_base`.

    Attributes:
        config: sizes and options; its LoRA fields do not count, adapters say their own.
        isa: instruction set of the kernels.
        spec: both as text, for the operators.
        packed: int16 [E, packed items] of gate, up and down under these names; with ``config.tensor_parallel`` above 1
            of each part, under gate_0, up_0, down_0, gate_1 and so on.
        biases: float32 gate_bias, up_bias [E, I] and down_bias [E, H]; none without ``config.bias``.
        seal: notices writes to ``packed``.
    """

    config: MoEConfig
    isa: str
    spec: str
    packed: Mapping[str, Tensor]
    biases: Mapping[str, Tensor]
    seal: Seal

    def check_forms(self) -> None:
        """Look that the packed tensors are those of :func:`pack_base` in shape, dtype and strides.

        Raises:
            WeightsChangedError: another one was put in the place of one; names the projection.
        """
        for name, tensor in self.packed.items():
            self.seal.check_form(name, tensor)

    def check_seal(self) -> None:
        """Look that nobody wrote to the packed weights.

        Raises:
            WeightsChangedError: somebody did; names the projection.
        """
        for name, tensor in self.packed.items():
            self.seal.check(name, tensor)


@dataclass(frozen=True, eq=False)
class Adapters:
    """LoRA of all experts, as tensors that may be views of others: any strides, read where they lie in every call.

    E experts, H hidden, I intermediate, r rank; float32 or bfloat16, all alike. ``gate_a`` and ``up_a`` may be one
    tensor: its low-rank product is computed once, and its gradient is the sum.

    Attributes:
        gate_a: [E, r, H].
        gate_b: [E, I, r].
        up_a: [E, r, H].
        up_b: [E, I, r].
        down_a: [E, r, I].
        down_b: [E, H, r].
        scale: s, the factor of B A.
    """

    gate_a: Tensor
    gate_b: Tensor
    up_a: Tensor
    up_b: Tensor
    down_a: Tensor
    down_b: Tensor
    scale: float

    def tensors(self) -> list[Tensor]:
        """The six, in the order of the operators."""
        return [self.gate_a, self.gate_b, self.up_a, self.up_b, self.down_a, self.down_b]


@dataclass(frozen=True, eq=False)
class FusedAdapters:
    """LoRA of gate and up together and of down, as for a fused ``gate_up_proj``: any strides, as in :class:`Adapters`.

    Attributes:
        gate_up_a: [E, r, H], the A of both.
        gate_up_b: [E, 2, I, r], B of gate and of up: a view, also where rows of the two take turns.
        down_a: [E, r, I].
        down_b: [E, H, r].
        scale: s, the factor of B A.
    """

    gate_up_a: Tensor
    gate_up_b: Tensor
    down_a: Tensor
    down_b: Tensor
    scale: float

    def tensors(self) -> list[Tensor]:
        """The four, in the order of the operators."""
        return [self.gate_up_a, self.gate_up_b, self.down_a, self.down_b]


def pack_base(
    config: MoEConfig,
    gate_proj: ExpertSource | PackedExperts,
    up_proj: ExpertSource | PackedExperts,
    down_proj: ExpertSource | PackedExperts,
    *,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Base:
    """Pack base weights, expert by expert, into the only copy that calls need.

    Args:
        config: sizes and options.
        gate_proj: [E, I, H] as ``config.weight_format`` has it, bfloat16 or
            :class:`~jitmoe.experts.quantized.Quantized`; a stacked one, a sequence of E matrices, or a function from an
            expert's number to its matrix (see :data:`~jitmoe.experts.quantized.ExpertSource`).
        up_proj: [E, I, H], likewise.
        down_proj: [E, H, I], likewise.
        gate_bias: bfloat16 or float32 [E, I], with ``config.bias`` alone.
        up_bias: likewise.
        down_bias: bfloat16 or float32 [E, H], likewise.

    Raises:
        InputError: a weight or bias has the wrong shape or device, or is missing.
        InputTypeError: a base weight is not of the config's format, or a bias no float.
        IsaError: ``config.isa`` names a set that this machine cannot execute.
        BudgetError: weights and parameters take more than ``config.memory_budget``.
    """
    isa = resolve_isa(config.requested_isa)
    check_layer(config)
    any_kernels = kernels.load(plan_kernels(config, isa).shapes[-1])  # packing is the same in all of them
    found: dict[str, Tensor] = {}
    biases: dict[str, Tensor] = {}
    parts = parts_of(config)
    sources = (gate_proj, up_proj, down_proj)
    given = (gate_bias, up_bias, down_bias)
    for projection, source, bias in zip(_projections(config), sources, given, strict=True):
        if isinstance(source, PackedExperts):
            tensors = source.tensors
        else:
            extents = [extent_of(projection, part) for part in parts]
            tensors = [empty_packed(config.num_experts, *extent, config.packing) for extent in extents]
            for part, tensor in zip(parts, tensors, strict=True):
                prefer_home(tensor, part, len(parts))
            pack_parts(any_kernels, projection.base_name, source, tensors, projection, parts, config.packing)
        found |= {f"{projection.name}{part.suffix}": tensor for part, tensor in zip(parts, tensors, strict=True)}
        if config.bias:
            wanted = (config.num_experts, projection.out)
            biases[projection.bias_name] = check_bias(projection.bias_name, bias, wanted)
        elif bias is not None:
            raise InputError(f"{projection.bias_name} is given, and the config has no biases: set bias=True in it")
    packed = {name: found[name] for part in parts for name in part.names()}
    check_homes(config, packed)
    seal = Seal()
    for name, tensor in packed.items():
        seal.close(name, tensor)
    return Base(config, isa, spec_of(config, isa), packed, biases, seal)


def moe_experts(
    x: Tensor, topk_ids: Tensor, weights: Tensor, base: Base, adapters: Adapters | FusedAdapters | None = None
) -> Tensor:
    """Apply the experts: the sum over a token's slots of weight * down(activation(gate(x), up(x))).

    Each projection is v W^T + b + s (v A^T) B^T (LoRA, Hu et al. 2021). Gradients of adapters have the strides and the
    dtype of the tensors that they belong to.

    Args:
        x: [..., H] bfloat16 or float32 (rounded to bfloat16 on entry).
        topk_ids: [..., K] int64 or int32, expert of each slot.
        weights: [..., K] float32 or bfloat16, routing weight of each slot.
        base: of :func:`pack_base`.
        adapters: LoRA, or None for the base alone.

    Returns:
        [..., H] in x's dtype.

    Raises:
        InputError: wrong shape, device or expert id; names the tensor, or the token and slot.
        InputTypeError: wrong dtype.
        WeightsChangedError: the packed weights were written to.
        BudgetError: the call could take more than ``config.memory_budget``.
    """
    config = base.config
    hidden, top_k = config.hidden_size, config.top_k
    check_dense("x", x, FLOATS, hidden)
    check_dense("topk_ids", topk_ids, (torch.int64, torch.int32), top_k)
    check_dense("weights", weights, FLOATS, top_k)
    lead = x.shape[:-1]
    for name, tensor in (("topk_ids", topk_ids), ("weights", weights)):
        if tensor.shape[:-1] != lead:
            raise InputError(f"{name} must have shape {[*lead, top_k]} to go with x, got {list(tensor.shape)}")
    lora = _checked(config, adapters) if adapters is not None else []
    saves = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weights, *lora))
    _check_budget(base, x, lora, saves)
    base.check_forms()
    if not torch.compiler.is_compiling():  # a graph holds its weights, and looks at no counter of writes
        base.check_seal()
    frozen = [*base.packed.values(), *base.biases.values()]
    scale = adapters.scale if adapters is not None else 0.0
    return ops.apply(x, topk_ids, weights, frozen, lora, base.spec, scale, saves)


def _checked(config: MoEConfig, adapters: Adapters | FusedAdapters) -> list[Tensor]:
    """The tensors: dense, of one dtype and of the shapes of one rank."""
    lora = adapters.tensors()
    for name, tensor in zip(names_of(lora), lora, strict=True):
        check_plain(name, tensor)
    rank = lora[0].shape[1] if lora[0].dim() == 3 else 0
    sizes = (config.num_experts, config.hidden_size, config.intermediate_size)
    shapes = _shapes(*sizes, max(rank, 1), isinstance(adapters, FusedAdapters))
    for (name, shape), tensor in zip(shapes.items(), lora, strict=True):
        if tensor.dtype not in FLOATS or tensor.dtype != lora[0].dtype:
            raise InputTypeError(
                f"{name} must be float32 or bfloat16 like the other LoRA parameters, got {tensor.dtype}"
            )
        if tensor.device.type != "cpu" or tensor.layout != torch.strided or tuple(tensor.shape) != shape:
            raise InputError(
                f"{name} must be a CPU tensor of shape {list(shape)}, got {list(tensor.shape)} on {tensor.device}"
            )
    return lora


@lru_cache(maxsize=256)
def _shapes(experts: int, hidden: int, intermediate: int, rank: int, fused: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {**lora_shapes(hidden, intermediate, experts, rank)}
    if not fused:
        return shapes
    gate_up = {"gate_up_lora_a": (experts, rank, hidden), "gate_up_lora_b": (experts, 2, intermediate, rank)}
    return {name: (shapes | gate_up)[name] for name in FUSED_NAMES}


def _check_budget(base: Base, x: Tensor, lora: list[Tensor], trains: bool) -> None:
    if base.config.memory_budget is None:
        return
    plan = plan_kernels(base.config, base.isa, str(lora[0].dtype).removeprefix("torch.") if lora else None)
    tokens = x.numel() // base.config.hidden_size
    check_call(plan, tokens, torch.get_num_threads(), trains, str(x.dtype).removeprefix("torch."))


def _projections(config: MoEConfig) -> tuple[Projection, Projection, Projection]:
    return projections(config.hidden_size, config.intermediate_size)
