"""The oracle is right, and the yardstick passes the design's roundings but none of a list of seeded faults."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu
from yardstick import CASES, Case, Inputs, Results, check, make_inputs, results_of_layer, results_of_reference

from jitmoe.oracle.reference import LoraTensors, moe_reference

MEDIUM = next(case for case in CASES if case.name == "medium")
Activate = Callable[[Tensor, Tensor], Tensor]


def round_to_bfloat16(tensor: Tensor) -> Tensor:
    return tensor.bfloat16().float()


class ProjectionModel:
    """One projection of one expert with the roundings of the design: float32 sums, bfloat16 operands."""

    def __init__(self, weight: Tensor, bias: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> None:
        self.weight, self.bias, self.lora_a, self.lora_b = (t.float() for t in (weight, bias, lora_a, lora_b))
        self.scale = scale

    def forward(self, rows: Tensor) -> Tensor:
        self.rows, self.down = rows, round_to_bfloat16(self.scale * rows @ self.lora_a.T)
        return self.bias + rows @ self.weight.T + self.down @ self.lora_b.T

    def backward(self, grad: Tensor, factor: Tensor | float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient of the rows for ``grad``, and of A and B for ``factor * grad``."""
        up = self.scale * grad @ self.lora_b
        grad_rows = grad @ self.weight + round_to_bfloat16(up) @ self.lora_a
        grad_a = round_to_bfloat16(factor * up).T @ self.rows
        return grad_rows, grad_a, round_to_bfloat16(factor * grad).T @ self.down


def kernel_model(inputs: Inputs, activate: Activate | None = None, scale_of_grad_a: float = 1.0) -> Results:
    """What a faultless kernel computes; the two arguments are faults to seed."""
    lora = inputs.lora
    assert lora is not None
    results = {"out": torch.zeros(inputs.x.shape), "x": torch.zeros(inputs.x.shape)}
    results |= {"weights": torch.zeros(inputs.weights.shape)}
    results |= {name: torch.zeros(tensor.shape) for name, tensor in lora._asdict().items()}
    for expert in range(inputs.case.experts):
        tokens, slots = torch.where(inputs.topk_ids == expert)
        weight = inputs.weights[tokens, slots, None].float()
        base = {"gate": inputs.gate_proj, "up": inputs.up_proj, "down": inputs.down_proj}
        models = {
            name: ProjectionModel(
                tensor[expert],
                getattr(inputs.biases, name)[expert] if inputs.biases else torch.zeros(tensor.shape[1]),
                getattr(lora, f"{name}_lora_a")[expert],
                getattr(lora, f"{name}_lora_b")[expert],
                inputs.case.scale,
            )
            for name, tensor in base.items()
        }
        rows = inputs.x[tokens].float()
        gate, up = (models["gate"].forward(rows).requires_grad_(), models["up"].forward(rows).requires_grad_())
        exact_activation = (activate or inputs.activation)(gate, up)
        activation = round_to_bfloat16(exact_activation.detach())
        results["out"].index_add_(0, tokens, weight * models["down"].forward(activation))

        grads = {}
        grad_activation, *grads["down"] = models["down"].backward(inputs.dout[tokens].float(), weight)
        of_bias = inputs.dout[tokens].float() @ models["down"].bias
        results["weights"][tokens, slots] = (grad_activation * activation).sum(-1) + of_bias
        exact_activation.backward(weight * grad_activation)
        for name, leaf in (("gate", gate), ("up", up)):
            grad_rows, *grads[name] = models[name].backward(round_to_bfloat16(leaf.grad))
            results["x"].index_add_(0, tokens, grad_rows)
        for name, (grad_a, grad_b) in grads.items():
            results[f"{name}_lora_a"][expert] = grad_a * scale_of_grad_a
            results[f"{name}_lora_b"][expert] = grad_b
    dtypes = {"out": inputs.x.dtype, "x": inputs.x.dtype, "weights": inputs.weights.dtype}
    return {name: tensor.to(dtypes.get(name, inputs.case.lora_dtype)) for name, tensor in results.items()}


def test_the_oracle_has_the_gradients_that_differences_show() -> None:
    inputs = make_inputs(
        Case("gradcheck", 3, hidden=4, intermediate=5, top_k=2, rank=2, tokens=4, routing="duplicates")
    )
    tensors = [inputs.x, inputs.weights, inputs.gate_proj, inputs.up_proj, inputs.down_proj, *inputs.lora]
    leaves = [tensor.double().requires_grad_() for tensor in tensors]

    def forward(x: Tensor, weights: Tensor, gate: Tensor, up: Tensor, down: Tensor, *lora: Tensor) -> Tensor:
        return moe_reference(x, inputs.topk_ids, weights, gate, up, down, LoraTensors(*lora), scale=2.0)

    assert torch.autograd.gradcheck(forward, leaves)


def test_the_oracle_is_the_formula_of_the_contract() -> None:
    """Token by token and slot by slot, with the low-rank product merged into the weights."""
    inputs = make_inputs(replace(MEDIUM, tokens=5, routing="skipped_slots"))
    x, weights = inputs.x.double(), inputs.weights.double()
    base = {"gate": inputs.gate_proj.double(), "up": inputs.up_proj.double(), "down": inputs.down_proj.double()}
    lora = {name: tensor.double() for name, tensor in inputs.lora._asdict().items()}
    gate, up, down = (base[n] + inputs.case.scale * lora[f"{n}_lora_b"] @ lora[f"{n}_lora_a"] for n in base)
    expected = torch.zeros_like(x)
    for token, ids in enumerate(inputs.topk_ids.tolist()):
        for slot, e in enumerate(ids):
            if 0 <= e < inputs.case.experts:
                hidden = gate[e] @ x[token]
                activation = hidden * torch.sigmoid(hidden) * (up[e] @ x[token])
                expected[token] += weights[token, slot] * (down[e] @ activation)
    torch.testing.assert_close(results_of_reference(inputs, torch.float64)["out"], expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["medium", "idle_experts", "skipped_slots", "no_lora"])
def test_results_expert_by_expert_are_those_of_autograd(name: str, dtype: torch.dtype) -> None:
    """The same bits: what the yardstick calls plain torch is plain torch."""
    inputs = make_inputs(next(case for case in CASES if case.name == name))
    x, weights = (tensor.to(dtype, copy=True).requires_grad_() for tensor in (inputs.x, inputs.weights))
    lora = inputs.lora and LoraTensors(*(tensor.to(dtype, copy=True).requires_grad_() for tensor in inputs.lora))
    base = (tensor.to(dtype) for tensor in (inputs.gate_proj, inputs.up_proj, inputs.down_proj))
    out = moe_reference(x, inputs.topk_ids, weights, *base, lora, inputs.scale)
    out.backward(inputs.dout.to(dtype))
    grads = {name: tensor.grad for name, tensor in (lora._asdict() if lora else {}).items()}
    expected = {"out": out.detach(), "x": x.grad, "weights": weights.grad, **grads}
    results = results_of_reference(inputs, dtype)
    assert results.keys() == expected.keys()
    assert [name for name in results if not torch.equal(results[name], expected[name])] == []


def test_no_token_gives_an_empty_result_with_a_backward() -> None:
    results = results_of_reference(make_inputs(replace(MEDIUM, tokens=0)), torch.float64)
    assert results["out"].shape == (0, MEDIUM.hidden)
    assert all(not gradient.any() for gradient in results.values())


@pytest.mark.parametrize("case", [case for case in CASES if case.rank], ids=str)
def test_the_yardstick_passes_the_roundings_of_the_design(case: Case) -> None:
    inputs = make_inputs(case)
    check(kernel_model(inputs), inputs)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_yardstick_passes_float32_arithmetic(case: Case) -> None:
    inputs = make_inputs(case)
    check(results_of_reference(inputs, torch.float32), inputs)


def test_the_yardstick_refuses_plain_bfloat16() -> None:
    inputs = make_inputs(MEDIUM)
    with pytest.raises(AssertionError, match="TOO WRONG"):
        check(results_of_reference(inputs, torch.bfloat16), inputs)


def stale_expert(inputs: Inputs) -> Results:
    """The last expert computes with adapters that were never updated."""
    stale = LoraTensors(*(tensor.clone() for tensor in inputs.lora))
    stale.down_lora_b[-1] *= 0.9
    return kernel_model(replace(inputs, lora=stale))


def swapped_gate_and_up(inputs: Inputs) -> Results:
    a, b, c, d, *down = inputs.lora
    swapped = replace(inputs, gate_proj=inputs.up_proj, up_proj=inputs.gate_proj, lora=LoraTensors(c, d, a, b, *down))
    return kernel_model(swapped)


def only_first_columns(inputs: Inputs) -> Results:
    return {name: torch.where(torch.arange(t.shape[-1]) < 128, t, 0) for name, t in kernel_model(inputs).items()}


FAULTS: dict[str, Callable[[Inputs], Results]] = {
    "silu off by 1 %": lambda inputs: kernel_model(inputs, activate=lambda gate, up: silu(gate) * up * 1.01),
    "scale missing in dA": lambda inputs: kernel_model(inputs, scale_of_grad_a=1 / inputs.case.scale),
    "gate and up swapped": swapped_gate_and_up,
    "one stale expert": stale_expert,
    "only the first 128 columns": only_first_columns,
    "a NaN": lambda inputs: kernel_model(
        inputs, activate=lambda gate, up: silu(gate) * up * torch.where(gate > 2, torch.nan, 1.0)
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_yardstick_catches(fault: str) -> None:
    inputs = make_inputs(MEDIUM)
    with pytest.raises(AssertionError, match="TOO WRONG"):
        check(FAULTS[fault](inputs), inputs)


def test_a_reference_that_is_mostly_zeros_proves_nothing() -> None:
    inputs = make_inputs(MEDIUM)
    inputs = replace(inputs, weights=torch.zeros_like(inputs.weights))
    with pytest.raises(AssertionError, match="proves nothing"):
        check(results_of_reference(inputs, torch.float32), inputs)


def test_expert_ids_of_any_strides_are_judged() -> None:
    inputs = make_inputs(CASES[0])
    strided = replace(inputs, topk_ids=inputs.topk_ids.t().contiguous().t())
    assert not strided.topk_ids.is_contiguous()
    check(results_of_reference(strided, torch.float32), strided)


def test_what_no_token_reaches_must_be_exactly_zero() -> None:
    inputs = make_inputs(next(case for case in CASES if case.routing == "idle_experts"))
    results = results_of_reference(inputs, torch.float32)
    results["up_lora_a"][-1, 0, 0] = 1e-30
    with pytest.raises(AssertionError, match="not exactly zero"):
        check(results, inputs)


class ReferenceLayer(torch.nn.Module):
    """The reference as a module, with LoRA values of its own that `results_of_layer` must overwrite."""

    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        self.inputs = inputs
        for name, tensor in inputs.lora._asdict().items():
            self.register_parameter(name, torch.nn.Parameter(torch.full_like(tensor, 7.0)))

    def forward(self, x: Tensor, topk_ids: Tensor, weights: Tensor) -> Tensor:
        base = (t.float() for t in (self.inputs.gate_proj, self.inputs.up_proj, self.inputs.down_proj))
        lora = LoraTensors(*self.parameters())
        return moe_reference(x.float(), topk_ids, weights, *base, lora, self.inputs.case.scale).to(x.dtype)


def test_results_of_a_layer_are_those_of_its_inputs() -> None:
    inputs = make_inputs(MEDIUM)
    check(results_of_layer(ReferenceLayer(inputs), inputs), inputs)
