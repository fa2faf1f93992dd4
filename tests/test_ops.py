"""The operators of torch: registered as torch wants them, one node in a compiled graph, the same bits."""

from typing import Any

import pytest
import torch
from helpers import build_kernels, case_named, layer_of, same_bits, usable_isas
from torch import Tensor
from torch.autograd import forward_ad
from yardstick import Case, make_inputs, results_of_layer

from jitmoe.errors import TransformError
from jitmoe.experts.ops import experts
from jitmoe.experts.passes import spec_of

ISA = usable_isas()[0]
CASES = tuple(map(case_named, ("medium", "no_lora", "gpt_oss", "skipped_slots", "float32_x")))


@pytest.fixture(scope="module", autouse=True)
def kernels_are_built() -> None:
    build_kernels(CASES, [ISA])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch_finds_nothing_wrong_with_them(case: Case, recompute: bool) -> None:
    inputs = make_inputs(case)
    layer = layer_of(inputs, ISA, recompute=recompute)
    x, weights = inputs.x.requires_grad_(), inputs.weights.requires_grad_()
    base = [*layer._packed().values(), *layer.biases().values()]
    lora = [parameter for _, parameter in layer.named_parameters()]
    arguments = (x, inputs.topk_ids, weights, base, lora, spec_of(layer.config, ISA), inputs.scale, True)
    assert set(torch.library.opcheck(experts, arguments).values()) == {"SUCCESS"}


@pytest.mark.field("B")
@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_a_compiled_layer_is_one_graph_with_the_same_bits(case: Case) -> None:
    inputs = make_inputs(case)
    layer = layer_of(inputs, ISA)
    expected = results_of_layer(layer, inputs)
    torch.compiler.reset()
    found = torch._dynamo.explain(layer)(inputs.x, inputs.topk_ids, inputs.weights)
    assert (found.graph_count, found.graph_break_count) == (1, 0)
    compiled = torch.compile(layer, fullgraph=True)
    x, weights = inputs.x.clone().requires_grad_(), inputs.weights.clone().requires_grad_()
    layer.zero_grad()
    out = compiled(x, inputs.topk_ids, weights)
    out.backward(inputs.dout)
    results = {"out": out, "x": x.grad, "weights": weights.grad}
    results |= {name: parameter.grad for name, parameter in layer.named_parameters()}
    assert [name for name in expected if not same_bits(results[name], expected[name])] == []


def test_saved_tensors_may_come_back_in_another_form() -> None:
    """As offloading and compression hand them back: equal values, other strides."""
    inputs = make_inputs(CASES[0])
    layer = layer_of(inputs, ISA)
    expected = results_of_layer(layer, inputs)

    def other_strides(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1) if tensor.dim() > 1 else tensor

    with torch.autograd.graph.saved_tensors_hooks(other_strides, lambda tensor: tensor):
        found = results_of_layer(layer, inputs)
    assert [name for name in expected if not same_bits(found[name], expected[name])] == []


def transformed(inputs: Any) -> tuple[Any, Tensor]:
    layer = layer_of(inputs, ISA)
    return lambda x: layer(x, inputs.topk_ids, inputs.weights).float().sum(), inputs.x


def test_torch_func_grad_gives_the_bits_of_backward() -> None:
    inputs = make_inputs(case_named("small"))
    layer = layer_of(inputs, ISA)

    def loss(x: Tensor, weights: Tensor, lora: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(layer, lora, (x, inputs.topk_ids, weights)).float().sum()

    lora = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    x_grad, weights_grad, lora_grads = torch.func.grad(loss, (0, 1, 2))(inputs.x, inputs.weights, lora)
    x, weights = inputs.x.clone().requires_grad_(), inputs.weights.clone().requires_grad_()
    layer(x, inputs.topk_ids, weights).float().sum().backward()
    assert same_bits(x_grad, x.grad) and same_bits(weights_grad, weights.grad)
    assert all(same_bits(lora_grads[name], parameter.grad) for name, parameter in layer.named_parameters())


REFUSED = {
    "vmap": (lambda f, x: torch.func.vmap(f)(x[None].expand(2, *x.shape)), "give them all tokens in one call"),
    "jvp": (lambda f, x: torch.func.jvp(f, (x,), (x,)), "no forward-mode derivative"),
    "jacrev": (lambda f, x: torch.func.jacrev(lambda x: f(x).expand(2))(x), "take vjp or grad"),
    "hessian": (lambda f, x: torch.func.grad(lambda x: torch.func.grad(f)(x).float().sum())(x), "no second derivative"),
}


@pytest.mark.parametrize("transform", REFUSED)
def test_other_transforms_are_refused_in_words(transform: str) -> None:
    apply, words = REFUSED[transform]
    with pytest.raises(TransformError, match=words):
        apply(*transformed(make_inputs(case_named("small"))))


def test_a_tangent_of_forward_mode_is_not_dropped() -> None:
    inputs = make_inputs(case_named("small"))
    layer = layer_of(inputs, ISA).requires_grad_(False)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="jvp"):
        layer(forward_ad.make_dual(inputs.x, inputs.x), inputs.topk_ids, inputs.weights)
