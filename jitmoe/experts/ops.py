"""The passes as operators of torch, opaque to its compiler, and as one autograd function outside of compiled graphs.

``jitmoe::experts(x, topk_ids, weights, base, lora, spec, scale, saves) -> [out, *saved]`` and
``jitmoe::experts_backward(out_grad, x, topk_ids, weights, base, lora, saved, spec, scale, wants) -> [gradients]``.
``base`` is packed gate, up and down and then their biases, if any; ``lora`` is A and B of the three, or nothing;
``spec`` is the text of :func:`~jitmoe.experts.passes.spec_of`: an operator takes tensors and plain values alone.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from jitmoe.errors import InputError, InputTypeError, TransformError, WeightsChangedError
from jitmoe.experts import passes
from jitmoe.experts.lora import names_of, rank_of
from jitmoe.experts.passes import saved_of
from jitmoe.experts.seal import version_of
from jitmoe.experts.workspace import memory_errors

experts = torch.library.custom_op("jitmoe::experts", mutates_args=())(passes.forward)
experts_backward = torch.library.custom_op("jitmoe::experts_backward", mutates_args=())(passes.backward)


@experts.register_fake
def _(
    x: Tensor,
    topk_ids: Tensor,
    weights: Tensor,
    base: list[Tensor],
    lora: list[Tensor],
    spec: str,
    scale: float,
    saves: bool,
) -> list[Tensor]:
    saved = saved_of(spec, topk_ids.numel(), rank_of(lora), saves)
    return [torch.empty_like(x), *(x.new_empty(s.shape, dtype=getattr(torch, s.dtype)) for s in saved)]


@experts_backward.register_fake
def _(
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
    shapes = [(x, wants[0]), (weights, wants[1])]
    grads = [t.new_empty(t.shape) if wanted else x.new_empty(0) for t, wanted in shapes]
    return [*grads, *(torch.empty_like(t) for t in lora if wants[2])]


def apply(
    x: Tensor,
    topk_ids: Tensor,
    weights: Tensor,
    base: list[Tensor],
    lora: list[Tensor],
    spec: str,
    scale: float,
    saves: bool,
) -> Tensor:
    """out [..., H], differentiable in x, the routing weights and LoRA.

    Arguments as of the operator; the leading dimensions of x, topk_ids and weights are any.
    """
    tensors = _flat(x, topk_ids, weights)
    if torch.compiler.is_compiling():
        out: Tensor = experts(*tensors, base, lora, spec, scale, saves)[0]
        return out.reshape(x.shape)
    transformed = torch._C._functorch.peek_interpreter_stack() is not None  # torch.func is at work
    with memory_errors():
        if not (saves or transformed or forward_ad._current_level >= 0):
            # No gradient of any kind is wanted: torch's machinery would take a fifth of a small call's time.
            return passes.forward(*tensors, base, lora, spec, scale, saves)[0].reshape(x.shape)
        arguments = (*tensors, base, spec, scale, saves, *lora)
        out = TransformedExperts.apply(*arguments)[0] if transformed else Experts.apply(*arguments)  # type: ignore[no-untyped-call]
        return out.reshape(x.shape)


def _flat(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, topk_ids, weights = (tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors)
    return x, topk_ids, weights


class Experts(torch.autograd.Function):
    """The same outside of compiled graphs: torch's registry of operators takes 0.2 ms a pass (2026-11-25)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        topk_ids: Tensor,
        weights: Tensor,
        base: list[Tensor],
        spec: str,
        scale: float,
        saves: bool,
        *lora: Tensor,
    ) -> Tensor:
        """Run forward."""
        out, *saved = passes.forward(x, topk_ids, weights, base, list(lora), spec, scale, saves)
        _keep(ctx, x, topk_ids, weights, base, lora, spec, scale, saved)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_grad: Tensor) -> tuple[Tensor | None, ...]:
        """Run backward."""
        wants_x, _, wants_weights, _, _, _, _, *wants_lora = ctx.needs_input_grad
        x, weights, lora = _gradients(ctx, passes.backward, out_grad, wants_x, wants_weights, any(wants_lora))
        return x, None, weights, None, None, None, None, *lora


class TransformedExperts(torch.autograd.Function):
    """The same for ``torch.func.grad`` and ``vjp``, which want a context of its own; the others it refuses by name."""

    @staticmethod
    def forward(
        x: Tensor,
        topk_ids: Tensor,
        weights: Tensor,
        base: list[Tensor],
        spec: str,
        scale: float,
        saves: bool,
        *lora: Tensor,
    ) -> tuple[Tensor, ...]:
        """Run forward; what is saved is a result too."""
        return tuple(passes.forward(x, topk_ids, weights, base, list(lora), spec, scale, True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep what backward needs."""
        x, topk_ids, weights, base, spec, scale, _, *lora = inputs
        ctx.mark_non_differentiable(*output[1:])
        _keep(ctx, x, topk_ids, weights, base, lora, spec, scale, list(output[1:]))

    @staticmethod
    def backward(ctx: Any, out_grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        """Run backward, as a function of its own: what it is given here may be wrapped."""
        wants_x, _, wants_weights, _, _, _, _, *wants_lora = ctx.needs_input_grad
        x, weights, lora = _gradients(ctx, _unwrapped_backward, out_grad, wants_x, wants_weights, any(wants_lora))
        return x, None, weights, None, None, None, None, *lora

    @staticmethod
    def vmap(*_: Any) -> None:
        """Refuse: a batch of calls is a call with more tokens."""
        raise TransformError("torch.func.vmap cannot map the experts: give them all tokens in one call")

    @staticmethod
    def jvp(*_: Any) -> None:
        """Refuse: the kernels have no forward-mode derivative."""
        raise TransformError("the experts have no forward-mode derivative: take torch.func.vjp or grad")


class TransformedBackward(torch.autograd.Function):
    """Backward of :class:`TransformedExperts`; it has no derivative."""

    @staticmethod
    def forward(adapters: int, base: list[Tensor], rest: tuple[Any, ...], *tensors: Tensor) -> Any:
        """Run backward; ``adapters`` of ``tensors`` are LoRA, and those behind them were saved."""
        out_grad, x, topk_ids, weights, *others = tensors
        lora, saved = others[:adapters], others[adapters:]
        return tuple(passes.backward(out_grad, x, topk_ids, weights, base, lora, saved, *rest))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        """Refuse."""
        raise TransformError("the experts have no second derivative")

    @staticmethod
    def vmap(*_: Any) -> None:
        """Refuse."""
        raise TransformError("torch.func.vmap cannot map backward of the experts, as jacrev does: take vjp or grad")


def _unwrapped_backward(
    out_grad: Tensor,
    x: Tensor,
    topk_ids: Tensor,
    weights: Tensor,
    base: list[Tensor],
    lora: list[Tensor],
    saved: list[Tensor],
    *rest: Any,
) -> list[Tensor]:
    tensors = (out_grad, x, topk_ids, weights, *lora, *saved)
    grads: tuple[Tensor, ...] = TransformedBackward.apply(len(lora), base, rest, *tensors)  # type: ignore[no-untyped-call]
    return list(grads)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, topk_ids, weights, base, lora, spec, scale, _ = inputs
    _keep(ctx, x, topk_ids, weights, base, lora, spec, scale, output[1:])


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    assert grads[0] is not None
    wants_x, _, wants_weights, _, wants_lora, *_ = ctx.needs_input_grad
    x, weights, lora = _gradients(ctx, experts_backward, grads[0], wants_x, wants_weights, any(wants_lora))
    return x, None, weights, [None] * len(ctx.base), lora, None, None, None


experts.register_autograd(_backward, setup_context=_setup_context)


def _keep(
    ctx: Any,
    x: Tensor,
    topk_ids: Tensor,
    weights: Tensor,
    base: list[Tensor],
    lora: Sequence[Tensor],
    spec: str,
    scale: float,
    saved: list[Tensor],
) -> None:
    # A copy of the ids: callers reuse that buffer, and torch would not let them.
    kept = (x, topk_ids.clone(), weights, *lora, *saved)
    ctx.save_for_backward(*kept)
    ctx.forms = [(tensor.shape, tensor.dtype) for tensor in kept]
    # Not saved: hooks of saved tensors would move the whole base, and its versions are looked at here.
    ctx.base, ctx.versions, ctx.spec, ctx.scale = base, versions_of(base), spec, scale
    ctx.lora_names = names_of(lora)
    ctx.saved_names = [s.name for s in saved_of(spec, topk_ids.numel(), rank_of(lora), bool(saved))]


def _gradients(
    ctx: Any, run: Callable[..., list[Tensor]], out_grad: Tensor, wants_x: bool, wants_weights: bool, wants_lora: bool
) -> tuple[Tensor | None, Tensor | None, Sequence[Tensor | None]]:
    """Of x, of the routing weights and of LoRA, by ``run``; None where it is not wanted."""
    names = ("x", "topk_ids", "weights", *ctx.lora_names, *ctx.saved_names)
    x, topk_ids, weights, *rest = map(_restored, names, ctx.saved_tensors, ctx.forms)
    adapters = len(ctx.lora_names)
    lora, saved = rest[:adapters], rest[adapters:]
    if versions_of(ctx.base) != ctx.versions:
        raise WeightsChangedError("base weights were loaded or written between forward and backward: run forward again")
    wants = [wants_x, wants_weights, wants_lora]
    x_grad, weights_grad, *lora_grads = run(
        out_grad, x, topk_ids, weights, ctx.base, lora, saved, ctx.spec, ctx.scale, wants
    )
    return (
        x_grad if wants_x else None,
        weights_grad if wants_weights else None,
        lora_grads if wants_lora else [None] * len(lora),
    )


def _restored(name: str, tensor: Tensor, form: tuple[torch.Size, torch.dtype]) -> Tensor:
    """A saved tensor as it was: hooks of saved tensors may give back another dtype, device or strides."""
    shape, dtype = form
    if tensor.shape != shape:
        raise InputError(
            f"hooks of saved tensors gave {name} back with shape {list(tensor.shape)}, it had {list(shape)}"
        )
    if tensor.dtype.is_floating_point != dtype.is_floating_point:
        raise InputTypeError(f"hooks of saved tensors gave {name} back as {tensor.dtype}, it was {dtype}")
    return tensor.to("cpu", dtype)


def versions_of(base: Sequence[Tensor]) -> tuple[int, ...]:
    """How often each of the packed weights has been written to."""
    return tuple(map(version_of, base))
