"""Parts of the intermediate dimension: right by the yardstick, the same bits on any machine, on the nodes it has."""

import copy
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from helpers import (
    case_named,
    copied,
    different,
    frozen_of,
    launches,
    layer_of,
    on_threads,
    same_bits,
    set_lora,
    usable_isas,
)
from quantized import PACKINGS, options_of, packing_named, pair_of, random_quantized
from test_formats import kernels_of
from yardstick import CASES, Case, Inputs, check, make_inputs, results_of_layer

from jitmoe import MemoryPlan, MoEConfig, MoELayer, moe_experts
from jitmoe.errors import BudgetError, ConfigError
from jitmoe.experts.functional import Adapters, FusedAdapters
from jitmoe.experts.pack import decode_parts, empty_packed, pack_parts, unpack_parts
from jitmoe.experts.slices import extent_of
from jitmoe.experts.supplies import supplied, supplies
from jitmoe.oracle.formats import dequantize
from jitmoe.oracle.reference import LoraTensors
from jitmoe.plan.parts import parts_of
from jitmoe.plan.projections import projections

ISA = usable_isas()[0]

PARTS = (1, 2, 3, 5)

FAST = {"ragged_100": (5,), "gpt_oss": (3,), "skipped_slots": (2,)}
"""Cells that `make test` runs: five parts, of which one has 2 columns; biases; skipped slots."""

CASE = case_named("ragged_100")

SMALL = MoEConfig(num_experts=4, hidden_size=64, intermediate_size=96, top_k=2)


def cells() -> Iterator[pytest.param]:
    for case in CASES:
        for parts in PARTS:
            if parts <= -(-case.intermediate // 32):
                marks = [] if parts in FAST.get(case.name, ()) else [pytest.mark.slow]
                yield pytest.param(case, parts, marks=marks, id=f"{case}-{parts}")


@pytest.mark.parametrize(("case", "parts"), list(cells()))
def test_every_shape_in_parts(case: Case, parts: int) -> None:
    inputs = make_inputs(case)
    results = results_of_layer(layer_of(inputs, ISA, tensor_parallel=parts), inputs)
    check(results, inputs)
    again = results_of_layer(layer_of(inputs, ISA, tensor_parallel=parts, recompute=True), inputs)
    assert different(results, again) == [], "recompute=True changed bits"


class TestCut:
    @pytest.mark.parametrize("options", [{}, *(options_of(name) for name in PACKINGS)], ids=str)
    @pytest.mark.parametrize("columns", [1, 31, 32, 33, 130, 700])
    def test_parts_are_all_columns_in_order_and_never_cut_what_shares_a_scale(self, columns, options):
        config = replace(SMALL, intermediate_size=columns, **options)
        granule = config.packing.granule
        for count in range(1, -(-columns // granule) + 1):
            parts = parts_of(replace(config, tensor_parallel=count))
            sizes = [part.end - part.first for part in parts]
            assert [part.first for part in parts] == [0, *(part.end for part in parts[:-1])]
            assert (len(parts), parts[-1].end) == (count, columns)
            assert all(part.first % granule == 0 for part in parts) and min(sizes) >= 1
            assert sizes == sorted(sizes, reverse=True), "memory is planned for the first"
            assert sizes[0] - sizes[-1] < 2 * granule

    def test_more_parts_than_strips_are_refused(self):
        with pytest.raises(ConfigError, match="at most 3, got 4: intermediate_size 96 is cut at multiples of 32"):
            replace(SMALL, tensor_parallel=4)
        with pytest.raises(ConfigError, match=r"at most 1, got 2.*128 columns in weight_format fp8_block"):
            replace(SMALL, tensor_parallel=2, weight_format="fp8_block")

    @pytest.mark.parametrize("wrong", [0, -1, True, 2.0, "all", None])
    def test_other_values_are_refused(self, wrong):
        with pytest.raises(ConfigError, match="tensor_parallel must be"):
            replace(SMALL, tensor_parallel=wrong)


class TestFormats:
    @pytest.mark.parametrize("name", PACKINGS)
    def test_the_base_comes_back_bit_for_bit(self, name):
        """And decoded as if in one piece, from a cut that is uneven."""
        packing, found = packing_named(name), kernels_of(name, ISA)
        for projection in projections(65, 300):
            out, in_ = projection.out, projection.in_
            whole = random_quantized(packing, (2,), out, in_, seed=0, std=0.1)
            parts = parts_of(replace(SMALL, intermediate_size=300, tensor_parallel=2, **options_of(name)))
            packed = [empty_packed(2, *extent_of(projection, part), packing) for part in parts]
            pack_parts(found, "w", whole, packed, projection, parts, packing)
            again = unpack_parts(found, packed, projection, parts, None, packing)
            assert torch.equal(again.values.view(torch.uint8), whole.values.view(torch.uint8))
            assert torch.equal(again.scales, whole.scales)
            values = dequantize(packing, whole.values, whole.scales, out, in_)
            assert same_bits(decode_parts(found, packed, projection, parts, None), values)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", PACKINGS)
    def test_bits_are_those_of_the_bfloat16_layer(self, name):
        """With 256 columns both are cut at 128."""
        inputs = make_inputs(replace(case_named("small"), name="wide", intermediate=256))
        one, other = (results_of_layer(layer, inputs) for layer in pair_of(inputs, name, ISA, tensor_parallel=2))
        assert different(one, other) == []


class TestBits:
    @pytest.fixture
    def inputs(self) -> Inputs:
        return make_inputs(CASE)

    @pytest.fixture
    def layer(self, inputs: Inputs) -> MoELayer:
        return layer_of(inputs, ISA, tensor_parallel=5)

    @pytest.mark.parametrize("threads", [1, 2, 7])
    def test_any_number_of_threads(self, layer, inputs, threads):
        first = copied(results_of_layer(layer, inputs))
        with on_threads(threads):
            assert different(first, results_of_layer(layer, inputs)) == []

    def test_a_state_dict_is_canonical_and_loads_under_another_count(self, layer, inputs):
        one = layer_of(inputs, ISA)
        state = layer.state_dict()
        assert state.keys() == one.state_dict().keys()
        assert all(same_bits(state[name], tensor) for name, tensor in one.state_dict().items())
        zeros = {name: torch.zeros_like(tensor) for name, tensor in inputs.base().items()}
        empty, other = (MoELayer(config, **zeros) for config in (layer.config, one.config))
        empty.load_state_dict(one.state_dict())
        other.load_state_dict(state)
        assert different(results_of_layer(empty, inputs), results_of_layer(layer, inputs)) == []
        assert different(results_of_layer(other, inputs), results_of_layer(one, inputs)) == []

    def test_a_copy(self, layer, inputs):
        assert different(results_of_layer(copy.deepcopy(layer), inputs), results_of_layer(layer, inputs)) == []

    def test_lora_is_read_where_it_lies(self, layer, inputs):
        """An optimizer's step between two calls is seen by every part."""
        results_of_layer(layer, inputs)
        doubled = replace(inputs, lora=LoraTensors(*(2 * tensor for tensor in inputs.lora)))
        set_lora(layer, doubled)
        check(results_of_layer(layer, doubled), doubled)

    def test_parts_have_kernels_of_their_own(self, layer, inputs):
        with launches() as seen:
            results_of_layer(layer, inputs)
        assert [launch.shape.intermediate for launch in seen] == [32, 32, 32, 32, 2] * 2
        assert "tensor_parallel=5" in repr(layer) and "tensor_parallel" not in repr(layer_of(inputs, ISA))

    def test_adapters_that_share_an_a(self, layer, inputs):
        """The gradient of an A that gate and up share is the sum of ten summands."""
        lora = inputs.lora
        shared = {"gate_a": lora.gate_lora_a, "up_a": lora.gate_lora_a, "gate_b": lora.gate_lora_b}
        shared |= {"up_b": lora.up_lora_b, "down_a": lora.down_lora_a, "down_b": lora.down_lora_b}
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in shared.items()}
        b = torch.stack([shared["gate_b"], shared["up_b"]], 1).requires_grad_()
        fused_a = shared["gate_a"].clone().requires_grad_()
        rest = {name: shared[name].clone().requires_grad_() for name in ("down_a", "down_b")}
        two, one = Adapters(**leaves, scale=2.0), FusedAdapters(fused_a, b, **rest, scale=2.0)
        outs = [moe_experts(inputs.x, inputs.topk_ids, inputs.weights, layer._base(), a) for a in (two, one)]
        for out in outs:
            out.backward(inputs.dout)
        assert same_bits(*outs)
        assert same_bits(leaves["gate_a"].grad + leaves["up_a"].grad, fused_a.grad)
        assert same_bits(torch.stack([leaves["gate_b"].grad, leaves["up_b"].grad], 1), b.grad)
        assert same_bits(leaves["down_b"].grad, rest["down_b"].grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled(dtype):
    """A compiled graph has the operators, and their shapes and gradients."""
    inputs = make_inputs(CASE)
    layer = layer_of(inputs, ISA, tensor_parallel=5)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    results = []
    for module in (layer, compiled):
        x = inputs.x.to(dtype).requires_grad_()
        layer.zero_grad()
        out = module(x, inputs.topk_ids, inputs.weights)
        out.backward(inputs.dout.to(dtype))
        results.append({"out": out, "x": x.grad} | {n: p.grad.clone() for n, p in layer.named_parameters()})
    assert different(*results) == []


class TestMemory:
    @pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("recompute", [False, True])
    @pytest.mark.parametrize("name", ["ragged_100", "gpt_oss"])
    def test_the_plan_knows_every_tensor(self, name, recompute, x_dtype):
        """Shapes of all that the layer holds, saves and allocates in both passes, each as often as planned."""
        case = case_named(name)
        inputs = make_inputs(case)
        parts = FAST[name][0]
        layer = layer_of(inputs, ISA, tensor_parallel=parts, recompute=recompute)
        made: list[torch.Tensor] = []

        def noted(allocate):
            def allocate_and_keep(*arguments):
                made.append(allocate(*arguments))
                return made[-1]

            return allocate_and_keep

        x = inputs.x.to(x_dtype).requires_grad_()
        weights = inputs.weights.float().requires_grad_()
        with supplied(empty=noted(supplies().empty), zeros=noted(supplies().zeros)):
            layer(x, inputs.topk_ids, weights).backward(inputs.dout.to(x_dtype))
        planned = MemoryPlan.of(layer.config, case.tokens, 1, x_dtype=str(x_dtype).removeprefix("torch."))
        frozen = {t.name: (t.shape, t.dtype) for t in planned.held if t.kind == "packed weight"}
        assert frozen == {n: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in frozen_of(layer).items()}
        ours = ("new ", "out", "x.grad", "weights.grad", *(f"{n}.saved" for n in ("gate", "up", "down")))
        wanted = Counter(
            (math.prod(t.shape), t.dtype)
            for t in planned.held
            if t.name.startswith(ours) and "operand" not in t.name and not t.name.endswith("cast")
            if t.kind in ("saved", "result", "transient")
        )
        wanted += Counter((math.prod(t.shape), t.dtype) for t in planned.held if " down_bias_" in t.name)
        assert Counter((t.numel(), str(t.dtype).removeprefix("torch.")) for t in made) == wanted

    @pytest.mark.parametrize("threads", [1, 3, 8])
    def test_no_call_takes_more_scratch(self, threads):
        inputs = make_inputs(CASE)
        layer = layer_of(inputs, ISA, tensor_parallel=5)
        planned = MemoryPlan.of(layer.config, CASE.tokens, threads)
        with on_threads(threads), launches() as seen:
            results_of_layer(layer, inputs)
        for item in planned.passes:
            mine = [launch.plan.nbytes for launch in seen if launch.pass_name == item.name]
            assert len(mine) == 5 and max(mine) <= item.nbytes

    def test_a_budget_counts_the_parts(self):
        config = replace(SMALL, tensor_parallel=3)
        one, three = (MemoryPlan.of(c, 64, 1).nbytes for c in (SMALL, config))
        assert three > one
        inputs = make_inputs(case_named("small"))
        layer = layer_of(inputs, ISA, tensor_parallel=3, memory_budget=MemoryPlan.of(config, 24, 1).nbytes - 1)
        with on_threads(1), pytest.raises(BudgetError, match="of each of 3 parts"):
            layer(inputs.x, inputs.topk_ids, inputs.weights)
