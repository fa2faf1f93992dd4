"""moe_experts: base weights packed once, adapters as views of somebody else's tensors, gradients in their layout."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from helpers import EVERY_ISA, bits, build_kernels, case_named, config_of, launches, layer_of, same_bits, usable_isas
from torch import Tensor
from yardstick import Case, Inputs, make_inputs, results_of_layer

import jitmoe
from jitmoe.errors import InputError, InputTypeError, WeightsChangedError
from jitmoe.experts.functional import Base
from jitmoe.experts.lora import FEW

ISA = usable_isas()[0]
CASES = tuple(map(case_named, ("small", "ragged_65", "bfloat16_lora", "idle_experts")))


@pytest.fixture(scope="module", autouse=True)
def kernels_are_built() -> None:
    build_kernels(CASES, [ISA])


def base_of(inputs: Inputs, isa: str = ISA) -> Base:
    return jitmoe.pack_base(config_of(inputs.case, isa), **inputs.base())


def adapters_of(inputs: Inputs) -> jitmoe.Adapters:
    return jitmoe.Adapters(*(t.clone().requires_grad_() for t in inputs.lora), scale=inputs.scale)


def expert_fastest(b: Tensor) -> Tensor:
    """B [E, out, r] as PEFT keeps it: a leaf [out, r * E] with the expert fastest."""
    experts, out, rank = b.shape
    return b.permute(1, 2, 0).reshape(out, rank * experts).clone().requires_grad_()


def as_experts(leaf: Tensor, experts: int) -> Tensor:
    out, wide = leaf.shape
    return leaf.view(out, wide // experts, experts).permute(2, 0, 1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_layer_is_this_function(case: Case) -> None:
    inputs = make_inputs(case)
    expected = results_of_layer(layer_of(inputs, ISA), inputs)
    adapters = adapters_of(inputs)
    x, weights = inputs.x.clone().requires_grad_(), inputs.weights.clone().requires_grad_()
    out = jitmoe.moe_experts(x, inputs.topk_ids, weights, base_of(inputs), adapters)
    out.backward(inputs.dout)
    found = [out, x.grad, weights.grad, *(tensor.grad for tensor in adapters.tensors())]
    assert [name for name, t in zip(expected, found, strict=True) if not same_bits(expected[name], t)] == []


def test_without_adapters_it_is_the_base() -> None:
    inputs = make_inputs(CASES[0])
    bare = layer_of(replace(inputs, case=replace(inputs.case, rank=0), lora=None), ISA)
    call = (inputs.x, inputs.topk_ids, inputs.weights)
    assert same_bits(jitmoe.moe_experts(*call, base_of(inputs)), bare(*call))


@EVERY_ISA
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_tensors_of_a_fused_adapter(isa: str, case: Case) -> None:
    """gate and up share A and lie in one B, expert fastest: same bits as copies of their own, gradients summed."""
    inputs = make_inputs(case)
    experts, half = case.experts, case.intermediate
    shared = inputs.lora.gate_lora_a
    own = replace(inputs, lora=inputs.lora._replace(up_lora_a=shared.clone()))
    expected = results_of_layer(layer_of(own, isa), own)

    a, down_a = shared.clone().requires_grad_(), inputs.lora.down_lora_a.clone().requires_grad_()
    b = expert_fastest(torch.cat([inputs.lora.gate_lora_b, inputs.lora.up_lora_b], 1))
    down_b = expert_fastest(inputs.lora.down_lora_b)
    fused = as_experts(b, experts)
    adapters = jitmoe.Adapters(
        a, fused[:, :half], a, fused[:, half:], down_a, as_experts(down_b, experts), scale=inputs.scale
    )
    x = inputs.x.clone().requires_grad_()
    with launches() as seen:
        out = jitmoe.moe_experts(x, inputs.topk_ids, inputs.weights, base_of(inputs, isa), adapters)
        out.backward(inputs.dout)
    assert same_bits(out, expected["out"]) and same_bits(x.grad, expected["x"])
    gate_b, up_b = as_experts(b.grad, experts).split(half, 1)
    assert same_bits(gate_b, expected["gate_lora_b"]) and same_bits(up_b, expected["up_lora_b"])
    assert same_bits(as_experts(down_b.grad, experts), expected["down_lora_b"])
    assert torch.equal(a.grad, expected["gate_lora_a"] + expected["up_lora_a"])
    many = FEW * inputs.topk_ids.unique().numel() >= experts
    for launch in seen:
        assert launch.record["down.b"] == down_b.data_ptr(), "not copied"
        assert (launch.record["gate.b"] == b.data_ptr()) != many, "turned where many experts read it"
    assert seen[1].record["down.b_grad.expert"] == 1, "written where its owner keeps it"


def test_a_step_of_an_optimizer_is_seen() -> None:
    inputs = make_inputs(CASES[0])
    base, adapters = base_of(inputs), adapters_of(inputs)
    call = (inputs.x, inputs.topk_ids, inputs.weights, base, adapters)
    before = jitmoe.moe_experts(*call).detach()
    with torch.no_grad():
        adapters.down_b.mul_(2)
    assert not torch.equal(bits(jitmoe.moe_experts(*call)), bits(before))


def test_what_does_not_fit_is_refused_by_name() -> None:
    inputs = make_inputs(CASES[0])
    base, adapters = base_of(inputs), adapters_of(inputs)
    call = (inputs.x, inputs.topk_ids, inputs.weights)
    with pytest.raises(InputError, match=r"up_lora_b must be a CPU tensor of shape \[4, 96, 8\], got \[4, 96, 7\]"):
        jitmoe.moe_experts(*call, base, replace(adapters, up_b=adapters.up_b[:, :, :7]))
    with pytest.raises(InputTypeError, match="down_lora_a must be float32 or bfloat16 like the other"):
        jitmoe.moe_experts(*call, base, replace(adapters, down_a=adapters.down_a.double()))
    base.packed["up"].add_(1)
    with pytest.raises(WeightsChangedError, match="packed up weights were written to"):
        jitmoe.moe_experts(*call, base)


def interleaved(gate: Tensor, up: Tensor) -> Tensor:
    """[E, 2, I, r] as gpt-oss has it: rows of gate and up take turns, and the expert is the fastest axis."""
    experts, out, rank = gate.shape
    rows = torch.stack([gate, up], 2).reshape(experts, 2 * out, rank).permute(1, 2, 0).contiguous()
    return rows.permute(2, 0, 1).unflatten(1, (out, 2)).transpose(1, 2)


@pytest.mark.parametrize("layout", [lambda gate, up: torch.stack([gate, up], 1), interleaved], ids=["stacked", "turns"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_fused_adapters_are_two_that_share_an_a(case: Case, layout: Callable[[Tensor, Tensor], Tensor]) -> None:
    inputs = make_inputs(case)
    gate_a, gate_b, _, up_b, down_a, down_b = inputs.lora
    parts = [t.clone().requires_grad_() for t in (gate_a, gate_b, gate_a, up_b, down_a, down_b)]
    fused = [t.detach().requires_grad_() for t in (gate_a, layout(gate_b, up_b), down_a, down_b)]
    base = base_of(inputs)
    call = (inputs.x, inputs.topk_ids, inputs.weights, base)
    expected = jitmoe.moe_experts(*call, jitmoe.Adapters(*parts, scale=inputs.scale))
    found = jitmoe.moe_experts(*call, jitmoe.FusedAdapters(*fused, scale=inputs.scale))
    assert same_bits(expected, found)
    expected.backward(inputs.dout)
    found.backward(inputs.dout)
    assert fused[1].grad.stride() == fused[1].stride()
    of_b = torch.stack([parts[1].grad, parts[3].grad], 1)
    assert same_bits(of_b, fused[1].grad.contiguous())
    assert same_bits(parts[4].grad, fused[2].grad) and same_bits(parts[5].grad, fused[3].grad)
    if case.lora_dtype == torch.float32:  # in bfloat16 the fused sum is rounded once, that of two leaves twice
        assert same_bits(parts[0].grad + parts[2].grad, fused[0].grad)


def test_fused_adapters_of_a_wrong_shape_are_refused_by_name() -> None:
    inputs = make_inputs(CASES[0])
    gate_a, gate_b, _, up_b, down_a, down_b = inputs.lora
    fused = jitmoe.FusedAdapters(gate_a, torch.cat([gate_b, up_b], 1), down_a, down_b, 1.0)
    with pytest.raises(InputError, match=r"gate_up_lora_b must be .* shape"):
        jitmoe.moe_experts(inputs.x, inputs.topk_ids, inputs.weights, base_of(inputs), fused)


@pytest.mark.parametrize("chosen", [1, 2, 7], ids="{}-experts".format)
def test_turning_b_changes_no_bit(chosen: int) -> None:
    """Of eight experts few or many have rows; B lies as PEFT keeps it, or in one piece for each expert."""
    inputs = make_inputs(replace(CASES[0], experts=8))
    inputs = replace(inputs, topk_ids=inputs.topk_ids % chosen)
    gate_a, gate_b, _, up_b, down_a, down_b = inputs.lora
    results = []
    for b in (torch.stack([gate_b, up_b], 1), interleaved(gate_b, up_b)):
        lora = [t.detach().requires_grad_() for t in (gate_a, b, down_a, down_b)]
        x = inputs.x.clone().requires_grad_()
        base = base_of(inputs)
        with launches() as seen:
            out = jitmoe.moe_experts(x, inputs.topk_ids, inputs.weights, base, jitmoe.FusedAdapters(*lora, scale=2.0))
            out.backward(inputs.dout)
        results.append([out, x.grad, *(t.grad.contiguous() for t in lora)])
        turned = b.stride(0) == 1 and FEW * chosen >= 8
        assert {launch.record["gate.b"] == b.data_ptr() for launch in seen} == {not turned}
        assert lora[1].grad.stride() == b.stride()
    assert all(map(same_bits, *results))
