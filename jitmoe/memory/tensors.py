"""Every tensor of a layer and of one call that lies outside the arena, with its kind and its lifetime."""

import math
from dataclasses import dataclass
from typing import Literal

from jitmoe.config import MoEConfig
from jitmoe.plan.parts import parts_of
from jitmoe.plan.placement import ITEM_BYTES
from jitmoe.plan.projections import lora_shapes, projections
from jitmoe.plan.scratch import FORWARD_STEPS, saved_tensors

HeldKind = Literal["packed weight", "parameter", "gradient", "saved", "input", "result", "transient"]
"""What memory outside the arena is for:

- packed weight, parameter: the layer's own;
- gradient: ``.grad`` of the parameters, from former calls;
- saved: what autograd keeps of one call until its backward;
- input: tensors of the caller that autograd does not keep;
- result: out and what backward returns for x and the routing weights;
- transient: allocated for one pass and freed at its end.
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
"""All kinds in the order of tables."""


@dataclass(frozen=True)
class Held:
    """A tensor outside the arena, alive from step ``first`` to step ``last`` of its plan, both included.

    It is no :class:`~jitmoe.plan.placement.Buffer`: it has no offset, and the arena refuses it.
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


def layer_tensors(config: MoEConfig, lora_dtype: str, last: int) -> list[Held]:
    """Packed weights and parameters, alive from step 0 to step ``last``."""
    held = [
        Held(f"packed_{p.name}{part.suffix}", (config.num_experts, p.packed_items(config)), "int16", "packed weight",
             0, last)
        for part in parts_of(config)
        for p in projections(config.hidden_size, part.end - part.first)
    ]  # fmt: skip
    if config.bias:
        held += [
            Held(p.bias_name, (config.num_experts, p.out), "float32", "packed weight", 0, last)
            for p in projections(config.hidden_size, config.intermediate_size)
        ]
    return held + [Held(name, shape, lora_dtype, "parameter", 0, last) for name, shape in _lora(config).items()]


def _lora(config: MoEConfig) -> dict[str, tuple[int, int, int]]:
    return lora_shapes(config.hidden_size, config.intermediate_size, config.num_experts, config.lora_rank)


def call_tensors(config: MoEConfig, tokens: int, training: bool, x_dtype: str, last: int) -> list[Held]:
    """Tensors of T or S = T K rows, named as in the layer; a copy cast to bfloat16 is called ``... operand``."""
    slots, wide = tokens * config.top_k, (tokens, config.hidden_size)
    forward_end = len(FORWARD_STEPS)
    x_kind: HeldKind = "saved" if training else "input"
    held = [
        Held("x", wide, x_dtype, x_kind, 1, last),
        Held("weights", (tokens, config.top_k), "float32", x_kind, 1, last),
        Held("topk_ids", (tokens, config.top_k), "int64", "input", 1, last),
        Held("out", wide, x_dtype, "result", 1, last),
    ]
    held += _routed("forward", slots, 1, forward_end)
    held += _summands("out", config, wide, x_dtype, 1, forward_end)
    held += _biases_of_parts(config, "forward", 1, forward_end)
    if x_dtype == "float32":
        held.append(Held("forward x operand", wide, "bfloat16", "transient", 1, forward_end))
    if not training:
        return held
    start = forward_end + 1
    held.append(Held("saved topk_ids", (tokens, config.top_k), "int64", "saved", 1, last))
    if not config.recompute:
        for part in parts_of(config):
            saved = saved_tensors(part.end - part.first, slots, config.lora_rank)
            held += [Held(f"{s.name}{part.suffix}", s.shape, s.dtype, "saved", 1, last) for s in saved]
    held += [
        Held("out.grad", wide, x_dtype, "input", start, last),
        *_routed("backward", slots, start, last - 1),
        Held("x.grad", wide, x_dtype, "result", start, last),
        Held("weights.grad", (tokens, config.top_k), "float32", "result", start, last),
    ]
    held += _summands("x.grad", config, wide, x_dtype, start, last)
    held += _summands("weights.grad", config, (tokens, config.top_k), "float32", start, last)
    held += _biases_of_parts(config, "backward", start, last)
    if x_dtype == "float32":
        names = ("backward x operand", "out.grad operand")
        held += [Held(name, wide, "bfloat16", "transient", start, last) for name in names]
    return held


def _summands(name: str, config: MoEConfig, shape: tuple[int, ...], dtype: str, first: int, last: int) -> list[Held]:
    """What the parts add up, in float32; the first summand becomes the sum where that has the same dtype."""
    parts = [part for part in parts_of(config) if not part.is_whole and (part.index or dtype != "float32")]
    return [Held(f"{name}{part.suffix}", shape, "float32", "transient", first, last) for part in parts]


def _biases_of_parts(config: MoEConfig, pass_name: str, first: int, last: int) -> list[Held]:
    """Copies of what a part has of the biases, and the zeros that all but the first one add for down's."""
    held = []
    for part in parts_of(config) if config.bias and config.parts > 1 else ():
        columns, hidden = part.end - part.first, config.hidden_size
        extents = {"gate": columns, "up": columns} | ({"down": hidden} if part.index else {})
        for name, out in extents.items():
            shape = (config.num_experts, out)
            title = f"{pass_name} {name}_bias{part.suffix}"
            held.append(Held(title, shape, "float32", "transient", first, last))
    return held


def _routed(pass_name: str, slots: int, first: int, last: int) -> list[Held]:
    """The routing of one pass, which each makes for itself."""
    kinds = {"row_token": "int64", "row_slot": "int64", "row_weight": "float32"}
    return [Held(f"{pass_name} {name}", (slots,), kind, "transient", first, last) for name, kind in kinds.items()]


def gradient_tensors(config: MoEConfig, lora_dtype: str, start: int, last: int) -> list[Held]:
    """Gradients of former calls, and new ones in float32, which are cast at the end where parameters are bfloat16.

    Of what has no axis I each part makes one; they are added to the first.
    """
    held = []
    for name in ("gate_lora_a", "up_lora_a", "down_lora_b") if config.lora_rank else ():
        held += _summands(f"new {name}.grad", config, _lora(config)[name], "float32", start, last)
    for name, shape in _lora(config).items():
        held += [
            Held(f"{name}.grad", shape, lora_dtype, "gradient", 0, last),
            Held(f"new {name}.grad", shape, "float32", "transient", start, last),
        ]
        if lora_dtype != "float32":
            held.append(Held(f"new {name}.grad, cast", shape, lora_dtype, "transient", last, last))
    return held
