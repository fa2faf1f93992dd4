"""The experts in a checkpoint, found by their names and held to be complete."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from jitmoe.errors import CheckpointError
from jitmoe.hf.quantizing.families import PROJECTIONS, Family, Place
from jitmoe.hf.quantizing.source import Source

SOURCE_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
"""Of weights that are quantised, by safetensors' names."""


@dataclass(frozen=True)
class Matrix:
    """One projection of one expert, and where its weights lie.

    Attributes:
        place: the projection.
        module: name of its linear module in the checkpoint that is written.
        tensor: name of the tensor that holds it in the one that is read.
        dtype: of that tensor.
        lead: index of its expert in that tensor, if it is stacked.
        first: its first row there, in its expert's part.
        above: rows above it, those of other experts too.
        out: rows.
        in_: columns.
    """

    place: Place
    module: str
    tensor: str
    dtype: torch.dtype
    lead: tuple[int, ...]
    first: int
    above: int
    out: int
    in_: int

    def rows(self, source: Source, start: int, stop: int) -> Tensor:
        """Some of its rows, in the dtype of the file; nothing else is read."""
        row_bytes = self.in_ * self.dtype.itemsize
        data = source.read(self.tensor, (self.above + start) * row_bytes, (self.above + stop) * row_bytes)
        return data.view(self.dtype).view(stop - start, self.in_)


def find_experts(source: Source, family: Family, expected: int | None) -> dict[str, list[Matrix]]:
    """The matrices in each tensor of experts, by its name.

    Args:
        source: the checkpoint.
        family: of the model.
        expected: number of experts, where config.json has it.

    Raises:
        CheckpointError: there are no experts, some are missing, or their shapes do not fit.
    """
    found: dict[str, list[Matrix]] = {}
    for name, (dtype, shape) in source.outlines.items():
        matrices = list(_matrices(family, name, dtype, shape))
        if matrices:
            found[name] = matrices
    if not found:
        example = family.module("model.layers.0." + family.block, 0, "gate_proj")
        raise CheckpointError(f"{source.folder} has no experts: no tensor has a name like {example}.weight")
    _check_complete([matrix for matrices in found.values() for matrix in matrices], expected)
    return found


def _matrices(family: Family, name: str, dtype: str, shape: tuple[int, ...]) -> Iterator[Matrix]:
    """What the tensor holds of experts."""
    place = family.place_of(name)
    if place is not None:
        weights, (out, in_) = _checked(name, dtype, shape, 2), shape
        module = family.module(place.block, place.expert, place.projection)
        yield Matrix(place, module, name, weights, (), 0, 0, out, in_)
    stacked = family.stacked_place_of(name)
    if stacked is None:
        return
    weights = _checked(name, dtype, shape, 3)
    block, projections = stacked
    experts, rows, in_ = shape
    if rows % len(projections):
        raise CheckpointError(f"{name} has {rows} rows, which {' and '.join(projections)} cannot share in equal parts")
    out = rows // len(projections)
    for expert in range(experts):
        for part, projection in enumerate(projections):
            found = Place(block, expert, projection)
            module, first = family.module(block, expert, projection), part * out
            yield Matrix(found, module, name, weights, (expert,), first, expert * rows + first, out, in_)


def _checked(name: str, dtype: str, shape: tuple[int, ...], wanted: int) -> torch.dtype:
    if dtype not in SOURCE_DTYPES:
        raise CheckpointError(f"{name} is {dtype}, and experts are quantised from {', '.join(SOURCE_DTYPES)}")
    if len(shape) != wanted or 0 in shape:
        raise CheckpointError(f"{name} has the shape {list(shape)}, and {wanted} dimensions, none of 0, are expected")
    return SOURCE_DTYPES[dtype]


def _check_complete(matrices: list[Matrix], expected: int | None) -> None:
    blocks: dict[str, dict[int, dict[str, Matrix]]] = defaultdict(lambda: defaultdict(dict))
    for matrix in matrices:
        place = matrix.place
        if place.projection in blocks[place.block][place.expert]:
            raise CheckpointError(f"the checkpoint has {matrix.module} twice: of its own, and in a stacked tensor")
        blocks[place.block][place.expert][place.projection] = matrix
    for block, experts in blocks.items():
        count = expected or max(experts) + 1
        for expert in range(max(count, max(experts) + 1)):
            if expert >= count:
                raise CheckpointError(f"{block} has an expert {expert}, and config.json says that there are {count}")
            missing = [name for name in PROJECTIONS if name not in experts.get(expert, {})]
            if missing:
                raise CheckpointError(f"expert {expert} of {block} has no {' and no '.join(missing)}")
            _check_shapes(experts[expert], experts[0])


def _check_shapes(expert: dict[str, Matrix], first: dict[str, Matrix]) -> None:
    gate = first["gate_proj"]
    wanted = {"gate_proj": (gate.out, gate.in_), "up_proj": (gate.out, gate.in_), "down_proj": (gate.in_, gate.out)}
    for name, shape in wanted.items():
        found = expert[name]
        if (found.out, found.in_) != shape:
            raise CheckpointError(
                f"{found.module} is [{found.out}, {found.in_}], and [{shape[0]}, {shape[1]}] fits to {gate.module}"
            )
