"""Faults in what the caller hands over: ids, routings, weights, odd tensors. Right, or refused by name and clean."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import EVERY_ISA, build_kernels, case_named, copied, different, launches, layer_of, same_bits, usable_isas
from torch import Tensor
from yardstick import Inputs, check, make_inputs, results_of_layer

from jitmoe import MoELayer
from jitmoe.errors import InputError, InputTypeError

ISA = usable_isas()[0]
SMALL = case_named("small")
SKIPPING = case_named("skipped_slots")


@pytest.fixture(scope="module", autouse=True)
def kernels_are_built() -> None:
    build_kernels([SMALL])
    build_kernels([SKIPPING], [ISA])


@pytest.fixture
def inputs() -> Inputs:
    return make_inputs(SMALL)


@pytest.fixture
def layer(inputs: Inputs) -> MoELayer:
    return layer_of(inputs, ISA)


def with_id(value: int) -> Tensor:
    ids = make_inputs(SMALL).topk_ids.clone()
    ids[5, 1] = value
    return ids


def in_numpy(values: Tensor) -> np.ndarray:
    return values.float().numpy()


REFUSED: dict[str, tuple[str, Callable[[Inputs], object], type[Exception], str]] = {
    "id -1": ("topk_ids", lambda i: with_id(-1), InputError, r"topk_ids\[5, 1\] \(token 5, slot 1\) is -1"),
    "id E": ("topk_ids", lambda i: with_id(4), InputError, r"token 5, slot 1\) is 4"),
    "id 2^31": ("topk_ids", lambda i: with_id(2**31), InputError, r"token 5, slot 1\) is 2147483648"),
    "id 2^32": ("topk_ids", lambda i: with_id(2**32), InputError, r"token 5, slot 1\) is 4294967296"),
    "id int64 max": ("topk_ids", lambda i: with_id(2**63 - 1), InputError, r"token 5, slot 1"),
    "id int64 min": ("topk_ids", lambda i: with_id(-(2**63)), InputError, r"token 5, slot 1"),
    "ids float": (
        "topk_ids",
        lambda i: i.topk_ids.float(),
        InputTypeError,
        "topk_ids must be int64 or int32, got float32",
    ),
    "ids int16": ("topk_ids", lambda i: i.topk_ids.short(), InputTypeError, "topk_ids .* got int16"),
    "ids bool": ("topk_ids", lambda i: i.topk_ids.bool(), InputTypeError, "topk_ids .* got bool"),
    "ids short": ("topk_ids", lambda i: i.topk_ids[:-1], InputError, r"topk_ids must have shape \[24, 2\]"),
    "ids of another K": ("topk_ids", lambda i: i.topk_ids[:, :1], InputError, r"topk_ids must have shape \[..., 2\]"),
    "ids flat": ("topk_ids", lambda i: i.topk_ids.reshape(-1), InputError, "topk_ids must have shape"),
    "ids list": (
        "topk_ids",
        lambda i: i.topk_ids.tolist(),
        InputTypeError,
        "topk_ids must be a torch.Tensor, got list",
    ),
    "ids meta": ("topk_ids", lambda i: i.topk_ids.to("meta"), InputError, "topk_ids must be a dense CPU tensor"),
    "x half": ("x", lambda i: i.x.half(), InputTypeError, "x must be float32 or bfloat16, got float16"),
    "x double": ("x", lambda i: i.x.double(), InputTypeError, "x must be .* got float64"),
    "x int": ("x", lambda i: i.x.int(), InputTypeError, "x must be .* got int32"),
    "x complex": ("x", lambda i: torch.complex(i.x.float(), i.x.float()), InputTypeError, "x must be .* got complex64"),
    "x meta": ("x", lambda i: i.x.to("meta"), InputError, "x must be a dense CPU tensor, got device meta"),
    "x sparse": ("x", lambda i: i.x.float().to_sparse(), InputError, "x must be a dense CPU tensor.*sparse"),
    "x wide": ("x", lambda i: torch.cat([i.x, i.x], 1), InputError, r"x must have shape \[..., 64\], got \[24, 128\]"),
    "x scalar": ("x", lambda i: i.x[0, 0], InputError, r"x must have shape \[..., 64\], got \[\]"),
    "x array": ("x", lambda i: in_numpy(i.x), InputTypeError, "x must be a torch.Tensor, got ndarray"),
    "x None": ("x", lambda i: None, InputTypeError, "x must be a torch.Tensor, got NoneType"),
    "weights half": ("weights", lambda i: i.weights.half(), InputTypeError, "weights must be .* got float16"),
    "weights double": ("weights", lambda i: i.weights.double(), InputTypeError, "weights must be .* got float64"),
    "weights short": ("weights", lambda i: i.weights[:-1], InputError, r"weights must have shape \[24, 2\]"),
    "weights meta": ("weights", lambda i: i.weights.to("meta"), InputError, "weights must be a dense CPU tensor"),
    "weights sparse": (
        "weights",
        lambda i: i.weights.to_sparse_csr(),
        InputError,
        "weights must be a dense CPU tensor",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_refused_by_name_and_clean(layer: MoELayer, inputs: Inputs, fault: str) -> None:
    """Before any kernel runs; parameters, gradients and the next call are as if it had not happened."""
    expected = copied(results_of_layer(layer, inputs))
    state = copied(layer.state_dict())
    name, make, error, words = REFUSED[fault]
    arguments = {"x": inputs.x, "topk_ids": inputs.topk_ids, "weights": inputs.weights, name: make(inputs)}
    with launches() as seen, pytest.raises(error, match=words) as refused:
        layer(**arguments)
    assert not seen, "a kernel was about to run"
    assert isinstance(refused.value, ValueError | TypeError)
    for lora in layer.parameters():
        assert lora.grad is not None
    assert (
        different(
            {n: p.grad for n, p in layer.named_parameters()}, {n: expected[n] for n, _ in layer.named_parameters()}
        )
        == []
    )
    assert different(dict(layer.state_dict()), state) == []
    assert different(results_of_layer(layer, inputs), expected) == []


def overallocated(tensor: Tensor, offset: int) -> Tensor:
    """The same values at a storage offset, between NaNs (or the largest ids) that no kernel may read."""
    fill = float("nan") if tensor.is_floating_point() else 2**31 - 1
    room = torch.full((tensor.numel() + 2 * offset + 64,), fill, dtype=tensor.dtype)
    view = room[offset : offset + tensor.numel()].view(tensor.shape)
    view.copy_(tensor)
    return view


ODD: dict[str, Callable[[Tensor], Tensor]] = {
    "column-major": lambda t: t.T.contiguous().T,
    "every second row": lambda t: t.repeat_interleave(2, 0)[::2],
    "every second column": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "storage offset of one": lambda t: overallocated(t, 1),
    "storage offset of seven": lambda t: overallocated(t, 7),
    "slice of a wider matrix": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "flipped twice": lambda t: t.flip(0).flip(0),
    "negated lazily": lambda t: torch._neg_view(-t) if t.is_floating_point() else t,
}


@EVERY_ISA
@pytest.mark.parametrize("odd", ODD)
def test_odd_strides_are_right(isa: str, odd: str, inputs: Inputs) -> None:
    layer = layer_of(inputs, isa)
    expected = results_of_layer(layer, inputs)
    twisted = {name: ODD[odd](getattr(inputs, name)) for name in ("x", "topk_ids", "weights", "dout")}
    assert all(torch.equal(value, getattr(inputs, name)) for name, value in twisted.items())
    x, weights = (twisted[name].detach().requires_grad_() for name in ("x", "weights"))
    layer.zero_grad()
    out = layer(x, twisted["topk_ids"], weights)
    out.backward(twisted["dout"])
    found = {"out": out.detach(), "x": x.grad, "weights": weights.grad}
    found |= {name: parameter.grad for name, parameter in layer.named_parameters()}
    assert different(found, expected) == []


def test_expanded_inputs(layer: MoELayer, inputs: Inputs) -> None:
    """One row of memory for all tokens: read right, and the gradient of the base is the sum."""
    row = inputs.x[:1].float().requires_grad_()
    ids, weights = inputs.topk_ids[:1].expand(24, 2), inputs.weights[:1].expand(24, 2)
    out = layer(row.expand(24, 64), ids, weights)
    single = layer(inputs.x[:1].float().expand(24, 64).contiguous(), ids.contiguous(), weights.contiguous())
    assert same_bits(out, single) and same_bits(out[0], out[23])
    out.backward(inputs.dout.float())
    assert row.grad.shape == (1, 64) and row.grad.count_nonzero() > 32


def test_inputs_are_not_written_to(layer: MoELayer, inputs: Inputs) -> None:
    before = {name: getattr(inputs, name).clone() for name in ("x", "topk_ids", "weights", "dout")}
    state = copied(layer.state_dict())
    x, weights = inputs.x.requires_grad_(), inputs.weights.requires_grad_()
    layer(x, inputs.topk_ids, weights).backward(inputs.dout)
    assert different({name: getattr(inputs, name) for name in before}, before) == []
    assert different(dict(layer.state_dict()), state) == []


class TestOddRoutings:
    """Fault 5; the sizes of them are in the matrix."""

    @pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
    @pytest.mark.parametrize("recompute", [False, True])
    def test_no_tokens(self, inputs: Inputs, dtype: torch.dtype, recompute: bool) -> None:
        layer = layer_of(inputs, ISA, recompute=recompute)
        x, weights = inputs.x[:0].requires_grad_(), inputs.weights[:0].requires_grad_()
        out = layer(x, inputs.topk_ids[:0].to(dtype), weights)
        out.backward(torch.zeros(0, 64, dtype=out.dtype))
        assert out.shape == x.grad.shape == (0, 64) and weights.grad.shape == (0, 2)
        assert all(
            parameter.grad.shape == parameter.shape and not parameter.grad.any() for parameter in layer.parameters()
        )

    def test_no_tokens_with_leading_dimensions(self, layer: MoELayer) -> None:
        out = layer(torch.zeros(3, 0, 64), torch.zeros(3, 0, 2, dtype=torch.int64), torch.zeros(3, 0, 2))
        assert out.shape == (3, 0, 64)

    def test_every_slot_skipped(self) -> None:
        inputs = make_inputs(SKIPPING)
        layer = layer_of(inputs, ISA)
        x, weights = inputs.x.requires_grad_(), inputs.weights.requires_grad_()
        out = layer(x, torch.full_like(inputs.topk_ids, -1), weights)
        out.backward(inputs.dout)
        results = [out, x.grad, weights.grad, *(parameter.grad for parameter in layer.parameters())]
        assert not any(result.any() for result in results)

    @EVERY_ISA
    def test_all_tokens_to_one_expert_twice(self, isa: str, inputs: Inputs) -> None:
        """Both slots count, and add up as one slot of the summed weight does within the bound."""
        ids = torch.full_like(inputs.topk_ids, 2)
        case = replace(inputs, topk_ids=ids)
        check(results_of_layer(layer_of(inputs, isa), case), case)


class TestOddRoutingWeights:
    """Fault 8."""

    @EVERY_ISA
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_zero_adds_nothing_and_has_a_gradient(self, isa: str, inputs: Inputs, dtype: torch.dtype) -> None:
        weights = inputs.weights.to(dtype)
        weights[:, 1] = 0
        zeroed = replace(inputs, case=replace(SMALL, weights_dtype=dtype), weights=weights)
        results = results_of_layer(layer_of(inputs, isa, batch_invariant=True), zeroed)
        assert (results["weights"][:, 1] != 0).all()
        alone = replace(zeroed, case=replace(zeroed.case, routing="skipped_slots"), topk_ids=inputs.topk_ids.clone())
        alone.topk_ids[:, 1] = -1
        without = results_of_layer(layer_of(alone, isa, batch_invariant=True), alone)
        assert same_bits(results["out"], without["out"]) and same_bits(results["x"], without["x"])

    @EVERY_ISA
    @pytest.mark.parametrize("factor", [-1.0, 2.0**40, -(2.0**-40)])
    def test_powers_of_two_scale_exactly(self, isa: str, inputs: Inputs, factor: float) -> None:
        layer = layer_of(inputs, isa)
        plain = copied(results_of_layer(layer, inputs))
        scaled = results_of_layer(layer, replace(inputs, weights=inputs.weights * factor))
        assert torch.equal(scaled["out"].float(), plain["out"].float() * factor)
        assert same_bits(scaled["weights"], plain["weights"]), "the gradient of a weight does not depend on it"
        assert torch.allclose(scaled["x"].float(), plain["x"].float() * factor, rtol=2**-8, atol=0)

    def test_bfloat16_weights_are_their_float32_values(self, layer: MoELayer, inputs: Inputs) -> None:
        rounded = inputs.weights.bfloat16()
        assert same_bits(layer(inputs.x, inputs.topk_ids, rounded), layer(inputs.x, inputs.topk_ids, rounded.float()))
