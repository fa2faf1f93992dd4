"""An experts module of transformers on our kernels: packed at its first call, called with whatever PEFT has active."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from jitmoe.errors import FrozenWeightsError, InputError, UnsupportedExpertsError
from jitmoe.experts.functional import Base, moe_experts, pack_base
from jitmoe.experts.pack import PackedExperts
from jitmoe.experts.passes import spec_of
from jitmoe.formats import Packing
from jitmoe.hf import peft_lora
from jitmoe.hf.layout import PARTS, Layout, WeightName
from jitmoe.hf.packed import Packed, packing_words
from jitmoe.hf.understand import BIASES, Understood, class_name, refused, understand
from jitmoe.hf.weight import PackedWeight

PREPARED = "_jitmoe"
"""Attribute of an experts module that holds its :class:`Prepared`."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """What calls of one module share.

    Attributes:
        understood: what the module computes.
        base: for the functional core, over the memory of the module's packed weights.
        seen: the memory, its writes and the biases that ``base`` was made from.
        bases: ``base`` by the number of experts a token, as they were asked for.
    """

    understood: Understood
    base: Base
    seen: tuple[Any, ...]
    bases: dict[int, Base] = field(default_factory=dict)

    def base_for(self, top_k: int) -> Base:
        """``base`` for calls with this many experts a token, which is a fact of a call."""
        found = self.bases.get(top_k)
        if found is None:
            if torch.compiler.is_compiling():
                raise _not_packed()
            config = replace(self.base.config, top_k=top_k)
            found = self.bases[top_k] = replace(self.base, config=config, spec=spec_of(config, self.base.isa))
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied module prepares itself: its weights lie elsewhere."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Nor does a file hold this."""
        return type(None), ()


def run(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Apply the experts, as transformers calls an implementation of them.

    Args:
        module: the experts module.
        hidden_states: [T, H] bfloat16 or float32.
        top_k_index: [T, K] int64; an id beyond the experts is skipped (expert parallelism).
        top_k_weights: [T, K] float32 or bfloat16.

    Returns:
        [T, H] in the dtype of ``hidden_states``.

    Raises:
        UnsupportedExpertsError: jitmoe has no kernel for this module.
        FrozenWeightsError: in backward, where the base weights should be trained.
    """
    prepared = prepare(module)
    base = prepared.base_for(top_k_index.shape[-1])
    adapters = peft_lora.adapters_of(module, prepared.understood.layout)
    return frozen_behind(module, moe_experts(hidden_states, top_k_index, top_k_weights, base, adapters))


def frozen_behind(module: Any, out: Tensor) -> Tensor:
    """``out`` of a module, behind which a weight that should be trained is an error in backward."""
    if torch.is_grad_enabled() and _wants_gradients(module):
        if torch.compiler.is_compiling():
            raise _frozen(class_name(module))
        out = _Frozen.apply(out, class_name(module), *module._parameters.values())  # type: ignore[no-untyped-call]
    return out


def run_or_leave(module: Any, *args: Tensor, **kwargs: Tensor) -> Tensor:
    """:func:`run`, or the module's own forward where it is not understood, with a warning for each class."""
    try:
        prepare(module)
    except UnsupportedExpertsError as error:
        warnings.warn(f"{error} (left to transformers, as asked for)", stacklevel=2)
        own: Tensor = type(module).forward.__wrapped__(module, *args, **kwargs)
        return own
    return run(module, *args, **kwargs)


def prepare(module: Any) -> Prepared:
    """Pack the weights of a module, unless that is done, in the place of its parameters.

    Raises:
        UnsupportedExpertsError: jitmoe has no kernel for this module; it is unchanged.
    """
    prepared: Prepared | None = getattr(module, PREPARED, None)
    if torch.compiler.is_compiling():  # a graph keeps the weights that it was made with
        if prepared is None:
            raise _not_packed()
        return prepared
    if prepared is not None and _seen(module) == prepared.seen:
        return prepared
    understood = understand(module)
    _check_weights(module)
    for name in PARTS:
        pack_parameter(module, name, understood)
    packed: list[Packed] = [module._parameters[name].packed for name in PARTS]
    understood = replace(understood, packing=packing_of(module, packed))
    tensors = {part: tensor for memory in packed for part, tensor in memory.tensors.items()}
    biases = _biases(module, understood)
    base = pack_base(understood.config(), *(PackedExperts(tensors[part]) for part in ("gate", "up", "down")), **biases)
    prepared = Prepared(understood, base, _seen(module))
    prepared.base_for(getattr(module.config, "num_experts_per_tok", None) or 1)
    module.__dict__[PREPARED] = prepared
    return prepared


def pack_parameter(module: Any, name: WeightName, understood: Understood) -> None:
    """Put the packed weight in the place of a plain one, whose memory is then free."""
    plain = module._parameters[name]
    if isinstance(plain, PackedWeight):
        return
    packed = Packed.of(understood.layout, name, partial(_parts, understood.layout, name, plain.detach()))
    module._parameters[name] = nn.Parameter(PackedWeight(packed), plain.requires_grad)


def packing_of(module: Any, packed: Sequence[Packed]) -> Packing:
    """The one packing of the weights of a module.

    Raises:
        UnsupportedExpertsError: they have several.
    """
    first, *rest = packed
    for other in rest:
        if other.packing != first.packing:
            raise refused(
                module,
                f"its {first.name} is packed in {packing_words(first.packing)} and its {other.name} in "
                f"{packing_words(other.packing)}; jitmoe.hf.unpack(model) makes both bfloat16",
            )
    return first.packing


def _parts(layout: Layout, name: WeightName, weight: Tensor, expert: int) -> list[Tensor]:
    return layout.split(weight[expert], PARTS[name])


def unpack_module(module: Any) -> None:
    """Put plain weights in the place of packed ones."""
    for name in PARTS:
        weight = module._parameters[name]
        if isinstance(weight, PackedWeight):
            module._parameters[name] = nn.Parameter(weight.unpack(), weight.requires_grad)
    module.__dict__.pop(PREPARED, None)


def _not_packed() -> InputError:
    return InputError("a compiler cannot pack the experts: call jitmoe.hf.pack(model) before torch.compile")


@torch.compiler.assume_constant_result
def _wants_gradients(module: Any) -> bool:
    """Whether a weight or bias should be trained; a compiled graph is told once, it cannot hold packed parameters."""
    return any(parameter.requires_grad for parameter in module._parameters.values())


def _frozen(name: str) -> FrozenWeightsError:
    return FrozenWeightsError(
        f"the weights of {name} have requires_grad=True, and jitmoe keeps base weights frozen: train LoRA "
        f"(peft.get_peft_model does it), or call requires_grad_(False) on the experts"
    )


def _seen(module: Any) -> tuple[Any, ...]:
    weights = (module._parameters.get(name) for name in PARTS)
    memory = [(w.packed, w.packed.writes) if isinstance(w, PackedWeight) else (None, 0) for w in weights]
    biases = [(id(b), b._version) for name in BIASES if (b := module._parameters.get(name)) is not None]
    return (*memory, *biases)


def _check_weights(module: Any) -> None:
    for name in PARTS:
        weight = module._parameters.get(name)
        if isinstance(weight, PackedWeight):
            continue
        if type(weight) not in (nn.Parameter, Tensor):  # expert parallelism of transformers puts a plain tensor there
            raise refused(module, f"its {name} is a {type(weight).__name__}, expected a plain parameter")
        if weight.device.type != "cpu":
            raise refused(module, f"its {name} is on {weight.device}, expected the CPU")
        if weight.dtype != torch.bfloat16:
            raise refused(
                module, f"its {name} is {str(weight.dtype).removeprefix('torch.')}: load with dtype=torch.bfloat16"
            )


def _biases(module: Any, understood: Understood) -> dict[str, Tensor]:
    if not understood.bias:
        return {}
    fused, down = (module._parameters[name].detach().float() for name in BIASES)
    gate, up = understood.layout.split_vector(fused)
    return {"gate_bias": gate.contiguous(), "up_bias": up.contiguous(), "down_bias": down.contiguous()}


class _Frozen(torch.autograd.Function):
    """Passes the result on, and refuses to leave weights that should be trained without a gradient."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, name: str, *trained: Tensor) -> Tensor:
        """Nothing to do."""
        ctx.name = name
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Raise, if one of them wants a gradient."""
        if any(ctx.needs_input_grad[2:]):
            raise _frozen(ctx.name)
        return (grad, None, *(None for _ in ctx.needs_input_grad[2:]))
