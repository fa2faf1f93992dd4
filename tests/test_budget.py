"""The plan of all memory against the layer's real tensors, and the limit on it."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import (
    build_kernels,
    case_named,
    changed_by,
    config_of,
    different,
    frozen_of,
    layer_of,
    same_bits,
    usable_isas,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from yardstick import make_inputs, results_of_layer

import jitmoe
from jitmoe import MemoryPlan, MoEConfig, MoELayer
from jitmoe.errors import BudgetError, ConfigError
from jitmoe.experts import pack, workspace
from jitmoe.experts.observer import Launch
from jitmoe.experts.supplies import supplied, supplies
from jitmoe.inspect.capture import node_of
from jitmoe.jit.kernels import array_at
from jitmoe.memory.plan import kernels_of, plan_layer
from jitmoe.memory.tensors import KINDS
from jitmoe.plan.groups import Extents, plan_groups
from jitmoe.plan.placement import prove
from jitmoe.plan.projections import LORA_NAMES
from jitmoe.plan.scratch import plan_backward, plan_forward, row_bytes

W6 = MoEConfig(num_experts=256, hidden_size=7168, intermediate_size=2048, top_k=8, lora_rank=16, isa="avx512")
W6_TOKENS = 25600
ISA = usable_isas()[0]
CASE = case_named("ragged_31")


@pytest.fixture(scope="module", autouse=True)
def kernels_are_built() -> None:
    build_kernels([CASE, replace(CASE, lora_dtype=torch.bfloat16)], [ISA])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("lora_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_the_plan_names_the_tensors_that_really_exist(recompute, lora_dtype, x_dtype):
    """Shape, dtype and bytes of each, as the layer, autograd and the kernels see them."""
    case = replace(CASE, lora_dtype=lora_dtype)
    inputs = make_inputs(case)
    layer = layer_of(inputs, ISA, recompute=recompute)
    x, weights = inputs.x.to(x_dtype).requires_grad_(), inputs.weights.float().requires_grad_()
    seen: list[Launch] = []
    operands: dict[str, torch.Tensor] = {}
    made: dict[int, torch.Tensor] = {}

    def note(launch: Launch) -> None:
        """What the kernels are told, and copies of the operands, which are gone after the pass."""
        seen.append(launch)
        for field, name in (("x", "x"), ("out_grad", "out.grad")):
            if address := int(launch.record[field]):
                bits = array_at(address, np.int16, tuple(inputs.x.shape)).copy()
                operands[f"{launch.pass_name} {name} operand"] = torch.from_numpy(bits).view(torch.bfloat16)

    def noted(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate_and_keep(*arguments: object) -> torch.Tensor:
            tensor = allocate(*arguments)
            return made.setdefault(tensor.data_ptr(), tensor)

        return allocate_and_keep

    with supplied(empty=noted(supplies().empty), zeros=noted(supplies().zeros)), changed_by(note):
        out = layer(x, inputs.topk_ids, weights)
        node = node_of(out)
        saved = node.saved_tensors
        out.backward(inputs.dout.to(x_dtype))

    found = {"x": x, "weights": weights, "topk_ids": inputs.topk_ids, "out": out, "x.grad": x.grad}
    found |= {"weights.grad": weights.grad, "out.grad": inputs.dout.to(x_dtype)}
    found |= dict(layer.named_parameters()) | frozen_of(layer)
    found |= {f"{name}.grad": parameter.grad for name, parameter in layer.named_parameters()}
    for name in LORA_NAMES:
        memory = made[int(seen[1].record[f"{name.replace('_lora_', '.')}_grad"])]
        found[f"new {name}.grad"] = memory.view(layer.get_parameter(name).shape)
    found["saved topk_ids"] = saved[1]
    found |= dict(zip(node.saved_names, saved[3 + len(LORA_NAMES) :], strict=True))
    for launch in seen:
        arrays = {
            "row_token": launch.route.row_token,
            "row_slot": launch.route.row_slot,
            "row_weight": launch.row_weight,
        }
        found |= {f"{launch.pass_name} {name}": torch.from_numpy(array) for name, array in arrays.items()}
    operands["out.grad operand"] = operands.pop("backward out.grad operand")
    for name, operand in operands.items():
        assert same_bits(operand, inputs.dout if "out.grad" in name else inputs.x.bfloat16()), name
    assert {int(launch.record["x"]) == x.data_ptr() for launch in seen} == {x_dtype == torch.bfloat16}
    found |= operands if x_dtype == torch.float32 else {}
    if lora_dtype == torch.bfloat16:
        found |= {f"new {name}.grad, cast": parameter.grad for name, parameter in layer.named_parameters()}

    planned = MemoryPlan.of(layer.config, case.tokens, 1, x_dtype=str(x_dtype).removeprefix("torch."))
    real = {name: (tuple(t.shape), str(t.dtype).removeprefix("torch."), t.nbytes) for name, t in found.items()}
    assert {t.name: (t.shape, t.dtype, t.nbytes) for t in planned.held} == real
    kept = {t.data_ptr() for t in saved} - {p.data_ptr() for p in layer.parameters()}
    saved_names = {t.name for t in planned.held if t.kind == "saved"}
    assert {found[name].data_ptr() for name in saved_names} == kept


def test_without_gradients_nothing_is_saved():
    planned = MemoryPlan.of(config_of(CASE, ISA), CASE.tokens, training=False)
    assert {"saved", "gradient"}.isdisjoint(planned.by_kind())
    assert [item.name for item in planned.passes] == ["forward"]
    inputs = make_inputs(CASE)
    with torch.no_grad():
        assert layer_of(inputs, ISA)(inputs.x, inputs.topk_ids, inputs.weights).grad_fn is None


def test_bytes_of_a_step_are_those_of_what_is_alive():
    planned = MemoryPlan.of(replace(W6, lora_dtype="bfloat16"), 1000, 4)
    for step in range(len(planned.steps)):
        alive = [row.nbytes for row in planned.rows() if row.offset is None and row.first <= step <= row.last]
        assert planned.bytes_at(step) == sum(alive) + (planned.arena if step else 0)
    assert planned.nbytes == max(map(planned.bytes_at, range(len(planned.steps)))) == sum(planned.by_kind().values())
    assert planned.arena == max(item.scratch.nbytes for item in planned.passes)
    assert list(planned.by_kind()) == [kind for kind in KINDS if kind in planned.by_kind()]
    assert planned.steps[planned.peak_step] == "return", "the cast gradients are beside the float32 ones"


def test_the_text_has_every_buffer():
    planned = MemoryPlan.of(W6, 1000, 4)
    lines = str(planned).splitlines()
    for row in planned.rows():
        line = next(line for line in lines if line.startswith(row.kind) and f" {row.name} " in line)
        assert row.dtype in line and f" {row.first}-{row.last}" in line
        assert line.endswith(str(row.offset)) == (row.offset is not None)
    assert "steps: 0 layer, 1 forward load" in str(planned)


@pytest.mark.parametrize("isa", ["amx", "avx512_bf16", "avx512"])
@pytest.mark.parametrize("threads", [2, 56])
def test_a_very_large_model(isa, threads):
    """The ancestor asked for 4 TB here."""
    config = replace(W6, isa=isa)

    def scratch_and_saved(**options: bool) -> int:
        kinds = MemoryPlan.of(config, W6_TOKENS, threads, **options).by_kind()
        return kinds["scratch"] + kinds["saved"]

    assert scratch_and_saved() <= 4.0e9
    assert scratch_and_saved(recompute=True) <= 2.2e9
    one, thousand = (MemoryPlan.of(config, tokens, threads).arena for tokens in (W6_TOKENS, 1000 * W6_TOKENS))
    assert thousand - one == 999 * W6_TOKENS * W6.hidden_size * 4, "only the token sums grow"


@pytest.mark.parametrize("training", [False, True])
def test_the_largest_sizes_do_not_overflow(training):
    most = 1 << 40
    planned = MemoryPlan.of(replace(W6, num_experts=most, top_k=most), most, most, training)
    for item in planned.passes:
        prove(item.scratch)
        assert all(isinstance(p.offset, int) and p.offset >= 0 for p in item.scratch.placed)
    slots = most * most
    assert all(row.nbytes > 0 for row in planned.rows())
    gate = next(t for t in planned.held if t.name == ("gate.saved" if training else "forward row_token"))
    assert gate.nbytes == slots * (2 * 2048 if training else 8)


@pytest.mark.parametrize(
    "wrong", [{"tokens": -1}, {"tokens": 2**41}, {"tokens": 1.5}, {"threads": 0}, {"x_dtype": "f"}]
)
def test_numbers_that_make_no_call(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        MemoryPlan.of(**({"config": W6, "tokens": 1} | wrong))
    with pytest.raises(ConfigError, match="num_experts"):
        MemoryPlan.of(replace(W6, num_experts=0), 1)
    with pytest.raises(ConfigError, match="hidden_size"):
        MemoryPlan.of(replace(W6, hidden_size=-1), 1)


@st.composite
def routings(draw: st.DrawFn) -> tuple[MoEConfig, list[int]]:
    """A config, and how many rows each of its experts gets: few or very many, from even to a single expert."""
    config = MoEConfig(
        num_experts=draw(st.integers(1, 24)),
        hidden_size=draw(st.sampled_from([33, 512, 7168])),
        intermediate_size=draw(st.sampled_from([50, 1024])),
        top_k=1,
        lora_rank=draw(st.sampled_from([0, 5])),
        isa=draw(st.sampled_from(["amx", "avx512_bf16", "avx512", "avx2"])),
        recompute=draw(st.booleans()),
        allow_skip=draw(st.booleans()),
        batch_invariant=draw(st.booleans()),
    )
    most = draw(st.sampled_from([3, 60, 2000]))
    return config, [draw(st.one_of(st.just(0), st.integers(0, most))) for _ in range(config.num_experts)]


@settings(max_examples=200)
@given(routings(), st.integers(0, 300), st.sampled_from([1, 64]))
def test_no_routing_needs_more_scratch_than_the_plan(routing, skipped, threads):
    config, counts = routing
    rows = sum(counts)
    tokens = rows + skipped if config.allow_skip else rows
    planned = MemoryPlan.of(config, tokens, threads)
    active = np.flatnonzero(counts)
    offsets = np.cumsum([0, *(counts[expert] for expert in active)])
    shape = kernels_of(config).select(rows, active.size)

    def size(training: bool) -> Extents:
        groups = plan_groups(active, offsets, shape.m_step, row_bytes(shape, training))
        return groups.extents(tokens, config.lora_rank, threads)

    forward, backward = planned.passes
    assert plan_forward(shape, size(False)).nbytes <= forward.scratch.nbytes
    assert plan_backward(shape, size(True), True, config.recompute).nbytes <= backward.scratch.nbytes


@pytest.mark.parametrize("tokens", [1, 48, 1024])
def test_the_worst_scratch_is_not_far_above_that_of_real_routings(tokens):
    config = MoEConfig(64, 2048, 1408, 6, isa="avx512")
    planned = kernels_of(config)
    slots, found = 6 * tokens, []
    for heavy in range(0, slots + 1, max(slots // 40, 1)):
        light = slots - heavy
        counts = np.full(63, light // 63) + (np.arange(63) < light % 63)
        counts = np.array([heavy, *counts])
        active = np.flatnonzero(counts)
        shape = planned.select(slots, active.size)
        offsets = np.cumsum([0, *counts[active]])
        groups = plan_groups(active, offsets, shape.m_step, row_bytes(shape, True))
        found.append(plan_backward(shape, groups.extents(tokens, rank=8, threads=2), True, False).nbytes)
    assert max(found) <= MemoryPlan.of(config, tokens, 2).passes[1].scratch.nbytes <= 1.1 * max(found)


class TestLimit:
    @pytest.fixture
    def inputs(self):
        return make_inputs(CASE)

    def test_of_the_layer_before_anything_is_allocated(self, inputs, monkeypatch):
        config = config_of(CASE, ISA)
        needed = plan_layer(config).nbytes
        layer = MoELayer(replace(config, memory_budget=needed), inputs.gate_proj, inputs.up_proj, inputs.down_proj)
        held = [*layer.parameters(), *frozen_of(layer).values()]
        assert needed == sum(tensor.nbytes for tensor in held)

        def never(*_: object) -> None:
            raise AssertionError("something was allocated or read")

        monkeypatch.setattr(pack, "allocate", never)
        monkeypatch.setattr(torch, "empty", never)
        with pytest.raises(BudgetError, match=f"take {needed} bytes.*memory_budget is {needed - 1}") as refused:
            MoELayer(replace(config, memory_budget=needed - 1), never, never, never)
        for kind in ("packed weight", "parameter", "total"):
            assert f"\n{kind}" in str(refused.value)
        assert isinstance(refused.value, MemoryError) and isinstance(refused.value, jitmoe.errors.JitmoeError)

    @pytest.mark.parametrize("training", [False, True])
    def test_of_a_call_which_changes_nothing(self, inputs, training):
        threads = torch.get_num_threads()
        needed = MemoryPlan.of(config_of(CASE, ISA), CASE.tokens, threads, training).nbytes
        layer = layer_of(inputs, ISA, memory_budget=needed)
        with torch.set_grad_enabled(training):
            expected = layer(inputs.x, inputs.topk_ids, inputs.weights).detach()
        state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        layer.config = replace(layer.config, memory_budget=needed - 1)
        workspace.arenas.release()

        def never(*_: object) -> None:
            raise AssertionError("planned or allocated")

        x = inputs.x.clone().requires_grad_()
        not_routed = inputs.topk_ids + CASE.experts  # routing would refuse them
        with (
            supplied(**dict.fromkeys(("empty", "zeros", "load", "plan_forward"), never)),
            torch.set_grad_enabled(training),
            pytest.raises(BudgetError, match=f"{CASE.tokens} tokens takes {needed} bytes.*\n.*\n(?s:.*)scratch"),
        ):
            layer(x, not_routed, inputs.weights)
        assert workspace.arenas.held_bytes() == 0
        assert different(dict(layer.state_dict()), state) == []
        assert x.grad is None and all(parameter.grad is None for parameter in layer.parameters())
        layer.config = replace(layer.config, memory_budget=needed)
        with torch.set_grad_enabled(training):
            assert torch.equal(layer(inputs.x, inputs.topk_ids, inputs.weights), expected)

    def test_a_budget_too_small_for_training_serves_inference(self, inputs):
        config = config_of(CASE, ISA)
        needed = MemoryPlan.of(config, CASE.tokens, torch.get_num_threads(), training=False).nbytes
        layer = layer_of(inputs, ISA, memory_budget=needed)
        with pytest.raises(BudgetError):
            layer(inputs.x, inputs.topk_ids, inputs.weights)
        with torch.no_grad():
            layer(inputs.x, inputs.topk_ids, inputs.weights)

    def test_float32_inputs_and_cast_parameters_count_as_they_are(self, inputs):
        config = config_of(CASE, ISA)
        threads = torch.get_num_threads()
        needed = MemoryPlan.of(config, CASE.tokens, threads).nbytes
        layer = layer_of(inputs, ISA, memory_budget=needed)
        with pytest.raises(BudgetError):
            layer(inputs.x.float(), inputs.topk_ids, inputs.weights)
        cast = MemoryPlan.of(replace(config, lora_dtype="bfloat16"), CASE.tokens, threads).nbytes
        assert cast != needed
        layer.config = replace(config, memory_budget=cast)
        with pytest.raises(BudgetError):
            layer(inputs.x, inputs.topk_ids, inputs.weights)
        results_of_layer(layer.bfloat16(), inputs)

    @pytest.mark.parametrize("wrong", [0, -1, 1.5, True, "4 GB"])
    def test_what_is_no_budget(self, wrong):
        with pytest.raises(ConfigError, match="memory_budget"):
            replace(W6, memory_budget=wrong)

    def test_the_ancestors_explosion_is_refused(self):
        def never(expert: int) -> torch.Tensor:
            raise AssertionError("the source was asked")

        with pytest.raises(BudgetError, match="packed weight"):
            MoELayer(replace(W6, isa=ISA, memory_budget=16 << 30), never, never, never)
