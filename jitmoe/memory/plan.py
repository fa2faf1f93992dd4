"""All memory of a layer and of one call of it, tensor by tensor, before any of it is allocated.

::

    step       0      1 ... 4             5 ... 9               10
               layer  forward load ...    backward load ...     return
    layer      ######################################################   packed weights, parameters, their gradients
    call              ###############################################   x, saved gate and up, results
    arena             ###############################################   scratch: one size for both passes, reused
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from jitmoe.config import MAX_SIZE, MoEConfig
from jitmoe.errors import ConfigError
from jitmoe.jit import capability
from jitmoe.memory.tensors import KINDS, Held, Kind, call_tensors, gradient_tensors, layer_tensors
from jitmoe.plan.groups import GROUP_BYTES, group_limit, worst_extents
from jitmoe.plan.placement import ScratchPlan
from jitmoe.plan.scratch import BACKWARD_STEPS, FORWARD_STEPS, plan_backward, plan_forward, row_bytes
from jitmoe.plan.shapes import KernelPlan, ceil_div, plan_kernels
from jitmoe.text import size, table


@dataclass(frozen=True)
class Pass:
    """Scratch of forward or backward.

    Attributes:
        name: "forward" or "backward".
        start: its first step, as a step of the plan.
        scratch: of one part of ``tensor_parallel``.
        parts: that may be computed at one time, each with scratch of its own.
    """

    name: str
    start: int
    scratch: ScratchPlan
    parts: int = 1

    @property
    def nbytes(self) -> int:
        """Bytes of the scratch of all parts."""
        return self.parts * self.scratch.nbytes


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

    Scratch is that of the worst routing, which no call of these sizes exceeds. In training x and the routing weights
    count as saved, because autograd keeps them. Gradients of parameters count twice in backward, where new ones are
    added to those of former calls. Other calls that wait for their backward hold saved tensors of their own.

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
            config: of the layer. It may name an instruction set that this machine lacks.
            tokens: T.
            threads: of the call; all CPUs where not given.
            training: forward and backward; else forward alone, which saves nothing.
            recompute: replaces that of ``config``.
            x_dtype: "bfloat16" or "float32", of x, out, and their gradients. Routing weights are float32.

        Raises:
            ConfigError: a number or dtype is out of range.
            PlanError: two live buffers of the arena would share addresses.
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
        """Bytes of the arena; of those of all parts, with ``tensor_parallel``."""
        return max((item.nbytes for item in self.passes), default=0)

    @property
    def peak_step(self) -> int:
        """The first step at which most bytes are held."""
        return max(range(len(self.steps)), key=self.bytes_at)

    @property
    def nbytes(self) -> int:
        """Bytes held at once at the worst moment."""
        return self.bytes_at(self.peak_step)

    def bytes_at(self, step: int) -> int:
        """Bytes held at ``step``; the arena counts from the first pass on."""
        return sum(self._kinds_at(step).values())

    def by_kind(self) -> dict[Kind, int]:
        """Bytes of each kind at the worst moment; kinds without any are left out."""
        return self._kinds_at(self.peak_step)

    def rows(self) -> tuple[Row, ...]:
        """All lines of the table."""
        held = [Row(t.kind, t.name, t.shape, t.dtype, t.nbytes, t.first, t.last, None) for t in self.held]
        scratch = [
            Row("scratch", f"{item.name} {b.name}{_of_each(item.parts)}", b.shape, b.dtype, b.nbytes,
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


def _of_each(parts: int) -> str:
    return f" of each of {parts} parts" if parts > 1 else ""


def _most_of(rows: Iterable[Row], kind: Kind) -> str:
    return max((row for row in rows if row.kind == kind), key=lambda row: row.nbytes).name


def kernels_of(config: MoEConfig) -> KernelPlan:
    """The kernels to plan with. Unlike a layer, a plan may name an instruction set that this machine lacks.

    Raises:
        ConfigError: ``m_step`` is no register block of the instruction set.
    """
    requested = config.requested_isa
    return plan_kernels(config, capability.resolve_isa(requested) if requested == "auto" else requested)


def plan_layer(config: MoEConfig) -> MemoryPlan:
    """What the layer holds between calls, before there are gradients."""
    return MemoryPlan(config, 0, 1, ("layer",), tuple(layer_tensors(config, config.lora_dtype, last=0)), ())


def plan_call(
    kernels: KernelPlan,
    tokens: int,
    threads: int,
    training: bool,
    x_dtype: str = "bfloat16",
    group_bytes: int = GROUP_BYTES,
) -> MemoryPlan:
    """Plan a call that takes one of ``kernels``; the other arguments and errors are those of :meth:`MemoryPlan.of`."""
    passes = [_worst_pass("forward", 1, kernels, tokens, threads, group_bytes)]
    if training:
        passes.append(_worst_pass("backward", 1 + len(FORWARD_STEPS), kernels, tokens, threads, group_bytes))
    names = {"forward": FORWARD_STEPS, "backward": BACKWARD_STEPS}
    steps = ("layer", *(f"{item.name} {step}" for item in passes for step in names[item.name]), "return")
    config, last = kernels.config, len(steps) - 1
    lora_dtype = "bfloat16" if kernels.shapes[0].lora_bf16 else "float32"
    held = layer_tensors(config, lora_dtype, last) + call_tensors(config, tokens, training, x_dtype, last)
    if training:
        held += gradient_tensors(config, lora_dtype, passes[1].start, last)
    return MemoryPlan(config, tokens, threads, steps, tuple(held), tuple(passes))


def _worst_pass(
    name: Literal["forward", "backward"],
    start: int,
    kernels: KernelPlan,
    tokens: int,
    threads: int,
    group_bytes: int,
) -> Pass:
    """The pass with the largest scratch over all routings: each kernel that one reaches, on the worst extents.

    All parts may run at one time, with a share of the threads each; one part after the other, on all threads, takes
    less than that.
    """
    config, training = kernels.config, name == "backward"
    slots = tokens * config.top_k
    found: list[ScratchPlan] = []
    for part in kernels.by_part:
        for shape, active in part.reachable(slots).items():
            limit = group_limit(shape.m_step, row_bytes(shape, training), group_bytes)
            share = ceil_div(threads, config.parts)
            extents = worst_extents(tokens, slots, active, shape.m_step, limit, config.lora_rank, share)
            if training:
                found.append(plan_backward(shape, extents, x_grad=True, recompute=config.recompute))
            else:
                found.append(plan_forward(shape, extents))
    return Pass(name, start, max(found, key=lambda plan: plan.nbytes), config.parts)
