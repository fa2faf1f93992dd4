"""Estimates the memory of a model's experts from their sizes alone; nothing is allocated or compiled."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from jitmoe.config import MAX_SIZE, MoEConfig
from jitmoe.errors import ConfigError
from jitmoe.formats import WeightFormat
from jitmoe.limits import available_memory
from jitmoe.memory.plan import MemoryPlan, kernels_of, plan_call
from jitmoe.memory.tensors import KINDS
from jitmoe.plan.groups import GROUP_BYTES
from jitmoe.text import size, table

ADAM_STATES = 2
"""Tensors that AdamW keeps for each parameter, in the dtype of the parameter."""

SMALLER: tuple[WeightFormat, ...] = ("int8_row", "int4_group")
"""Weight formats whose saving is shown."""

PER_LAYER = ("packed weight", "parameter", "gradient", "saved")
"""Kinds that every layer of a model holds at the worst moment, the end of the first backward pass. The other kinds
belong to the layer that is being computed."""


@dataclass(frozen=True)
class Item:
    """Memory of one kind: ``each`` bytes, held ``copies`` times at once in the whole model."""

    kind: str
    what: str
    each: int
    copies: int

    @property
    def total(self) -> int:
        """Bytes in the whole model."""
        return self.each * self.copies


@dataclass(frozen=True)
class Load:
    """What to estimate.

    Attributes:
        config: of each layer. It may name an instruction set that this machine lacks.
        tokens: T, tokens of one call.
        layers: layers with experts; all have run forward when backward begins.
        threads: threads of a call; each has scratch of its own.
        training: with gradients, optimizer and saved tensors; else inference.
        group_bytes: bytes of the panels of one group; see :data:`~jitmoe.plan.groups.GROUP_BYTES`.

    Raises:
        ConfigError: a number is out of range.
    """

    config: MoEConfig
    tokens: int
    layers: int = 1
    threads: int = 1
    training: bool = True
    group_bytes: int = GROUP_BYTES

    def __post_init__(self) -> None:
        if not 1 <= self.tokens <= MAX_SIZE:
            raise ConfigError(f"tokens must be between 1 and 2^40, got {self.tokens}")
        if self.layers < 1 or self.threads < 1:
            raise ConfigError(f"layers and threads must be at least 1, got {self.layers} and {self.threads}")

    def plan(self) -> MemoryPlan:
        """All memory of one layer and its call; errors as of :meth:`~jitmoe.memory.plan.MemoryPlan.of`."""
        kernels = kernels_of(self.config)
        return plan_call(kernels, self.tokens, self.threads, self.training, group_bytes=self.group_bytes)


@dataclass(frozen=True)
class Estimate:
    """Memory of the experts of a model; prints as tables.

    Attributes:
        load: what was estimated.
        plan: every buffer of one layer and its call.
        items: bytes that the whole model holds, by kind.
        available: bytes that the machine has free.
        savings: bytes that each change would save, by its description.
    """

    load: Load
    plan: MemoryPlan
    items: tuple[Item, ...]
    available: int
    savings: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes held at once at the worst moment of a training step."""
        return sum(item.total for item in self.items)

    def __str__(self) -> str:
        load = self.load
        rows = [("kind", "what", "each", "layers", "in all")]
        rows += [(item.kind, item.what, size(item.each), str(item.copies), size(item.total)) for item in self.items]
        layers = f"{load.layers} layer{'s' if load.layers > 1 else ''}"
        rows.append(("total", f"{layers}, {load.tokens} tokens a call", "", "", size(self.total)))
        rows.append(("machine", f"free memory: {_verdict(self.total, self.available)}", "", "", size(self.available)))
        if load.config.memory_budget is not None:
            budget = load.config.memory_budget
            verdict = _verdict(self.plan.nbytes, budget)
            rows.append(("budget", f"memory_budget of a layer: {verdict}", size(self.plan.nbytes), "", size(budget)))
        rows += [("saving", change, "", "", size(saved)) for change, saved in self.savings.items()]
        note = "Experts only: attention, shared experts, embeddings and torch's own memory are not counted."
        return f"One layer and its call: {self._title()}\n{self.plan}\n\nThe model:\n{table(rows)}\n{note}"

    def _title(self) -> str:
        """The sizes; a model's file may have given them."""
        load, config = self.load, self.load.config
        lora = f"LoRA of rank {config.lora_rank} in {config.lora_dtype}" if config.lora_rank else "no LoRA"
        threads = f"{load.threads} thread{'s' if load.threads > 1 else ''}"
        return (
            f"{config.num_experts} experts of {config.hidden_size} x {config.intermediate_size}, top {config.top_k}, "
            f"{lora}, {load.tokens} tokens, {threads}, {'training' if load.training else 'inference'}, "
            f"isa {kernels_of(config).isa}"
        )


def _verdict(needed: int, available: int) -> str:
    return f"does not fit, {size(needed - available)} too much" if needed > available else "it fits"


def estimate(load: Load) -> Estimate:
    """Bytes of every kind, and bytes that changes would save; errors as of :meth:`Load.plan`."""
    plan = load.plan()
    items = _items(load, plan)
    total = sum(item.total for item in items)
    savings = {change: total - _total(other) for change, other in _changes(load)}
    return Estimate(load, plan, items, available_memory(), savings)


WHAT = {
    "packed weight": "the only copy of the base",
    "parameter": "LoRA",
    "gradient": "LoRA",
    "saved": "for backward: x, routes, gate and up, LoRA's low-rank products",
    "input": "of the caller",
    "result": "out and gradients of the inputs",
    "transient": "of one pass, outside the arena",
    "scratch": "the arena, worst routing",
}


def _items(load: Load, plan: MemoryPlan) -> tuple[Item, ...]:
    found = plan.by_kind()
    items = [
        Item(kind, WHAT[kind], found[kind], load.layers if kind in PER_LAYER else 1) for kind in KINDS if kind in found
    ]
    if load.training and "parameter" in found:
        items.append(Item("optimizer", "AdamW, two moments", ADAM_STATES * found["parameter"], load.layers))
    return tuple(items)


def _total(load: Load) -> int:
    return sum(item.total for item in _items(load, load.plan()))


def _changes(load: Load) -> Iterator[tuple[str, Load]]:
    config = load.config
    if load.training and not config.recompute:
        yield "recompute=True", replace(load, config=replace(config, recompute=True))
    if load.tokens > 1:
        yield "half as many tokens a call", replace(load, tokens=load.tokens // 2)
    yield "groups of half the rows (GROUP_BYTES in plan/groups.py)", replace(load, group_bytes=load.group_bytes // 2)
    if config.lora_rank and config.lora_dtype != "bfloat16":
        yield 'lora_dtype="bfloat16"', replace(load, config=replace(config, lora_dtype="bfloat16"))
    if not config.packing.quantized:
        for name in SMALLER:
            yield f'weight_format="{name}"', replace(load, config=replace(config, weight_format=name))
