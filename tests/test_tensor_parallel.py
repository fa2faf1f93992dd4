"""Parts of the intermediate dimension: right by the yardstick, the same bits on any machine, on the nodes it has."""

import copy
import math
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace

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

import jitmoe
from jitmoe import MemoryPlan, MoEConfig, MoELayer, moe_experts, numa
from jitmoe.errors import BudgetError, ConfigError, PackedFileError, TraceError
from jitmoe.experts.functional import Adapters, FusedAdapters
from jitmoe.experts.observer import observing
from jitmoe.experts.pack import decode_parts, empty_packed, pack_parts, unpack_parts
from jitmoe.experts.slices import extent_of
from jitmoe.experts.supplies import supplied, supplies
from jitmoe.experts.workspace import Arenas, allocate
from jitmoe.files import warn_once
from jitmoe.inspect.checked import Checker
from jitmoe.inspect.debug import stages
from jitmoe.inspect.recording import read_recording
from jitmoe.inspect.replay import Replay
from jitmoe.oracle.formats import dequantize
from jitmoe.oracle.reference import LoraTensors
from jitmoe.plan.parts import parts_of
from jitmoe.plan.projections import projections
from jitmoe.plan.teams import plan_teams
from jitmoe.topology import Node, read_topology, usable_nodes

ISA = usable_isas()[0]

PARTS = (1, 2, 3, 5)

FAST = {"ragged_100": (5,), "gpt_oss": (3,)}
"""Cells that `make test` runs: five parts, of which one has 2 columns; biases."""

CASE = case_named("ragged_100")

HERE = sorted(os.sched_getaffinity(0))

TWO = (Node(0, frozenset({HERE[0]})), Node(1, frozenset({HERE[-1]})))
"""Nodes of a machine that this one is not; threads can be bound to their CPUs all the same."""

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


class TestInside:
    """Those who look see one part after the other, or refuse by name."""

    @pytest.fixture
    def inputs(self) -> Inputs:
        return make_inputs(CASE)

    @pytest.fixture
    def layer(self, inputs: Inputs) -> MoELayer:
        return layer_of(inputs, ISA, tensor_parallel=5)

    @pytest.mark.slow
    @pytest.mark.parametrize("recompute", [False, True])
    def test_checked(self, inputs, recompute):
        layer = layer_of(inputs, ISA, tensor_parallel=5, recompute=recompute)
        expected = copied(results_of_layer(layer, inputs))
        with observing(Checker()):
            assert different(results_of_layer(layer, inputs), expected) == []

    def test_a_trace_is_refused(self, layer, inputs):
        with jitmoe.trace(), pytest.raises(TraceError, match="tensor_parallel=5 cannot be traced"):
            layer(inputs.x, inputs.topk_ids, inputs.weights)

    def test_a_captured_call_has_the_same_bits_again(self, layer, inputs, tmp_path):
        layer.capture(tmp_path / "call.pt")
        results_of_layer(layer, inputs)
        replay = Replay(read_recording(tmp_path / "call.pt"))
        assert replay.layer.config.parts == 5
        assert "the same bits" in replay.summary()

    def test_every_stage_is_right(self, layer, inputs):
        """Gate and up of an expert are put together from what the parts saved."""
        found = list(stages(layer, inputs))
        assert len(found) > 2 and not any(stage.deviation for stage in found)

    def test_batch_invariant(self, inputs):
        layer = layer_of(inputs, ISA, tensor_parallel=5, batch_invariant=True)
        with torch.no_grad():
            whole = layer(inputs.x, inputs.topk_ids, inputs.weights)
            some = layer(inputs.x[7:9], inputs.topk_ids[7:9], inputs.weights[7:9])
        assert same_bits(whole[7:9], some)


class TestPackedFiles:
    @pytest.fixture
    def layer(self) -> MoELayer:
        return layer_of(make_inputs(CASE), ISA, tensor_parallel=5)

    @pytest.mark.parametrize("verify", [False, True])
    @pytest.mark.parametrize("nodes", [1, 2])
    def test_a_mapped_file_has_the_same_bits(self, layer, tmp_path, nodes, verify):
        inputs = make_inputs(CASE)
        layer.save_packed(tmp_path / "layer.packed")
        with supplied(nodes=lambda: TWO[:nodes]), on_threads(2):
            mapped = MoELayer.from_packed(layer.config, tmp_path / "layer.packed", verify=verify)
            set_lora(mapped, inputs)
            assert different(results_of_layer(mapped, inputs), results_of_layer(layer, inputs)) == []

    @pytest.mark.parametrize(("saved", "wanted"), [(5, 1), (1, 5), (5, 2)])
    def test_a_file_of_another_count_is_refused(self, tmp_path, saved, wanted):
        layer = layer_of(make_inputs(CASE), ISA, tensor_parallel=saved)
        layer.save_packed(tmp_path / "layer.packed")
        with pytest.raises(PackedFileError, match=f"for tensor_parallel={saved}, the config says {wanted}: take"):
            MoELayer.from_packed(replace(layer.config, tensor_parallel=wanted), tmp_path / "layer.packed")

    def test_damage_in_a_part_is_named(self, layer, tmp_path):
        path = tmp_path / "layer.packed"
        layer.save_packed(path)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        with pytest.raises(PackedFileError, match="the down_4 weights are not what was written"):
            MoELayer.from_packed(layer.config, path)


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


class TestTeams:
    @pytest.mark.parametrize(
        ("parts", "threads", "cores", "expected"),
        [
            (1, 8, [4, 4], [(None, (0,), 8)]),
            (3, 8, [8], [(None, (0, 1, 2), 8)]),
            (2, 1, [4, 4], [(None, (0, 1), 1)]),
            (2, 7, [4, 4], [(0, (0,), 4), (1, (1,), 3)]),
            (2, 16, [4, 2], [(0, (0,), 4), (1, (1,), 2)]),
            (5, 4, [4, 4], [(0, (0, 1, 2), 2), (1, (3, 4), 2)]),
            (2, 8, [2, 2, 2, 2], [(0, (0,), 2), (1, (1,), 2)]),
            (4, 3, [1, 1, 1, 1], [(0, (0, 1), 1), (2, (2,), 1), (3, (3,), 1)]),
        ],
    )
    def test_parts_are_shared_out(self, parts, threads, cores, expected):
        nodes = [Node(number, frozenset(range(100 * number, 100 * number + n))) for number, n in enumerate(cores)]
        teams = plan_teams(parts, threads, nodes)
        assert [(team.node and team.node.number, team.parts, team.threads) for team in teams] == expected


class TestNodes:
    """Row 27: what a machine, a container or a cpuset lacks changes where and how fast, never a bit."""

    def layer(self, inputs, parts=2, **changes) -> MoELayer:
        with supplied(**changes):
            return layer_of(inputs, ISA, tensor_parallel=parts)

    @pytest.fixture
    def inputs(self) -> Inputs:
        return make_inputs(CASE)

    @pytest.fixture(autouse=True)
    def warnings_come_again(self):
        warn_once.cache_clear()

    @pytest.mark.parametrize("threads", [2, 3])
    def test_each_node_computes_its_parts_at_home(self, inputs, threads):
        expected = copied(results_of_layer(self.layer(inputs, 5), inputs))
        before, seen = os.sched_getaffinity(0), {}

        class Noting(Arenas):
            @contextmanager
            def lease(self, nbytes, node=None):
                seen.setdefault(node, set()).add(frozenset(os.sched_getaffinity(0)))
                with super().lease(nbytes, node) as address:
                    yield address

        with supplied(nodes=lambda: TWO, prefer=lambda *_: None, arenas=Noting()), on_threads(threads):
            layer = layer_of(inputs, ISA, tensor_parallel=5)
            results = results_of_layer(layer, inputs)
        assert different(results, expected) == []
        assert seen == {node.number: {node.cpus} for node in TWO}
        assert os.sched_getaffinity(0) == before, "the calling thread was bound, too"

    def test_weights_are_asked_to_lie_at_home(self, inputs):
        asked = []
        layer = self.layer(
            inputs, 5, nodes=lambda: TWO, prefer=lambda *where: asked.append(where), nodes_of=lambda *_: {}
        )
        wanted = {(tensor.data_ptr(), tensor.nbytes): int(name[-1]) >= 3 for name, tensor in layer._packed().items()}
        assert {(address, nbytes): node for address, nbytes, node in asked} == wanted

    def test_mbind_refused(self, inputs):
        expected = copied(results_of_layer(self.layer(inputs), inputs))
        with pytest.warns(RuntimeWarning, match="cannot be bound to a NUMA node .*not permitted.*SYS_NICE"):
            layer = self.layer(inputs, nodes=lambda: TWO, prefer=lambda *_: "mbind: Operation not permitted")
        with supplied(nodes=lambda: TWO):
            assert different(results_of_layer(layer, inputs), expected) == []

    def test_weights_that_lie_elsewhere_are_named(self, inputs):
        with pytest.warns(RuntimeWarning, match="whose home is NUMA node 1 lie in part on node 0:"):
            self.layer(inputs, nodes=lambda: TWO, prefer=lambda *_: None, nodes_of=lambda *_: {0: 5, 1: 3, -2: 9})

    def test_a_system_that_does_not_say_where_memory_is(self, inputs):
        refused = {"nodes_of": lambda *_: "move_pages: Function not implemented", "prefer": lambda *_: None}
        with pytest.warns(RuntimeWarning, match="does not say on which NUMA node.*move_pages"):
            self.layer(inputs, nodes=lambda: TWO, **refused)

    @pytest.mark.parametrize(("nodes", "text"), [(TWO[:1], "1 NUMA node:"), (TWO, "2 NUMA nodes:")])
    def test_fewer_nodes_than_parts(self, inputs, nodes, text):
        expected = copied(results_of_layer(layer_of(inputs, ISA, tensor_parallel=5), inputs))
        warn_once.cache_clear()
        with pytest.warns(RuntimeWarning, match=f"tensor_parallel=5, and this process may use {text}"):
            layer = self.layer(inputs, 5, nodes=lambda: nodes, prefer=lambda *_: None, nodes_of=lambda *_: {})
        with supplied(nodes=lambda: nodes), on_threads(2):
            assert different(results_of_layer(layer, inputs), expected) == []

    def test_fewer_threads_than_nodes(self, inputs):
        layer = self.layer(inputs)
        expected = copied(results_of_layer(layer, inputs))
        with supplied(nodes=lambda: TWO), on_threads(1), pytest.warns(RuntimeWarning, match="1 thread for 2 parts"):
            assert different(results_of_layer(layer, inputs), expected) == []

    def test_threads_that_cannot_be_bound(self, inputs):
        layer = self.layer(inputs)
        expected = copied(results_of_layer(layer, inputs))
        strange = tuple(Node(number, frozenset({5000 + number})) for number in (8, 9))
        with (
            supplied(nodes=lambda: strange),
            on_threads(2),
            pytest.warns(RuntimeWarning, match="cannot be bound to the"),
        ):
            assert different(results_of_layer(layer, inputs), expected) == []

    def test_an_error_of_a_part_is_raised_when_all_have_ended(self, inputs):
        layer = self.layer(inputs)

        class Broken(Arenas):
            ended = 0

            @contextmanager
            def lease(self, nbytes, node=None):
                if node == 0:
                    raise MemoryError("no memory for the first part")
                with super().lease(nbytes, node) as address:
                    time.sleep(0.1)
                    yield address
                Broken.ended += 1

        with (
            supplied(nodes=lambda: TWO, arenas=Broken()),
            on_threads(2),
            pytest.raises(MemoryError, match="first part"),
        ):
            layer(inputs.x, inputs.topk_ids, inputs.weights)
        assert Broken.ended == 1

    def test_a_forked_child_computes_alone(self, inputs):
        layer = self.layer(inputs)
        with supplied(nodes=lambda: TWO), on_threads(2):
            expected = results_of_layer(layer, inputs)["out"].clone()
            child = os.fork()
            if child == 0:
                try:
                    with torch.no_grad():
                        os._exit(0 if same_bits(layer(inputs.x, inputs.topk_ids, inputs.weights), expected) else 1)
                finally:
                    os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    def test_memory_goes_where_it_is_asked(self):
        """On this machine: pages of its own nodes, bound, touched and asked for."""
        node = usable_nodes()[0].number
        memory = allocate(8 * numa.PAGE)
        refused = numa.prefer(memory.ctypes.data, memory.nbytes, node)
        memory[:] = 1
        if refused is None:
            assert numa.nodes_of(memory.ctypes.data, memory.nbytes) == {node: 8}
        assert numa.prefer(memory.ctypes.data, memory.nbytes, 1000).startswith("mbind: ")


Tree = dict[str, str]
"""Files under /sys/devices/system by path, with their content."""


def node_files(number: int, cpus: str, memory: int = 1024, distance: str = "10 20 30 40") -> Tree:
    node = f"node/node{number}"
    return {
        f"{node}/cpulist": cpus,
        f"{node}/meminfo": f"Node {number} MemTotal:       {memory} kB\nNode {number} MemFree: 1 kB\n",
        f"{node}/distance": distance,
    }


def cores(*pairs: tuple[int, ...], package: int = 0) -> Tree:
    """CPUs of one core each."""
    ids = {"physical_package_id": str(package), "die_id": "0"}
    return {
        f"cpu/cpu{cpu}/topology/{name}": text
        for core, cpus in enumerate(pairs)
        for cpu in cpus
        for name, text in (ids | {"core_id": str(core)}).items()
    }


FOUR = [node_files(node, f"{2 * node}-{2 * node + 1}") for node in range(4)]
TWO_SOCKETS = {"node/online": "0-1\n", **node_files(0, "0-3,8-11"), **node_files(1, "4-7,12-15", distance="20 10")}
TWINS = {**cores((0, 8), (1, 9), (2, 10), (3, 11)), **cores((4, 12), (5, 13), package=1)}
ODD = {
    "no /sys": ({}, "0-3", "0", {0: "0-3"}, []),
    "one node": ({"node/online": "0", **node_files(0, "0-3")}, "0-3", "0", {0: "0-3"}, []),
    "two sockets": (TWO_SOCKETS, "0-15", "0-1", {0: "0-3,8-11", 1: "4-7,12-15"}, []),
    "hyperthreads": (TWO_SOCKETS | TWINS, "0-15", "0-1", {0: "0-3", 1: "4-7,14-15"}, []),
    "second hyperthreads only": (TWO_SOCKETS | TWINS, "8-9,4", "0-1", {0: "8-9", 1: "4"}, []),
    "cpuset": (TWO_SOCKETS, "4-5", "0-1", {1: "4-5"}, ["node 0 has no CPU that this process may use"]),
    "Mems_allowed": (TWO_SOCKETS, "0-15", "1", {1: "0-15"}, ["node 0 has no memory .* CPUs work for node 1"]),
    "a node without memory": (
        {
            "node/online": "0-2",
            **node_files(0, "0-1", distance="10 40 30"),
            **node_files(1, "2-3", distance="40 10 20"),
            **node_files(2, "4-5", memory=0, distance="30 20 10"),
        },
        "0-5",
        None,
        {0: "0-1", 1: "2-5"},
        ["node 2 has no memory .* CPUs work for node 1"],
    ),
    "memory without CPUs": (
        TWO_SOCKETS | {"node/online": "0-2"} | node_files(2, "\n"),
        "0-15",
        "0-2",
        {0: "0-3,8-11", 1: "4-7,12-15"},
        ["node 2 has no CPU"],
    ),
    "sub-NUMA clusters": (
        {"node/online": "0-3", **FOUR[0], **FOUR[1], **FOUR[2], **FOUR[3]}
        | cores((0,), (1,), (2,), (3,))
        | cores((4,), (5,), (6,), (7,), package=1),
        "0-7",
        "0-3",
        {0: "0-1", 1: "2-3", 2: "4-5", 3: "6-7"},
        [],
    ),
    "numbers with gaps": (
        {"node/online": "0,8", **node_files(0, "0-1", distance="10 40"), **node_files(8, "2-3", distance="40 10")},
        "0-3",
        "0,8",
        {0: "0-1", 8: "2-3"},
        [],
    ),
    "no node of Mems_allowed": ({"node/online": "0", **node_files(0, "0-3")}, "0-3", "5", {0: "0-3"}, []),
}
"""Files, CPUs and memory nodes of the process; expected nodes with their CPUs, and what is said of others."""


@pytest.mark.parametrize("name", ODD)
def test_topologies(name, tmp_path):
    files, cpus, memory, nodes, left_out = ODD[name]
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    status = tmp_path / "status"
    status.write_text("Mems_allowed:\t1\n" + (f"Mems_allowed_list:\t{memory}\n" if memory else ""))
    found = read_topology(tmp_path, status, listed(cpus))
    assert {node.number: node.cpus for node in found.nodes} == {number: listed(text) for number, text in nodes.items()}
    assert len(found.left_out) == len(left_out)
    assert all(re.search(pattern, reason) for pattern, reason in zip(left_out, found.left_out, strict=True))


def listed(text: str) -> frozenset[int]:
    """The numbers of a list like 0-3,8."""
    ends = [entry.split("-") for entry in text.split(",")]
    return frozenset(number for entry in ends for number in range(int(entry[0]), int(entry[-1]) + 1))


def test_auto_becomes_a_number_that_stays(monkeypatch):
    """Where it is made, once: on another machine the config that was saved has the same bits."""
    monkeypatch.setattr("jitmoe.config.usable_nodes", lambda: TWO)
    config = replace(SMALL, tensor_parallel="auto")
    assert (config.tensor_parallel, config.parts) == (2, 2)
    assert replace(SMALL, intermediate_size=32, tensor_parallel="auto").parts == 1, "no more parts than strips"
    monkeypatch.undo()
    assert MoEConfig(**asdict(config)).parts == replace(config, lora_rank=4).parts == 2
