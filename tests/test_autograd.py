"""Autograd in every order: each call keeps its own data, and changes behind its back are seen or refused."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import EVERY_ISA, build_kernels, case_named, copied, different, launches, layer_of, same_bits, usable_isas
from torch.utils.checkpoint import checkpoint
from yardstick import Inputs, Results, check, make_inputs, results_of_layer

from jitmoe import MoELayer
from jitmoe.experts.supplies import supplied
from jitmoe.experts.workspace import Blocks
from jitmoe.isa import ISAS
from jitmoe.oracle.reference import LoraTensors
from jitmoe.plan.placement import ITEM_BYTES
from jitmoe.plan.scratch import saved_tensors

ISA = usable_isas()[0]
SMALL = case_named("small")


@pytest.fixture(scope="module", autouse=True)
def kernels_are_built() -> None:
    build_kernels([SMALL, case_named("no_lora")], [ISA])


@pytest.fixture(params=[False, True], ids=["saves", "recomputes"])
def layer(request: pytest.FixtureRequest) -> MoELayer:
    return layer_of(make_inputs(SMALL), ISA, recompute=request.param)


@pytest.fixture
def first() -> Inputs:
    return make_inputs(SMALL)


@pytest.fixture
def second(first: Inputs) -> Inputs:
    """Other tokens and routing, another count of tokens, the same layer."""
    other = make_inputs(replace(SMALL, tokens=37, seed=1))
    return replace(other, gate_proj=first.gate_proj, up_proj=first.up_proj, down_proj=first.down_proj, lora=first.lora)


class Pending:
    """A forward whose backward has not run yet; leaves of its own, LoRA parameters shared."""

    def __init__(self, layer: MoELayer, inputs: Inputs, run: Callable[..., torch.Tensor] | None = None) -> None:
        self.inputs = inputs
        self.x = inputs.x.clone().requires_grad_()
        self.weights = inputs.weights.clone().requires_grad_()
        self.out = (run or layer)(self.x, inputs.topk_ids, self.weights)

    def backward(self, **options: bool) -> None:
        self.out.backward(self.inputs.dout, **options)

    def own(self) -> Results:
        return {"out": self.out.detach(), "x": self.x.grad, "weights": self.weights.grad}


def alone(layer: MoELayer, inputs: Inputs) -> Results:
    """Results of one call by itself, as copies; leaves no gradient behind."""
    results = copied(results_of_layer(layer, inputs))
    layer.zero_grad()
    return results


def own(results: Results) -> Results:
    return {name: results[name] for name in ("out", "x", "weights")}


def lora_grads(layer: MoELayer) -> Results:
    return {name: layer.get_parameter(name).grad.clone() for name in LoraTensors._fields}


def lora(results: Results) -> Results:
    return {name: results[name] for name in LoraTensors._fields}


def test_backwards_in_reverse(layer: MoELayer, first: Inputs, second: Inputs) -> None:
    expected = alone(layer, first), alone(layer, second)
    one, two = Pending(layer, first), Pending(layer, second)
    two.backward()
    one.backward()
    assert different(one.own(), own(expected[0])) == []
    assert different(two.own(), own(expected[1])) == []
    sums = {name: expected[1][name] + expected[0][name] for name in LoraTensors._fields}
    assert different(lora_grads(layer), sums) == []


def test_a_forward_between_forward_and_backward(layer: MoELayer, first: Inputs, second: Inputs) -> None:
    expected = alone(layer, first)
    pending = Pending(layer, first)
    with torch.no_grad():
        layer(second.x, second.topk_ids, second.weights)
    pending.backward()
    assert different(pending.own() | lora_grads(layer), expected) == []


def test_accumulation(layer: MoELayer, first: Inputs) -> None:
    expected = alone(layer, first)
    for _ in range(2):
        Pending(layer, first).backward()
    assert different(lora_grads(layer), {name: value + value for name, value in lora(expected).items()}) == []


def test_retained_graph_gives_the_same_twice(layer: MoELayer, first: Inputs) -> None:
    expected = alone(layer, first)
    pending = Pending(layer, first)
    pending.backward(retain_graph=True)
    assert different(pending.own() | lora_grads(layer), expected) == []
    pending.x.grad = pending.weights.grad = None
    layer.zero_grad()
    pending.backward()
    assert different(pending.own() | lora_grads(layer), expected) == []


def test_backward_twice_without_retaining_is_torchs_error(layer: MoELayer, first: Inputs) -> None:
    expected = lora(alone(layer, first))
    pending = Pending(layer, first)
    pending.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        pending.backward()
    assert different(lora_grads(layer), expected) == []


def test_double_backward_is_torchs_error(layer: MoELayer, first: Inputs) -> None:
    pending = Pending(layer, first)
    (grad,) = torch.autograd.grad(pending.out, pending.x, first.dout.clone().requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(layer: MoELayer, first: Inputs, second: Inputs, use_reentrant: bool) -> None:
    expected = alone(layer, first)

    def run(*arguments: torch.Tensor) -> torch.Tensor:
        return checkpoint(layer, *arguments, use_reentrant=use_reentrant)

    pending = Pending(layer, first, run)
    alone(layer, second)
    pending.backward()
    assert different(pending.own() | lora_grads(layer), expected) == []


def test_no_grad_saves_nothing(layer: MoELayer, first: Inputs) -> None:
    expected = alone(layer, first)
    with launches() as seen:
        with torch.no_grad():
            out = layer(first.x, first.topk_ids, first.weights)
        assert same_bits(out, expected["out"]) and not out.requires_grad
        Pending(layer, first)
    saves = not layer.config.recompute
    for name in ("gate.saved", "up.saved"):
        assert [bool(launch.record[name]) for launch in seen] == [False, saves]


def test_hooks_see_gradients_and_can_change_them(layer: MoELayer, first: Inputs) -> None:
    expected = alone(layer, first)
    seen: list[torch.Tensor] = []
    handles = [layer.up_lora_a.register_hook(lambda grad: grad * 2)]
    handles += [layer.register_full_backward_hook(lambda *arguments: seen.append(arguments[1][0]))]
    pending = Pending(layer, first)
    pending.backward()
    for handle in handles:
        handle.remove()
    assert same_bits(layer.up_lora_a.grad, expected["up_lora_a"] * 2)
    assert same_bits(seen[0], expected["x"])


def test_saved_tensor_hooks(layer: MoELayer, first: Inputs) -> None:
    """As in torch.autograd.graph.save_on_cpu: what is saved may come back as another tensor."""
    expected = alone(layer, first)
    sizes: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.untyped_storage().nbytes())
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        pending = Pending(layer, first)
    pending.backward()
    assert different(pending.own() | lora_grads(layer), expected) == []
    assert layer.packed_gate.untyped_storage().nbytes() not in sizes, "the frozen base is not a saved tensor"


def test_only_what_wants_a_gradient_gets_one(layer: MoELayer, first: Inputs) -> None:
    expected = alone(layer, first)
    choices = [("x",), ("weights",), ("gate_lora_b",), ("x", "down_lora_a"), ("weights", "up_lora_a", "up_lora_b")]
    for wanted in choices:
        x, weights = first.x.clone(), first.weights.clone()
        leaves = {"x": x, "weights": weights, **dict(layer.named_parameters())}
        for name, leaf in leaves.items():
            leaf.grad = None
            leaf.requires_grad_(name in wanted)
        layer(x, first.topk_ids, weights).backward(first.dout)
        assert {name for name, leaf in leaves.items() if leaf.grad is not None} == set(wanted)
        for name in wanted:
            assert same_bits(leaves[name].grad, expected[name]), (wanted, name)


def test_nothing_wants_a_gradient(layer: MoELayer, first: Inputs) -> None:
    layer.requires_grad_(False)
    assert not layer(first.x, first.topk_ids, first.weights).requires_grad


def test_grad_of_a_slice_and_of_an_expanded_gradient(layer: MoELayer, first: Inputs) -> None:
    """Gradients come in any stride: zero from ``sum()``, column-major from a transpose."""
    pending = Pending(layer, first)
    pending.out.sum().backward()
    ones = alone(layer, replace(first, dout=torch.ones_like(first.dout)))
    assert same_bits(pending.x.grad, ones["x"])

    pending = Pending(layer, first)
    pending.out.T.backward(first.dout.T.contiguous())
    assert same_bits(pending.x.grad, alone(layer, first)["x"])


def test_nodes_before_and_after(layer: MoELayer, first: Inputs) -> None:
    """x that is no leaf, the result used twice, the layer applied twice."""
    leaf = first.x.float().requires_grad_()
    hidden = layer((leaf * 2).bfloat16(), first.topk_ids, first.weights)
    out = layer(hidden, first.topk_ids, first.weights) + hidden
    out.backward(first.dout)
    assert leaf.grad.isfinite().all() and leaf.grad.count_nonzero() > leaf.numel() // 2
    layer.zero_grad()

    inner = Pending(layer, replace(first, x=(first.x.float() * 2).bfloat16()))
    outer = Pending(layer, replace(first, x=inner.out.detach()))
    outer.backward()
    inner.out.backward(outer.x.grad + first.dout)
    assert same_bits(leaf.grad, inner.x.grad.float() * 2)


class PoisonedBlocks(Blocks):
    """All bits of what is taken are set: a NaN in bfloat16 and in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.reused = 0

    def take(self, nbytes: int) -> np.ndarray:
        before = self.held_bytes()
        block = super().take(nbytes)
        self.reused += self.held_bytes() < before
        block[:] = 0xFF
        return block


@contextmanager
def poisoned_blocks() -> Iterator[PoisonedBlocks]:
    """Tensors of any size take these."""
    with supplied(block_bytes=0, blocks=PoisonedBlocks()) as present:
        yield present.blocks


@pytest.fixture
def small_ones_too() -> Iterator[Callable[[], PoisonedBlocks]]:
    """From the call on, tensors of any size take poisoned blocks."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(poisoned_blocks())


class TestReusedMemory:
    def test_backwards_in_reverse(
        self, layer: MoELayer, first: Inputs, second: Inputs, small_ones_too: Callable[[], PoisonedBlocks]
    ) -> None:
        expected = alone(layer, first), alone(layer, second)
        sums = {name: expected[1][name] + expected[0][name] for name in LoraTensors._fields}
        blocks = small_ones_too()
        for _ in range(3):
            one, two = Pending(layer, first), Pending(layer, second)
            two.backward()
            one.backward()
            assert different(one.own(), own(expected[0])) == []
            assert different(two.own(), own(expected[1])) == []
            assert different(lora_grads(layer), sums) == []
            layer.zero_grad()
        assert blocks.reused > 10

    def test_what_is_saved_is_held_until_backward(
        self, layer: MoELayer, first: Inputs, small_ones_too: Callable[[], PoisonedBlocks]
    ) -> None:
        blocks = small_ones_too()
        pending = Pending(layer, first)
        assert blocks.held_bytes() == 0
        pending.backward()
        saved = [] if layer.config.recompute else saved_tensors(96, first.topk_ids.numel(), rank=8)
        assert blocks.held_bytes() == sum(np.prod(s.shape) * ITEM_BYTES[s.dtype] for s in saved)
        del pending
        layer.zero_grad()
        assert blocks.held_bytes() > first.x.nbytes

    def test_results_that_are_kept_stay_as_they_are(
        self, layer: MoELayer, first: Inputs, second: Inputs, small_ones_too: Callable[[], PoisonedBlocks]
    ) -> None:
        blocks = small_ones_too()
        pending = Pending(layer, first)
        pending.backward()
        kept = {**pending.own(), **{name: layer.get_parameter(name).grad for name in LoraTensors._fields}}
        parts = {name: value[1:] for name, value in kept.items()}
        copies = {name: value.clone() for name, value in kept.items()}
        views = {name: value[1:] for name, value in copies.items()}
        del pending
        for round_ in range(4):
            layer.zero_grad(set_to_none=True)
            Pending(layer, second).backward()
            Pending(layer, first)
            assert different(kept or parts, copies if kept else views) == []
            if round_ == 1:
                kept.clear()
        assert different(parts, views) == [] and blocks.reused > 10

    def test_results_can_be_written_in_place(
        self, layer: MoELayer, first: Inputs, small_ones_too: Callable[[], PoisonedBlocks]
    ) -> None:
        """As for small ones: torch would refuse it if the memory were seen to be a view of a block."""
        expected = alone(layer, first)
        small_ones_too()
        pending = Pending(layer, first)
        pending.out += 1
        pending.backward()
        assert different(pending.own() | lora_grads(layer), {**expected, "out": expected["out"] + 1}) == []
        pending.x.grad.add_(1)
        layer.gate_lora_a.grad.mul_(2)

    @pytest.mark.parametrize("chosen", [[2], [0, 3], [1, 2], [0, 1, 3]], ids=str)
    def test_gradients_of_experts_without_rows_are_zero(
        self, layer: MoELayer, first: Inputs, small_ones_too: Callable[[], PoisonedBlocks], chosen: list[int]
    ) -> None:
        """Few experts with rows, whose gradients are fresh zeros, and many."""
        inputs = replace(first, topk_ids=torch.tensor(chosen)[first.topk_ids % len(chosen)])
        expected = alone(layer, inputs)
        blocks = small_ones_too()
        for _ in range(2):
            Pending(layer, inputs).backward()
            grads = lora_grads(layer)
            assert different(grads, lora(expected)) == []
            for name, grad in grads.items():
                per_expert = grad.flatten(1)
                assert per_expert.isfinite().all(), name
                assert per_expert.any(1).tolist() == [expert in chosen for expert in range(4)], name
            layer.zero_grad()
        assert blocks.reused

    @EVERY_ISA
    def test_an_expert_in_many_groups_adds_its_gradients(self, isa: str) -> None:
        """Its first rows write over what was in the memory, the others add to it; saved or computed again."""
        inputs = make_inputs(replace(SMALL, tokens=200))
        m_step = ISAS[isa].m_steps[0]
        layers = [layer_of(inputs, isa, m_step=m_step, recompute=recompute) for recompute in (False, True)]
        with supplied(group_bytes=1), launches() as seen:
            expected = alone(layers[0], inputs)
            assert all(launch.record["groups"] > SMALL.experts for launch in seen), "no expert was cut"
            check(expected, inputs)
            with poisoned_blocks():
                for layer in layers * 2:
                    assert different(alone(layer, inputs), expected) == []


class TestChangedBehindOurBack:
    @pytest.mark.parametrize("name", ["x", "weights"])
    def test_an_input_changed_before_backward_is_torchs_version_error(
        self, layer: MoELayer, first: Inputs, name: str
    ) -> None:
        pending = Pending(layer, first)
        with torch.no_grad():
            getattr(pending, name).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            pending.backward()
        assert all(p.grad is None for p in layer.parameters())

    def test_a_parameter_changed_before_backward_is_torchs_version_error(self, layer: MoELayer, first: Inputs) -> None:
        pending = Pending(layer, first)
        with torch.no_grad():
            layer.down_lora_b.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            pending.backward()

    @pytest.mark.parametrize("name", LoraTensors._fields)
    @pytest.mark.parametrize("way", ["data", "no_grad", "new"])
    def test_lora_changes_are_seen_by_the_next_forward(
        self, layer: MoELayer, first: Inputs, name: str, way: str
    ) -> None:
        """Nothing of LoRA is kept between calls, so that no write can be missed."""
        before = layer(first.x, first.topk_ids, first.weights)
        parameter = layer.get_parameter(name)
        if way == "data":
            parameter.data.add_(0.5)
        elif way == "no_grad":
            with torch.no_grad():
                parameter.add_(0.5)
        else:
            setattr(layer, name, torch.nn.Parameter(parameter.detach() + 0.5))
        fresh = layer_of(replace(first, lora=LoraTensors(**lora_values(layer))), ISA)
        after = layer(first.x, first.topk_ids, first.weights)
        assert not same_bits(after, before)
        assert same_bits(after, fresh(first.x, first.topk_ids, first.weights))

    def test_optimizer_steps(self, layer: MoELayer, first: Inputs) -> None:
        optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
        losses = []
        for _ in range(6):
            optimizer.zero_grad()
            loss = (layer(first.x, first.topk_ids, first.weights).float() - first.dout.float()).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses == sorted(losses, reverse=True) and len(set(losses)) == len(losses)
        fresh = layer_of(replace(first, lora=LoraTensors(**lora_values(layer))), ISA)
        assert same_bits(layer(first.x, first.topk_ids, first.weights), fresh(first.x, first.topk_ids, first.weights))


def lora_values(layer: MoELayer) -> Results:
    return {name: layer.get_parameter(name).detach().clone() for name in LoraTensors._fields}
