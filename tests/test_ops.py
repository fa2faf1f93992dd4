"""The operators of torch: registered as torch wants them, one node in a compiled graph, the same bits."""

import pytest
import torch
from helpers import build_kernels, case_named, layer_of, same_bits, usable_isas
from yardstick import Case, make_inputs, results_of_layer

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
