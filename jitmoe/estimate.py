"""How much memory a model's experts will take, from their sizes alone: nothing is allocated and nothing compiled."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from jitmoe import cpu
from jitmoe.build import table
from jitmoe.config import MoEConfig
from jitmoe.errors import ConfigError
from jitmoe.memory import ITEM_BYTES, CallSize, plan_backward, plan_forward, row_bytes, saved_shape
from jitmoe.plan import Shape, packed_elements, plan_groups, plan_kernels

MAX_TOKENS = 1 << 24
"""Tokens of one call that an estimate is made for."""

ADAM_STATES = 2
"""Tensors that AdamW keeps for each parameter, of its dtype."""


SHARES = 16
"""In how many steps the rows move to a single expert in the search for the routing with the largest scratch."""


@dataclass(frozen=True)
class Item:
    """One row: ``each`` bytes, held ``copies`` times at once in the whole model."""

    kind: str
    name: str
    each: int
    copies: int

    @property
    def total(self) -> int:
        """Bytes in the whole model."""
        return self.each * self.copies


@dataclass(frozen=True)
class Load:
    """What is to be estimated.

    Attributes:
        config: of each layer. An instruction set that is named need not be one that this machine has.
        tokens: T, tokens of one call.
        layers: layers of the model; their forwards are all outstanding when backward begins.
        threads: threads of a call; each has scratch of its own.
        training: with gradients, optimizer and saved tensors; else inference.

    Raises:
        ConfigError: for numbers that make no call.
    """

    config: MoEConfig
    tokens: int
    layers: int = 1
    threads: int = 1
    training: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.tokens <= MAX_TOKENS:
            raise ConfigError(
                f"tokens must be between 1 and {MAX_TOKENS}, got {self.tokens}: split it into several calls"
            )
        if self.layers < 1 or self.threads < 1:
            raise ConfigError(f"layers and threads must be at least 1, got {self.layers} and {self.threads}")

    @property
    def slots(self) -> int:
        """S = T K."""
        return self.tokens * self.config.top_k

    def shape(self) -> Shape:
        """The kernel that a call with even routing takes."""
        requested = self.config.requested_isa
        isa = cpu.resolve_isa(requested) if requested == "auto" else requested
        return plan_kernels(self.config, isa).select(self.slots, min(self.config.num_experts, self.slots))


@dataclass(frozen=True)
class Estimate:
    """Memory of the experts of a model; prints as a table.

    Attributes:
        load: what was estimated.
        items: the rows; scratch is that of the worst routing.
        even_scratch: bytes of scratch where the tokens spread evenly over the experts.
        available: bytes that the machine has free.
        savings: bytes that each change would save, by its description.
    """

    load: Load
    items: tuple[Item, ...]
    even_scratch: int
    available: int
    savings: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes held at once at the worst moment of a step."""
        return sum(item.total for item in self.items)

    def __str__(self) -> str:
        missing = self.total - self.available
        rows = [("kind", "what", "each", "in all")]
        rows += [(item.kind, item.name, size(item.each), size(item.total)) for item in self.items]
        rows.append(("total", f"{self.load.layers} layers, {self.load.tokens} tokens a call", "", size(self.total)))
        rows.append(("", "with evenly spread tokens the scratch is", size(self.even_scratch), ""))
        verdict = f"does not fit, {size(missing)} too much" if missing > 0 else "it fits"
        rows.append(("machine", f"free memory: {verdict}", "", size(self.available)))
        rows += [("saving", change, "", size(saved)) for change, saved in self.savings.items()]
        note = "Experts only: attention, shared experts, embeddings and torch's own memory are not counted."
        return f"{table(rows)}\n{note}"


def estimate(load: Load) -> Estimate:
    """Bytes of every kind, and what changes would save."""
    items = _items(load)
    total = sum(item.total for item in items)
    savings = {change: total - sum(item.total for item in _items(other)) for change, other in _changes(load)}
    return Estimate(load, items, _even_scratch(load), available_memory(), savings)


def adapter_elements(config: MoEConfig) -> int:
    """Elements of the six LoRA parameters of a layer."""
    return 3 * config.num_experts * config.lora_rank * (config.hidden_size + config.intermediate_size)


def packed_bytes(config: MoEConfig) -> int:
    """Bytes of the one packed copy of a layer's base weights."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    elements = 2 * packed_elements(intermediate, hidden) + packed_elements(hidden, intermediate)
    return config.num_experts * elements * ITEM_BYTES["bfloat16"]


def size(nbytes: int) -> str:
    """``nbytes`` in the unit that a person would use."""
    value = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.4g} TB"


def _items(load: Load) -> tuple[Item, ...]:
    config, layers = load.config, load.layers
    adapters = adapter_elements(config) * ITEM_BYTES[config.lora_dtype]
    rows_of_x = load.tokens * config.hidden_size * ITEM_BYTES["bfloat16"]
    items = [Item("weights", "packed base", packed_bytes(config), layers)]
    if adapters:
        items.append(Item("parameters", f"LoRA, {config.lora_dtype}", adapters, layers))
    if load.training and adapters:
        items.append(Item("gradients", "LoRA", adapters, layers))
        items.append(Item("optimizer", "AdamW, two moments", ADAM_STATES * adapters, layers))
    if load.training:
        saved = (
            0
            if config.recompute
            else 2 * math.prod(saved_shape(config.intermediate_size, load.slots)) * ITEM_BYTES["bfloat16"]
        )
        items.append(Item("saved", "gate and up before the activation", saved, layers))
        items.append(Item("saved", "x, routing weights and routes", rows_of_x + _route_bytes(load), layers))
        items.append(Item("results", "out and gradient of x", 2 * rows_of_x, 1))
        items.append(
            Item("results", "LoRA gradients before they are added", adapter_elements(config) * ITEM_BYTES["float32"], 1)
        )
    else:
        items.append(Item("results", "out", rows_of_x, 1))
    items.append(Item("scratch", "arena, worst routing", _worst_scratch(load), 1))
    return tuple(items)


def _route_bytes(load: Load) -> int:
    """Routing weights in float32, and the slot's row, the row's slot and its token in 64 bits."""
    return load.slots * (4 + 3 * 8)


def _changes(load: Load) -> Iterator[tuple[str, Load]]:
    config = load.config
    if load.training and not config.recompute:
        yield "recompute=True", replace(load, config=replace(config, recompute=True))
    if load.tokens > 1:
        yield "half as many tokens a call", replace(load, tokens=load.tokens // 2)
    if config.lora_rank and config.lora_dtype != "bfloat16":
        yield 'lora_dtype="bfloat16"', replace(load, config=replace(config, lora_dtype="bfloat16"))


def _even_scratch(load: Load) -> int:
    experts = min(load.config.num_experts, load.slots)
    return _scratch(load, [load.slots * i // experts for i in range(experts + 1)])


def _worst_scratch(load: Load) -> int:
    """Scratch where the rows pile up on one expert: more of them share a segment, until a group is full."""
    piles = {load.slots * share // SHARES for share in range(1, SHARES)}
    skewed = [[0, pile, load.slots] for pile in sorted(piles) if 0 < pile < load.slots]
    return max(_even_scratch(load), *(_scratch(load, offsets) for offsets in [[0, load.slots], *skewed]))


def _scratch(load: Load, offsets: list[int]) -> int:
    """Bytes of the arena of a call (backward's too in training) whose experts have the row ranges ``offsets``."""
    shape, config = load.shape(), load.config
    active, ranges = np.arange(len(offsets) - 1), np.array(offsets)

    def extents(training: bool) -> CallSize:
        groups = plan_groups(active, ranges, shape.m_step, row_bytes(shape, training))
        rows = (groups.rows, groups.blocks, groups.segment_rows)
        return CallSize(load.tokens, *rows, config.lora_rank, load.threads)

    forward = plan_forward(shape, extents(training=False)).nbytes
    if not load.training:
        return forward
    return max(forward, plan_backward(shape, extents(training=True), x_grad=True, recompute=config.recompute).nbytes)


def available_memory() -> int:
    """Bytes that new allocations can take without swapping, as the kernel says; all of them where it does not."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    values = {name: value for name, _, value in (line.partition(":") for line in lines)}
    return int(values["MemAvailable"].split()[0]) * 1024


@dataclass(frozen=True)
class Model:
    """The Mixture-of-Experts part of a transformers model.

    Attributes:
        fields: of :class:`~jitmoe.config.MoEConfig`.
        layers: layers with experts.
    """

    fields: dict[str, int]
    layers: int


NAMES = {
    "num_experts": ("num_experts", "n_routed_experts", "num_local_experts"),
    "hidden_size": ("hidden_size",),
    "intermediate_size": ("moe_intermediate_size", "intermediate_size"),
    "top_k": ("num_experts_per_tok",),
}
"""Fields of ``config.json``, first match wins: Qwen3-MoE and OLMoE, DeepSeek-V2 and V3, Mixtral. Where a model also
has dense layers, their width is ``intermediate_size`` and that of the experts ``moe_intermediate_size``."""


def read_model(path: Path) -> Model:
    """Sizes of the experts from a transformers ``config.json``.

    Raises:
        ConfigError: if it cannot be read, or is not that of a model with experts.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold a JSON object, the config.json of a transformers model")
    fields = {field: _first(path, content, names) for field, names in NAMES.items()}
    total = _first(path, content, ("num_hidden_layers",))
    return Model(fields, sum(_has_experts(content, layer) for layer in range(total)))


def _first(path: Path, content: Mapping[str, Any], names: tuple[str, ...]) -> int:
    for name in names:
        value = content.get(name)
        if isinstance(value, int):
            return value
    raise ConfigError(f"{path} has none of the fields {', '.join(names)}: not the config.json of a model with experts")


def _has_experts(content: Mapping[str, Any], layer: int) -> bool:
    """Which layers are sparse, as Qwen3-MoE (first line) and DeepSeek say it; the others have experts everywhere."""
    qwen = (
        layer not in (content.get("mlp_only_layers") or ()) and (layer + 1) % content.get("decoder_sparse_step", 1) == 0
    )
    deepseek = layer >= content.get("first_k_dense_replace", 0) and layer % content.get("moe_layer_freq", 1) == 0
    return qwen and deepseek
