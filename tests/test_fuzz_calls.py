"""Sequences of calls drawn at random, each judged by the oracle's rule and by the bits of a plain call on one thread.

Whatever was done before a call (steps, saving, loading, copies, refusals), and however it is made (threads, forks,
checkpoints, strides, checked kernels), its results follow from its inputs alone. ``make fuzz`` draws for long.
"""

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from helpers import build_kernels, case_named, config_of, different, on_threads, same_bits, set_lora, usable_isas
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from quantized import BASES, decoded, options_of, packing_named, quantized_base
from test_threads import in_forked_child, in_threads
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from yardstick import Case, Inputs, Results, make_inputs, results_of_reference

import jitmoe
from jitmoe import MoELayer
from jitmoe.errors import JitmoeError
from jitmoe.experts.observer import observing
from jitmoe.inspect.checked import Checker
from jitmoe.isa import ISAS
from jitmoe.oracle import yardstick
from jitmoe.oracle.reference import LoraTensors

ISA = usable_isas()[0]


@dataclass(frozen=True)
class Kind:
    """A layer of the pool: few, so that few kernels are compiled."""

    case: Case
    packing: str | None = None

    def options(self, isa: str) -> dict[str, Any]:
        if self.packing is None:
            return {}
        return {"m_step": ISAS[isa].m_steps[-1], **options_of(self.packing)}


PLAIN = tuple(Kind(case_named(name)) for name in ("small", "ragged_65", "bfloat16_lora", "gpt_oss", "no_lora"))
QUANTIZED = tuple(Kind(case_named("ragged_100"), packing) for packing in ("int8_row", "mxfp4"))
CHECKED = "small"
"""The case that is also called on checked kernels."""


@dataclass(frozen=True)
class Drawn:
    """Inputs of one call."""

    tokens: int
    routing: str
    seed: int
    x_dtype: torch.dtype
    weights_dtype: torch.dtype

    def of(self, case: Case) -> Case:
        return replace(case, **vars(self))


FLOATS = st.sampled_from((torch.bfloat16, torch.float32))
LEAST_TOKENS = 70
"""Of a call that is judged by the oracle: errors of fewer are few draws, and luck. Bits are compared of all."""

CALLS = st.builds(
    Drawn,
    tokens=st.sampled_from((1, 5, 24, 70, 70)),
    routing=st.sampled_from(("random", "one_expert", "duplicates", "skipped_slots")),
    seed=st.integers(0, 2),
    x_dtype=FLOATS,
    weights_dtype=FLOATS,
)
FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.clone(),
    "transposed": lambda t: t.t().contiguous().t(),
    "offset": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
    "every other column": lambda t: t.repeat_interleave(2, dim=1)[:, ::2],
}
"""The same values in other memory."""

Experts = Callable[[Tensor, Tensor, Tensor], Tensor]


def results_of(experts: Experts, layer: MoELayer, inputs: Inputs, form: str = "contiguous") -> Results:
    """Results without a trace in the layer."""
    x, ids, weights = (FORMS[form](tensor) for tensor in (inputs.x, inputs.topk_ids, inputs.weights))
    leaves = {"x": x.requires_grad_(), "weights": weights.requires_grad_(), **dict(layer.named_parameters())}
    out = experts(x, ids, weights)
    grads = torch.autograd.grad(out, list(leaves.values()), inputs.dout)
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def plainly(layer: MoELayer, inputs: Inputs, form: str) -> Results:
    return results_of(layer, layer, inputs, form)


def checkpointed(layer: MoELayer, inputs: Inputs, form: str) -> Results:
    return results_of(lambda *args: checkpoint(layer, *args, use_reentrant=False), layer, inputs, form)


def on_checked_kernels(layer: MoELayer, inputs: Inputs, form: str) -> Results:
    if inputs.case.name != CHECKED:
        return plainly(layer, inputs, form)
    with observing(Checker()):
        return plainly(layer, inputs, form)


def in_two_threads(layer: MoELayer, inputs: Inputs, form: str) -> Results:
    found: list[Results] = []
    in_threads(lambda _: found.append(plainly(layer, inputs, form)), 2)
    assert different(*found) == []
    return found[0]


def in_a_child(layer: MoELayer, inputs: Inputs, form: str) -> Results:
    expected = plainly(layer, inputs, form)
    in_forked_child(lambda: not different(plainly(layer, inputs, form), expected))
    return expected


def beside_another_graph(layer: MoELayer, inputs: Inputs, form: str) -> Results:
    """Another forward comes between forward and backward, and its graph is thrown away."""

    def experts(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = layer(x, ids, weights)
        layer(-x, ids.flip(0), weights)
        return out

    return results_of(experts, layer, inputs, form)


def saved_elsewhere(layer: MoELayer, inputs: Inputs, form: str) -> Results:
    """What is saved for backward is packed by hooks, and comes back with other strides."""
    other = lambda t: torch.stack([t, t], dim=-1)[..., 0]  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), other):
        return plainly(layer, inputs, form)


WAYS = (plainly, checkpointed, on_checked_kernels, in_two_threads, in_a_child, beside_another_graph, saved_elsewhere)


def through_state(machine: "Calls") -> MoELayer:
    other = machine.new(seed=9)
    other.load_state_dict(machine.layer.state_dict())
    return other


def through_lora_state(machine: "Calls") -> MoELayer:
    other = machine.new(seed=0)
    jitmoe.load_lora_state_dict(other, jitmoe.lora_state_dict(machine.layer))
    return other


def through_a_file(machine: "Calls") -> MoELayer:
    stored = io.BytesIO()
    torch.save(machine.layer, stored)
    stored.seek(0)
    return torch.load(stored, weights_only=False)


def through_a_copy(machine: "Calls") -> MoELayer:
    return copy.deepcopy(machine.layer)


TRIPS = (through_state, through_lora_state, through_a_file, through_a_copy)


def judge(found: Results, inputs: Inputs) -> None:
    """Hold to the error rule, with the adapters that the layer has now."""
    oracle, plain = (results_of_reference(inputs, dtype) for dtype in (torch.float64, torch.bfloat16))
    verdicts = yardstick.judge(found, inputs, oracle, plain, yardstick.errors_of_redraws(inputs))
    assert not any(verdict.fault or verdict.doubt for verdict in verdicts), "\n".join(map(str, verdicts))


class Calls(RuleBasedStateMachine):
    """One layer, and what it should hold."""

    isa, kinds = ISA, (*PLAIN, *QUANTIZED)

    @initialize(data=st.data(), recompute=st.booleans(), batch_invariant=st.booleans())
    def begin(self, data: st.DataObject, recompute: bool, batch_invariant: bool) -> None:
        self.kind = data.draw(st.sampled_from(self.kinds))
        self.options = {"recompute": recompute, "batch_invariant": batch_invariant, **self.kind.options(self.isa)}
        self.judged: set[Drawn] = set()
        self.layer = self.new(seed=0)

    def base(self, seed: int) -> dict[str, Any]:
        case = replace(self.kind.case, seed=seed)
        base = make_inputs(case).base()
        if self.kind.packing is not None:
            base |= quantized_base(case, packing_named(self.kind.packing))
        return base

    def new(self, seed: int) -> MoELayer:
        inputs = make_inputs(replace(self.kind.case, seed=seed))
        config = replace(config_of(inputs.case, self.isa, **self.options), allow_skip=True)
        layer = MoELayer(config, **self.base(seed))
        assert layer.isa == self.isa
        set_lora(layer, inputs)
        return layer

    def inputs(self, drawn: Drawn) -> Inputs:
        """With the weights that the layer has now."""
        case = self.kind.case
        base = self.base(seed=0)
        if self.kind.packing is not None:
            base |= decoded({name: base[name] for name in BASES}, packing_named(self.kind.packing), case)
        lora = {name: parameter.detach().clone() for name, parameter in self.layer.named_parameters()}
        return replace(
            make_inputs(drawn.of(case)),
            case=drawn.of(case),
            **{name: base[name] for name in BASES},
            biases=make_inputs(case).biases,
            lora=LoraTensors(**lora) if lora else None,
        )

    def expected(self, inputs: Inputs, drawn: Drawn) -> Results:
        with on_threads(1):
            found = plainly(self.layer, inputs, "contiguous")
        # At its limit the slope of a clamp jumps, and steps move values there: those kinds are compared by bits alone.
        smooth = inputs.activation.name == "silu"
        if smooth and drawn.tokens >= LEAST_TOKENS and drawn not in self.judged:
            judge(found, inputs)
            self.judged.add(drawn)
        return found

    @rule(drawn=CALLS, way=st.sampled_from(WAYS), form=st.sampled_from(sorted(FORMS)), threads=st.integers(1, 3))
    def call(self, drawn: Drawn, way: Callable[..., Results], form: str, threads: int) -> None:
        inputs = self.inputs(drawn)
        expected = self.expected(inputs, drawn)
        with on_threads(threads):
            assert different(way(self.layer, inputs, form), expected) == []

    @rule(drawn=CALLS, form=st.sampled_from(sorted(FORMS)))
    def call_without_gradients(self, drawn: Drawn, form: str) -> None:
        inputs = self.inputs(drawn)
        with torch.no_grad():
            out = self.layer(*(FORMS[form](tensor) for tensor in (inputs.x, inputs.topk_ids.int(), inputs.weights)))
        assert same_bits(out, self.expected(inputs, drawn)["out"])

    @rule(drawn=CALLS)
    def call_with_frozen_adapters(self, drawn: Drawn) -> None:
        inputs = self.inputs(drawn)
        x = inputs.x.clone().requires_grad_()
        self.layer.requires_grad_(False)
        try:
            self.layer(x, inputs.topk_ids, inputs.weights).backward(inputs.dout)
        finally:
            self.layer.requires_grad_(True)
        assert same_bits(x.grad, self.expected(inputs, drawn)["x"])
        assert all(parameter.grad is None for parameter in self.layer.parameters())

    @rule(first=CALLS, second=CALLS, reentrant=st.booleans())
    def step(self, first: Drawn, second: Drawn, reentrant: bool) -> None:
        """Gradients of two calls are added, and LoRA takes a step."""
        parts = []
        for drawn in (first, second):
            inputs = self.inputs(drawn)
            parts.append(self.expected(inputs, drawn))
            x = inputs.x.clone().requires_grad_()
            args = (x, inputs.topk_ids, inputs.weights)
            out = checkpoint(self.layer, *args, use_reentrant=True) if reentrant else self.layer(*args)
            out.backward(inputs.dout)
        with torch.no_grad():
            for name, parameter in self.layer.named_parameters():
                assert same_bits(parameter.grad, parts[0][name] + parts[1][name]), name
                # A step of a size that leaves the magnitudes, and so the usual errors, as they are.
                parameter -= 0.05 * parameter.square().mean().sqrt() * parameter.grad.sign()
                parameter.copy_(parameter.bfloat16())  # the yardstick wants values that are operands
                parameter.grad = None
        self.judged.clear()

    @rule(trip=st.sampled_from(TRIPS))
    def go_on_with_another(self, trip: Callable[["Calls"], MoELayer]) -> None:
        before = {name: tensor.clone() for name, tensor in self.layer.state_dict().items()}
        self.layer = trip(self)
        assert different(dict(self.layer.state_dict()), before) == []

    @rule(drawn=CALLS, how=st.sampled_from(("float ids", "width", "weights", "x")))
    def refuse(self, drawn: Drawn, how: str) -> None:
        inputs = self.inputs(drawn)
        x, ids, weights = inputs.x, inputs.topk_ids, inputs.weights
        wrong = {
            "float ids": (x, ids.float(), weights),
            "width": (x[:, :-1], ids, weights),
            "weights": (x, ids, weights[:, :-1]),
            "x": (x.double(), ids, weights),
        }
        with pytest.raises(JitmoeError):
            self.layer(*wrong[how])

    @rule()
    def release(self) -> None:
        jitmoe.release_memory()

    def teardown(self) -> None:
        if hasattr(self, "layer"):
            assert all(parameter.grad is None for parameter in self.layer.parameters())


QUIET = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning", "ignore:all LoRA parameters")
"""It forks with threads, and freezes adapters, on purpose."""

EITHER = settings(
    phases=[Phase.generate],  # a sequence is short, and its steps are too slow to make it shorter
    stateful_step_count=8,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
)


@QUIET
def test_sequences_of_calls() -> None:
    build_kernels([kind.case for kind in PLAIN], [ISA])
    run_state_machine_as_test(Calls, settings=settings(EITHER, max_examples=30, derandomize=True))


@pytest.mark.slow
@pytest.mark.timeout(0)
@QUIET
@pytest.mark.parametrize("isa", usable_isas())
def test_many_sequences_of_calls(isa: str, request: pytest.FixtureRequest) -> None:
    machine = type("Calls", (Calls,), {"isa": isa})
    examples = request.config.getoption("--examples")
    run_state_machine_as_test(machine, settings=settings(EITHER, max_examples=examples, stateful_step_count=25))
