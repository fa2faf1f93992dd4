"""All memory of a layer and of one call of it, tensor by tensor, before any of it is allocated; and the limit on it.

::

    step       0      1 ... 4             5 ... 9               10
               layer  forward load ...    backward load ...     return
    layer      ######################################################   packed weights, parameters, their gradients
    call              ###############################################   x, saved gate and up, results
    arena             ###############################################   scratch: one size for both passes, reused
"""

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from jitmoe.config import MAX_SIZE, MoEConfig
from jitmoe.errors import BudgetError, ConfigError
from jitmoe.jit import cpu
from jitmoe.plan.groups import GROUP_BYTES, group_limit, worst_extents
from jitmoe.plan.placement import ITEM_BYTES, ScratchPlan
from jitmoe.plan.projections import lora_shapes, projections
from jitmoe.plan.scratch import (
    BACKWARD_STEPS,
    FORWARD_STEPS,
    plan_backward,
    plan_forward,
    row_bytes,
    saved_tensors,
)
from jitmoe.plan.shapes import KernelPlan, plan_kernels
from jitmoe.text import size, table

HeldKind = Literal["packed weight", "parameter", "gradient", "saved", "input", "result", "transient"]
"""What memory outside the arena is for:

- packed weight, parameter: the layer's own;
- gradient: ``.grad`` of the parameters, from former calls;
- saved: what autograd keeps of one call until its backward;
- input: the caller's tensors that nothing is saved of;
- result: out and what backward returns for x and the routing weights;
- transient: of one pass, and gone with it.
"""

Kind = HeldKind | Literal["scratch"]

KINDS: tuple[Kind, ...] = (
    "packed weight",
    "parameter",
    "gradient",
    "saved",
    "input",
    "result",
    "transient",
    "scratch",
)
"""In the order of tables."""


@dataclass(frozen=True)
class Held:
    """A tensor outside the arena, alive from step ``first`` to step ``last`` of its plan, both included.

    Not a :class:`~jitmoe.plan.scratch.Buffer`: it has no offset, and the planner of the arena takes none of these.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: HeldKind
    first: int
    last: int

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Pass:
    """Scratch of forward or backward, whose first step is step ``start`` of the plan."""

    name: str
    start: int
    scratch: ScratchPlan


@dataclass(frozen=True)
class Row:
    """One line of the table: a tensor, or a buffer of the arena at its ``offset`` (None outside the arena)."""

    kind: Kind
    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    first: int
    last: int
    offset: int | None


@dataclass(frozen=True)
class MemoryPlan:
    """Every tensor and buffer of a layer and of one call of it: ``print`` shows the table.

    Scratch is that of the worst routing, which no call of these sizes exceeds. x and the routing weights count as
    saved in training, as autograd keeps them; gradients count twice in backward, where new ones are added to those of
    former calls. Other calls of the layer between their forward and backward hold their own saved tensors beside.

    Attributes:
        config: of the layer.
        tokens: T.
        threads: threads of the call; each has scratch of its own.
        steps: names of the steps.
        held: what lies outside the arena.
        passes: what lies in the arena. One arena serves both passes, and keeps the size of the larger.
    """

    config: MoEConfig
    tokens: int
    threads: int
    steps: tuple[str, ...]
    held: tuple[Held, ...]
    passes: tuple[Pass, ...]

    @classmethod
    def of(
        cls,
        config: MoEConfig,
        tokens: int,
        threads: int | None = None,
        training: bool = True,
        recompute: bool | None = None,
        x_dtype: str = "bfloat16",
    ) -> "MemoryPlan":
        """Plan a call.

        Args:
            config: of the layer. An instruction set that is named need not be one that this machine has.
            tokens: T.
            threads: of the call; all CPUs where not given.
            training: forward and backward; else forward alone, which saves nothing.
            recompute: instead of the config's.
            x_dtype: "bfloat16" or "float32"; of x, out, and their gradients. Routing weights are float32.

        Raises:
            ConfigError: for numbers that make no call.
            PlanError: if two live buffers of the arena would share addresses.
        """
        threads = len(os.sched_getaffinity(0)) if threads is None else threads
        for name, value, least in (("tokens", tokens, 0), ("threads", threads, 1)):
            if not isinstance(value, int) or not least <= value <= MAX_SIZE:
                raise ConfigError(f"{name} must be between {least} and 2^40, got {value!r}")
        if x_dtype not in ("bfloat16", "float32"):
            raise ConfigError(f"x_dtype must be bfloat16 or float32, got {x_dtype!r}")
        if recompute is not None:
            config = replace(config, recompute=recompute)
        return plan_call(kernels_of(config), tokens, threads, training, x_dtype)

    @property
    def arena(self) -> int:
        """Bytes of the arena."""
        return max((item.scratch.nbytes for item in self.passes), default=0)

    @property
    def peak_step(self) -> int:
        """The (first) step at which most bytes are held."""
        return max(range(len(self.steps)), key=self.bytes_at)

    @property
    def nbytes(self) -> int:
        """Bytes held at once at the worst moment."""
        return self.bytes_at(self.peak_step)

    def bytes_at(self, step: int) -> int:
        """Bytes held at ``step``; the arena counts from its first use."""
        return sum(self._kinds_at(step).values())

    def by_kind(self) -> dict[Kind, int]:
        """Bytes of each kind at the worst moment; kinds without any are left out."""
        return self._kinds_at(self.peak_step)

    def rows(self) -> tuple[Row, ...]:
        """All lines of the table."""
        held = [Row(t.kind, t.name, t.shape, t.dtype, t.nbytes, t.first, t.last, None) for t in self.held]
        scratch = [
            Row("scratch", f"{item.name} {b.name}", b.shape, b.dtype, b.nbytes,
                item.start + b.first, item.start + b.last, placed.offset)
            for item in self.passes
            for placed in sorted(item.scratch.placed, key=lambda p: p.offset)
            for b in [placed.buffer]
        ]  # fmt: skip
        return tuple(sorted([*held, *scratch], key=lambda row: KINDS.index(row.kind)))

    def summary(self) -> str:
        """Bytes of each kind at the worst moment, as a table."""
        kinds = [(kind, size(nbytes), _most_of(self.rows(), kind)) for kind, nbytes in self.by_kind().items()]
        worst = f"at the step {self.steps[self.peak_step]!r}"
        return table([("kind", "bytes", "most of it"), *kinds, ("total", size(self.nbytes), worst)])

    def __str__(self) -> str:
        lines = [("kind", "what", "shape", "dtype", "bytes", "steps", "offset")]
        lines += [
            (row.kind, row.name, " x ".join(map(str, row.shape)), row.dtype, size(row.nbytes),
             f"{row.first}-{row.last}", "" if row.offset is None else str(row.offset))
            for row in self.rows()
        ]  # fmt: skip
        steps = ", ".join(f"{number} {name}" for number, name in enumerate(self.steps))
        return f"{table(lines)}\n\nsteps: {steps}\n\n{self.summary()}"

    def _kinds_at(self, step: int) -> dict[Kind, int]:
        found = dict.fromkeys(KINDS, 0)
        for tensor in self.held:
            if tensor.first <= step <= tensor.last:
                found[tensor.kind] += tensor.nbytes
        if step >= 1:
            found["scratch"] = self.arena
        return {kind: nbytes for kind, nbytes in found.items() if nbytes}


def _most_of(rows: Iterable[Row], kind: Kind) -> str:
    return max((row for row in rows if row.kind == kind), key=lambda row: row.nbytes).name


def kernels_of(config: MoEConfig) -> KernelPlan:
    """The kernels to plan with; unlike a layer's, an instruction set that is named need not be usable here."""
    requested = config.requested_isa
    return plan_kernels(config, cpu.resolve_isa(requested) if requested == "auto" else requested)


def plan_layer(config: MoEConfig) -> MemoryPlan:
    """What the layer holds between calls, before there are gradients."""
    return MemoryPlan(config, 0, 1, ("layer",), tuple(_layer_tensors(config, config.lora_dtype, last=0)), ())


def plan_call(
    kernels: KernelPlan,
    tokens: int,
    threads: int,
    training: bool,
    x_dtype: str = "bfloat16",
    group_bytes: int = GROUP_BYTES,
) -> MemoryPlan:
    """Plan a call that takes one of ``kernels``; :meth:`MemoryPlan.of` says the rest."""
    passes = [_worst_pass("forward", 1, kernels, tokens, threads, group_bytes)]
    if training:
        passes.append(_worst_pass("backward", 1 + len(FORWARD_STEPS), kernels, tokens, threads, group_bytes))
    names = {"forward": FORWARD_STEPS, "backward": BACKWARD_STEPS}
    steps = ("layer", *(f"{item.name} {step}" for item in passes for step in names[item.name]), "return")
    config, last = kernels.config, len(steps) - 1
    lora_dtype = "bfloat16" if kernels.shapes[0].lora_bf16 else "float32"
    held = _layer_tensors(config, lora_dtype, last) + _call_tensors(config, tokens, training, x_dtype, last)
    if training:
        held += _gradients(config, lora_dtype, passes[1].start, last)
    return MemoryPlan(config, tokens, threads, steps, tuple(held), tuple(passes))


def check_layer(config: MoEConfig) -> None:
    """Refuse a layer whose weights and parameters alone exceed ``config.memory_budget``.

    Raises:
        BudgetError: with the table.
    """
    if config.memory_budget is not None:
        _refuse_over(plan_layer(config), "the weights and parameters of the layer take")


def check_call(kernels: KernelPlan, tokens: int, threads: int, training: bool, x_dtype: str) -> None:
    """Refuse a call that under the worst routing exceeds the budget of its config.

    The routing at hand does not count: a training run whose first call passes is not refused in the middle.

    Raises:
        BudgetError: with the table.
    """
    if kernels.config.memory_budget is not None:
        _check_call(kernels, tokens, threads, training, x_dtype)


@lru_cache(maxsize=64)
def _check_call(kernels: KernelPlan, tokens: int, threads: int, training: bool, x_dtype: str) -> None:
    plan = plan_call(kernels, tokens, threads, training, x_dtype)
    _refuse_over(plan, f"the layer with this call of {tokens} tokens takes")


def _refuse_over(plan: MemoryPlan, what: str) -> None:
    budget = plan.config.memory_budget
    assert budget is not None
    if plan.nbytes > budget:
        raise BudgetError(
            f"{what} {plan.nbytes} bytes ({size(plan.nbytes)}), and memory_budget is {budget} ({size(budget)}): raise "
            "it, or take fewer tokens a call, recompute=True, a lower lora_rank or lora_dtype='bfloat16'. "
            f"print(jitmoe.MemoryPlan.of(config, tokens)) shows every buffer.\n{plan.summary()}"
        )


def _layer_tensors(config: MoEConfig, lora_dtype: str, last: int) -> list[Held]:
    held = [
        Held(f"packed_{p.name}", (config.num_experts, p.packed_elements), "int16", "packed weight", 0, last)
        for p in projections(config.hidden_size, config.intermediate_size)
    ]
    return held + [Held(name, shape, lora_dtype, "parameter", 0, last) for name, shape in _lora(config).items()]


def _lora(config: MoEConfig) -> dict[str, tuple[int, int, int]]:
    return lora_shapes(config.hidden_size, config.intermediate_size, config.num_experts, config.lora_rank)


def _call_tensors(config: MoEConfig, tokens: int, training: bool, x_dtype: str, last: int) -> list[Held]:
    """Tensors of T or S = T K rows, named as in the layer; those that the layer casts to bfloat16, ``... operand``."""
    slots, wide = tokens * config.top_k, (tokens, config.hidden_size)
    forward_end = len(FORWARD_STEPS)
    x_kind: HeldKind = "saved" if training else "input"
    route_kind: HeldKind = "saved" if training else "transient"
    held = [
        Held("x", wide, x_dtype, x_kind, 1, last),
        Held("weights", (tokens, config.top_k), "float32", x_kind, 1, last),
        Held("topk_ids", (tokens, config.top_k), "int64", "input", 1, last),
        Held("out", wide, x_dtype, "result", 1, last),
    ]
    held += [Held(name, (slots,), "int64", route_kind, 1, last) for name in ("row_token", "row_slot")]
    held.append(Held("forward row_weight", (slots,), "float32", "transient", 1, forward_end))
    if x_dtype == "float32":
        held.append(Held("forward x operand", wide, "bfloat16", "transient", 1, forward_end))
    if not training:
        return held
    start = forward_end + 1
    if not config.recompute:
        saved = saved_tensors(config.intermediate_size, slots, config.lora_rank)
        held += [Held(s.name, s.shape, s.dtype, "saved", 1, last) for s in saved]
    held += [
        Held("out.grad", wide, x_dtype, "input", start, last),
        Held("backward row_weight", (slots,), "float32", "transient", start, last - 1),
        Held("x.grad", wide, x_dtype, "result", start, last),
        Held("weights.grad", (tokens, config.top_k), "float32", "result", start, last),
    ]
    if x_dtype == "float32":
        names = ("backward x operand", "out.grad operand")
        held += [Held(name, wide, "bfloat16", "transient", start, last) for name in names]
    return held


def _gradients(config: MoEConfig, lora_dtype: str, start: int, last: int) -> list[Held]:
    """Those of former calls, and the new ones in float32, cast at the end where the parameters are bfloat16."""
    held = []
    for name, shape in _lora(config).items():
        held += [
            Held(f"{name}.grad", shape, lora_dtype, "gradient", 0, last),
            Held(f"new {name}.grad", shape, "float32", "transient", start, last),
        ]
        if lora_dtype != "float32":
            held.append(Held(f"new {name}.grad, cast", shape, lora_dtype, "transient", last, last))
    return held


def _worst_pass(
    name: Literal["forward", "backward"],
    start: int,
    kernels: KernelPlan,
    tokens: int,
    threads: int,
    group_bytes: int,
) -> Pass:
    """The pass with the largest scratch among all routings: among the kernels they reach, each with the worst rows."""
    config, training = kernels.config, name == "backward"
    slots = tokens * config.top_k
    found: list[ScratchPlan] = []
    for shape, active in kernels.reachable(slots).items():
        limit = group_limit(shape.m_step, row_bytes(shape, training), group_bytes)
        extents = worst_extents(tokens, slots, active, shape.m_step, limit, config.lora_rank, threads)
        if training:
            found.append(plan_backward(shape, extents, x_grad=True, recompute=config.recompute))
        else:
            found.append(plan_forward(shape, extents))
    return Pass(name, start, max(found, key=lambda plan: plan.nbytes))
