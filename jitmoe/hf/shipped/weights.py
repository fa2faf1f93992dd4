"""Quantised weights of a checkpoint: found and checked from the headers of its files, read one matrix at a time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jitmoe.errors import CheckpointError, UnsupportedExpertsError
from jitmoe.experts.quantized import Quantized
from jitmoe.formats import FORMATS, SQUARE, Packing, ScaleDtype, packing_of
from jitmoe.hf.checkpoint import Checkpoint
from jitmoe.hf.shipped.names import Role, tensors_of, weights_among
from jitmoe.hf.shipped.reader import Reader, Shape
from jitmoe.hf.shipped.table import READERS
from jitmoe.oracle.formats import dequantize
from jitmoe.quantization_config import ADVICE, Scheme, TensorLayout

PLAIN = ("bfloat16", "float16", "float32")

ROWS = 1024
"""Rows that are expanded at a time, a multiple of the rows that share a scale."""


@dataclass(frozen=True)
class ShippedWeight:
    """A quantised weight of a checkpoint.

    Attributes:
        name: that it has in a bfloat16 checkpoint.
        scheme: what the config says of it.
        packing: what it is for jitmoe.
        tensors: names of the tensors that it consists of.
        stacked: these have a first axis of experts.
        out: outputs of a matrix.
        in_: inputs of a matrix, with those that fill the last word or block.
    """

    name: str
    scheme: Scheme
    packing: Packing
    tensors: Mapping[Role, str]
    stacked: bool
    out: int
    in_: int

    def holds(self, out: int, in_: int) -> bool:
        """Whether a matrix [out, in] has values of this shape."""
        return out == self.out and self.packing.value_shape(out, in_) == self.packing.value_shape(out, self.in_)

    def read(self, checkpoint: Checkpoint, expert: int | None = None) -> Quantized:
        """The matrix, or that of one expert where all are stacked.

        Raises:
            CheckpointError: the contents of the tensors contradict each other.
            UnsupportedExpertsError: they are not as the config says.
        """

        def tensor(role: Role) -> Tensor:
            return checkpoint.raw(self.tensors[role], expert)

        try:
            return READERS[self.scheme.layout].quantized(tensor, self.scheme, self.packing)
        except (CheckpointError, UnsupportedExpertsError) as error:
            raise type(error)(f"{self.name}: {error}") from error

    def expand(self, checkpoint: Checkpoint, in_: int) -> Tensor:
        """W', bfloat16 [out, in], piece by piece."""
        found = self.read(checkpoint)
        expanded = torch.empty(self.out, in_, dtype=torch.bfloat16, device="cpu")
        for first in range(0, self.out, ROWS):
            rows = slice(first, first + ROWS)
            shared = SQUARE if self.packing.format.sharing == "square" else 1
            scales = found.scales[first // shared : (first + ROWS) // shared]
            piece = found.values[rows]
            expanded[rows] = dequantize(self.packing, piece, scales, len(piece), in_)
        return expanded


def find_weights(checkpoint: Checkpoint, schemes: Sequence[Scheme]) -> dict[str, ShippedWeight]:
    """The quantised weights, by name. Headers are read, and no tensor.

    Raises:
        CheckpointError: tensors of a weight are missing, or have another shape or dtype.
        UnsupportedExpertsError: the files hold quantised weights that the config does not describe.
    """
    layouts = weights_among(checkpoint.names(), (scheme.layout for scheme in schemes))
    found = {
        name: _weight(checkpoint, name, layout, schemes)
        for name, layout in layouts.items()
        if tensors_of(layout, name)["values"] in checkpoint
    }
    taken = {tensor for weight in found.values() for tensor in weight.tensors.values()}
    for name in checkpoint.names():
        dtype = checkpoint.dtype(name)
        if name not in taken and name.endswith(("weight", "_proj", "_packed", "_blocks")) and dtype not in PLAIN:
            raise UnsupportedExpertsError(
                f"{name} is {dtype} and has no scales under a name that its quantization_config stands for. {ADVICE}"
            )
    return found


def _weight(checkpoint: Checkpoint, name: str, layout: TensorLayout, schemes: Sequence[Scheme]) -> ShippedWeight:
    tensors = tensors_of(layout, name)
    missing = [tensor for tensor in tensors.values() if tensor not in checkpoint]
    if missing:
        raise CheckpointError(f"{name} is quantised, and the checkpoint lacks {', '.join(missing)}")
    zero_point = f"{name}_zero_point"
    if zero_point in checkpoint:
        raise UnsupportedExpertsError(f"{name} has zero points ({zero_point}): it is asymmetric. {ADVICE}")
    reader, shape = READERS[layout], checkpoint.shape(tensors["values"])
    stacked = len(shape) - reader.axes
    if stacked not in (0, 1):
        raise CheckpointError(f"{tensors['values']} has shape {list(shape)}, expected {reader.axes} axes, or 1 more")
    out, in_ = reader.extent(shape[stacked:])
    for scheme in schemes:
        packing = _packing(checkpoint, tensors, scheme) if scheme.layout == layout else None
        if packing and _fits(checkpoint, tensors, reader, packing, shape[:stacked], out, in_):
            return ShippedWeight(name, scheme, packing, tensors, bool(stacked), out, in_)
    facts = (f"{tensor} {checkpoint.dtype(tensor)} {list(checkpoint.shape(tensor))}" for tensor in tensors.values())
    known = " or ".join(dict.fromkeys(f"{s.weight_format} {s.group or ''}".strip() for s in schemes))
    raise CheckpointError(f"{name} is not {known} as the quantization_config says: it is {', '.join(facts)}")


def _packing(checkpoint: Checkpoint, tensors: Mapping[Role, str], scheme: Scheme) -> Packing | None:
    """With the dtype of the scales in the file; one that the format does not have is widened to float32."""
    scales = FORMATS[scheme.weight_format].scales
    dtype = checkpoint.dtype(tensors["scales"])
    if checkpoint.dtype(tensors["values"]) != scheme.value_dtype:
        return None
    if scales == ("e8m0",):
        return packing_of(scheme.weight_format, 32) if dtype == "uint8" else None
    if dtype not in PLAIN:
        return None
    scale: ScaleDtype = next((known for known in scales if known == dtype), "float32")
    return packing_of(scheme.weight_format, scheme.group or 32, scale)


def _fits(
    checkpoint: Checkpoint,
    tensors: Mapping[Role, str],
    reader: Reader,
    packing: Packing,
    lead: Shape,
    out: int,
    in_: int,
) -> bool:
    expected = [(*lead, *shape) for shape in reader.scale_shapes(packing, out, in_)]
    return checkpoint.shape(tensors["scales"]) in expected
