"""Faults in values: NaN and infinity stay where they belong, padding and idle experts touch nothing, extremes hold."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import EVERY_ISA, build_kernels, case_named, copied, different, layer_of, on_threads, same_bits
from torch import Tensor
from yardstick import Case, check, make_inputs, results_of_layer

from jitmoe import MoELayer
from jitmoe.experts import workspace
from jitmoe.experts.seal import Seal
from jitmoe.oracle.reference import LoraTensors
from jitmoe.plan.projections import projections

CASES = [case_named("small"), case_named("ragged_31"), case_named("ragged_65")]
NO_LORA = case_named("no_lora")
IDLE = replace(case_named("small"), name="idle", experts=9, routing="idle_experts", tokens=30)
NAN, INF = float("nan"), float("inf")
NAN_BITS = 0x7FC1
"""A bfloat16 NaN; twice in a row a float32 one."""

EVERY_CASE = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture(scope="module", autouse=True)
def kernels_are_built() -> None:
    build_kernels([*CASES, NO_LORA])


@EVERY_ISA
@EVERY_CASE
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("place", ["x", "dout", "weights"])
def test_a_value_that_is_not_finite_stays_with_its_token(
    isa: str, case: Case, recompute: bool, value: float, place: str
) -> None:
    """Only the token's rows, and the LoRA gradients of its experts; all else keeps its bits."""
    inputs = make_inputs(case)
    token = case.tokens // 2
    layer = layer_of(inputs, isa, recompute=recompute)
    clean = copied(results_of_layer(layer, inputs))
    poisoned = getattr(inputs, place).clone()
    poisoned[token, 0] = value
    found = results_of_layer(layer, replace(inputs, **{place: poisoned}))

    others = torch.arange(case.tokens) != token
    for name in ("out", "x", "weights"):
        assert same_bits(found[name][others], clean[name][others]), name
    experts = torch.ones(case.experts, dtype=torch.bool)
    experts[inputs.topk_ids[token]] = False
    assert experts.any(), "the case must leave an expert that the token did not choose"
    for name in LoraTensors._fields:
        assert same_bits(found[name][experts], clean[name][experts]), name
    hit = {"x": ("out", "x", "weights"), "dout": ("x", "weights"), "weights": ("out", "x")}[place]
    for name in hit:
        assert not found[name][token].isfinite().all(), f"{name} does not show it"


@EVERY_ISA
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("through", ["constructor", "load_state_dict"])
def test_nan_in_experts_that_nobody_chose(isa: str, recompute: bool, through: str) -> None:
    inputs = make_inputs(IDLE)
    idle = ~torch.isin(torch.arange(IDLE.experts), inputs.topk_ids)
    assert idle.sum() >= 3
    clean = copied(results_of_layer(layer_of(inputs, isa, recompute=recompute), inputs))

    def poison(tensor: Tensor) -> Tensor:
        return torch.where(idle.view(-1, 1, 1), NAN, tensor)

    assert inputs.lora
    poisoned = replace(
        inputs,
        gate_proj=poison(inputs.gate_proj),
        up_proj=poison(inputs.up_proj),
        down_proj=poison(inputs.down_proj),
        lora=LoraTensors(*map(poison, inputs.lora)),
    )
    layer = layer_of(poisoned, isa, recompute=recompute)
    if through == "load_state_dict":
        state = layer.state_dict()
        layer = layer_of(inputs, isa, recompute=recompute)
        layer.load_state_dict(state)
    assert different(results_of_layer(layer, poisoned), clean) == []


def padding_of(out: int, in_: int) -> Tensor:
    """Which elements of one packed matrix [out, in] are padding: the picture in gemm/interface.hpp as a formula."""
    strips, blocks = -(-out // 32), -(-in_ // 32)
    real = np.zeros((strips * 32, blocks * 32), bool)
    real[:out, :in_] = True
    return torch.from_numpy(~real.reshape(strips, 2, 16, blocks, 16, 2).transpose(0, 3, 1, 4, 2, 5).reshape(-1))


def poison_padding(layer: MoELayer) -> None:
    """NaN into every element of the packed weights that is no weight, and a new seal."""
    for projection in projections(layer.config.hidden_size, layer.config.intermediate_size):
        packed, padding = getattr(layer, f"packed_{projection.name}"), padding_of(projection.out, projection.in_)
        assert padding.any() and not packed[:, padding].any(), "padding is where it is expected, and zero"
        packed[:, padding] = NAN_BITS
    layer._seal = Seal()


@EVERY_ISA
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("case", CASES[1:], ids=str)
def test_nan_in_the_padding_of_the_weights(isa: str, case: Case, recompute: bool) -> None:
    inputs = make_inputs(case)
    layer = layer_of(inputs, isa, recompute=recompute)
    clean = copied(results_of_layer(layer, inputs))
    poison_padding(layer)
    assert different(results_of_layer(layer, inputs), clean) == []
    assert same_bits(layer.unpack()["down_proj"], inputs.down_proj)


@EVERY_ISA
@EVERY_CASE
@pytest.mark.parametrize("recompute", [False, True])
def test_nan_in_the_scratch(isa: str, case: Case, recompute: bool) -> None:
    """What earlier calls left there may be anything."""
    inputs = make_inputs(case)
    layer = layer_of(inputs, isa, recompute=recompute)
    clean = copied(results_of_layer(layer, inputs))
    assert workspace.arenas.held_bytes() > 0
    for arena in workspace.arenas.free():
        arena[: arena.size // 2 * 2].view(np.uint16)[:] = NAN_BITS
    assert different(results_of_layer(layer, inputs), clean) == []


class TestExtremes:
    """Fault 26."""

    @EVERY_ISA
    @pytest.mark.parametrize("value", [3e38, -3e38])
    def test_the_largest_numbers_stay_with_their_token(self, isa: str, value: float) -> None:
        case = CASES[2]
        inputs = make_inputs(case)
        layer = layer_of(inputs, isa)
        clean = copied(results_of_layer(layer, inputs))
        x = inputs.x.clone()
        x[3] = value
        found = results_of_layer(layer, replace(inputs, x=x))
        others = torch.arange(case.tokens) != 3
        for name in ("out", "x", "weights"):
            assert same_bits(found[name][others], clean[name][others]), name

    @EVERY_ISA
    @pytest.mark.parametrize("exponent", [-60, 12, 40])
    def test_the_bound_holds_at_every_magnitude(self, isa: str, exponent: int) -> None:
        """At 2^12 every gate is saturated, at 2^40 the activations are near 2^80; at 2^-60 they are near 2^-120."""
        inputs = make_inputs(CASES[0])
        large = replace(inputs, x=(inputs.x.double() * 2.0**exponent).bfloat16())
        results = results_of_layer(layer_of(large, isa), large)
        assert all(value.isfinite().all() for value in results.values())
        if exponent > 0:
            check(results, large)

    @EVERY_ISA
    def test_silu_of_infinities(self, isa: str) -> None:
        """gate = ±inf or beyond float32: as x / (1 + e^-x) has it, +inf stays and -inf is NaN; never a wrong finite."""
        case = replace(NO_LORA, tokens=4)
        inputs = make_inputs(case)
        x = torch.zeros_like(inputs.x)
        x[:, 0] = torch.tensor([INF, -INF, 1.0, -1.0])
        base = {name: torch.zeros_like(getattr(inputs, name)) for name in ("gate_proj", "up_proj", "down_proj")}
        base["gate_proj"][:, 0, 0] = 1.0
        base["up_proj"][:, :, 0] = 0.0
        base["up_proj"][:, 0, 1] = 1.0
        base["down_proj"][:, 0, 0] = 1.0
        x[:, 1] = 1.0
        ones = torch.ones_like(inputs.weights)
        special = replace(inputs, x=x, weights=ones, **base)
        layer = layer_of(special, isa)
        out = layer(x, inputs.topk_ids, ones)[:, 0].float() / case.top_k
        silu_of_one = torch.nn.functional.silu(torch.tensor([1.0, -1.0]))
        assert not out[:2].isfinite().any()
        assert torch.allclose(out[2:], silu_of_one, rtol=2**-7)

    @EVERY_ISA
    @pytest.mark.parametrize("pattern", [0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000])
    def test_a_nan_of_any_payload_stays_one(self, isa: str, pattern: int) -> None:
        """Rounding to bfloat16 adds to the bits of a number; from these a carry would make 0, -0 or infinity."""
        inputs = make_inputs(CASES[0])
        layer = layer_of(inputs, isa)
        nan = torch.tensor([pattern], dtype=torch.int32).view(torch.float32)
        with torch.no_grad():
            layer.down_lora_b[:, 5] = nan
            layer.up_lora_b[:, 7] = nan
        out = layer(inputs.x, inputs.topk_ids, inputs.weights)
        assert out.isnan().all()

    @EVERY_ISA
    def test_the_mode_of_the_calling_thread_is_given_back(self, isa: str) -> None:
        inputs = make_inputs(CASES[0])
        layer = layer_of(inputs, isa)
        for flushes in (True, False):
            try:
                torch.set_flush_denormal(flushes)
                results_of_layer(layer, inputs)
                halved = torch.full((1,), 2.0**-126) * torch.full((1,), 0.5)
            finally:
                torch.set_flush_denormal(False)
            assert (halved.item() == 0) is flushes

    @EVERY_ISA
    def test_denormal_inputs(self, isa: str) -> None:
        """They may be flushed, which changes a result by no more than the flushed products; nothing else happens."""
        inputs = make_inputs(CASES[0])
        x = inputs.x.clone()
        x[:, ::2] = torch.where(x[:, ::2] > 0, 2.0**-130, -(2.0**-130)).bfloat16()
        assert (x[:, ::2] != 0).all()
        layer = layer_of(inputs, isa)
        tiny = copied(results_of_layer(layer, replace(inputs, x=x)))
        x[:, ::2] = 0
        zero = results_of_layer(layer, replace(inputs, x=x))
        for name in ("out", "x", "weights"):
            assert same_bits(tiny[name], zero[name]), name

    @EVERY_ISA
    def test_flush_to_zero_set_by_another_library(self, isa: str) -> None:
        """The mode belongs to one thread; results may not depend on which thread computed what."""
        inputs = make_inputs(CASES[2])
        # Activations near 2^-120: many of their products with weights are denormal, their sums are not.
        tiny = replace(inputs, x=(inputs.x.double() * 2.0**-60).bfloat16())
        layer = layer_of(inputs, isa)
        expected = copied(results_of_layer(layer, tiny))
        assert expected["out"].count_nonzero() > 0.9 * expected["out"].numel()
        found = []
        for count in (1, 2, 3):
            with on_threads(count):
                torch.set_flush_denormal(True)
                try:
                    found.append(copied(results_of_layer(layer, tiny)))
                finally:
                    torch.set_flush_denormal(False)
        assert [different(results, expected) for results in found] == [[], [], []]


@EVERY_ISA
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sums_are_rounded_once_and_ties_to_even(isa: str, dtype: torch.dtype) -> None:
    """Results and gradients halfway between two bfloat16 numbers, which float32 holds: random ones hardly ever are.

    x is the first unit vector. Gates are 32, where silu is exactly its argument and its derivative exactly 1; ups are
    1. Each sum that follows has two terms, a bfloat16 number of eight bits and half a unit of its last one.
    """
    numbers = 1 + torch.arange(NO_LORA.hidden) / 2**7
    half = 2.0**-8
    exact = numbers + half
    inputs = make_inputs(NO_LORA)
    gate, up, down = (torch.zeros_like(base) for base in (inputs.gate_proj, inputs.up_proj, inputs.down_proj))
    gate[:, :2, 0] = 32
    up[:, :2, 0] = 1
    up[:, 0, 1:] = numbers[1:] / 32
    up[:, 1, 1:] = 1 / 32
    down[:, :, 0] = numbers / 32
    down[:, :, 1] = half / 32
    x, dout = (torch.zeros_like(inputs.x, dtype=dtype) for _ in range(2))
    x[:, 0] = 1
    dout[:, 0] = 32
    weights = torch.tensor([1.0, 0.0]).repeat(NO_LORA.tokens, 1)
    special = replace(inputs, x=x, dout=dout, weights=weights, gate_proj=gate, up_proj=up, down_proj=down)
    results = results_of_layer(layer_of(special, isa), special)
    assert not torch.equal(exact.bfloat16().float(), exact)
    assert same_bits(results["out"], exact.to(dtype).expand_as(x))
    assert same_bits(results["x"][:, 1:], exact[1:].to(dtype).expand_as(x[:, 1:]))
