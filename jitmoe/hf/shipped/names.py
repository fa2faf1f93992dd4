"""How checkpoints call the tensors that a quantised weight consists of.

A weight has the name that it has in a bfloat16 checkpoint: ``...gate_proj.weight`` of an expert, or
``...experts.gate_up_proj`` of all.
"""

from collections.abc import Iterable, Mapping
from typing import Literal

from jitmoe.quantization_config import TensorLayout

Role = Literal["values", "scales", "shape", "zeros", "groups"]
"""What a tensor holds: codes, their scales, [out, in], zero points, the group of each input."""

SUFFIXES: dict[TensorLayout, dict[Role, str]] = {
    "fp8": {"values": "", "scales": "_scale_inv"},
    "compressed": {"values": "", "scales": "_scale"},
    "compressed_packed": {"values": "_packed", "scales": "_scale", "shape": "_shape"},
    "mxfp4": {"values": "_blocks", "scales": "_scales"},
}
"""What follows the name of the weight."""

OF_MODULE: dict[TensorLayout, dict[Role, str]] = {
    "gptq": {"values": "qweight", "scales": "scales", "zeros": "qzeros", "groups": "g_idx"}
}
"""What takes the place of ``weight`` in the name of the weight."""

MARKS: dict[TensorLayout, Role] = {
    "compressed_packed": "values",
    "mxfp4": "values",
    "gptq": "values",
    "fp8": "scales",
    "compressed": "scales",
}
"""The tensor by which a weight of a layout is found; a layout whose tensors another one has too comes after it."""

WEIGHT = "weight"


def tensors_of(layout: TensorLayout, weight: str) -> dict[Role, str]:
    """Names of the tensors of ``weight`` in this layout."""
    if layout in OF_MODULE:
        module = weight.removesuffix(WEIGHT)
        return {role: module + name for role, name in OF_MODULE[layout].items()}
    return {role: weight + suffix for role, suffix in SUFFIXES[layout].items()}


def weights_among(names: Iterable[str], layouts: Iterable[TensorLayout]) -> Mapping[str, TensorLayout]:
    """Quantised weights whose marks are among the tensors ``names`` of a checkpoint, and their layouts."""
    names, wanted = list(names), set(layouts)
    found: dict[str, TensorLayout] = {}
    for layout, mark in MARKS.items():
        if layout in wanted:
            for weight in filter(None, (_weight_of(layout, mark, name) for name in names)):
                found.setdefault(weight, layout)
    return found


def _weight_of(layout: TensorLayout, role: Role, name: str) -> str | None:
    """The weight that the tensor ``name`` would belong to, if it is one of this layout and role."""
    if layout in OF_MODULE:
        module, dot, leaf = name.rpartition(".")
        return f"{module}{dot}{WEIGHT}" if leaf == OF_MODULE[layout][role] else None
    suffix = SUFFIXES[layout][role]
    return name.removesuffix(suffix) if name.endswith(suffix) else None
