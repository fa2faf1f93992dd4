"""The two things that are done to a tensor of a checkpoint: it is copied, or quantised. Both go part by part."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from jitmoe.errors import CheckpointError
from jitmoe.experts.quantize import Loss, nonfinite, quantize_matrix
from jitmoe.formats import SQUARE, Packing
from jitmoe.hf.quantizing.entries import Entry
from jitmoe.hf.quantizing.experts import Matrix
from jitmoe.hf.quantizing.names import Layout, scale_shape
from jitmoe.hf.quantizing.source import Source

COPIED_BYTES = 1 << 24
"""Bytes that are copied at a time."""

WEIGHTS_AT_ONCE = 1 << 20
"""Weights that are quantised at a time, in whole rows. Each takes some 80 bytes meanwhile; more are no faster."""

DTYPES = {"float8_e4m3fn": "F8_E4M3", "int8": "I8", "int32": "I32", "float32": "F32", "bfloat16": "BF16"}
"""What safetensors calls dtypes of torch."""

Append = Callable[[str, Tensor], None]
"""Takes the name of a tensor and the next part of it."""


@dataclass(frozen=True)
class Copy:
    """A tensor that stays as it is, perhaps under another name."""

    source: str
    entry: Entry

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The tensor."""
        return (self.entry,)

    def run(self, source: Source, append: Append) -> None:
        """Hand on the tensor."""
        size = self.entry.nbytes
        for start in range(0, size, COPIED_BYTES):
            append(self.entry.name, source.read(self.source, start, min(start + COPIED_BYTES, size)))


@dataclass(frozen=True)
class Quantize:
    """A matrix of an expert that becomes values and scales."""

    matrix: Matrix
    packing: Packing
    layout: Layout

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Values, scales, and the shape where the layout has one."""
        matrix, packing = self.matrix, self.packing
        out, in_ = matrix.out, matrix.in_
        values = self._name(self.layout.values), DTYPES[packing.format.value_dtype], packing.value_shape(out, in_)
        scales = self._name(self.layout.scales), DTYPES[packing.scale], scale_shape(packing, out, in_)
        shape = [Entry(self._name(self.layout.shape), "I64", (2,))] if self.layout.shape else []
        return Entry(*values), Entry(*scales), *shape

    def run(self, source: Source, append: Append) -> Loss:
        """Quantise the matrix, hand on what becomes of it, and return what it loses.

        Raises:
            CheckpointError: a weight is not finite.
        """
        matrix, loss = self.matrix, Loss()
        for start, stop in self._bands():
            band = matrix.rows(source, start, stop)
            self._check(band, start)
            quantized, lost = quantize_matrix(self.packing, band)
            append(self._name(self.layout.values), quantized.values)
            append(self._name(self.layout.scales), quantized.scales)
            loss += lost
        if self.layout.shape:
            append(self._name(self.layout.shape), torch.tensor([matrix.out, matrix.in_], device="cpu"))
        return loss

    def _bands(self) -> Iterator[tuple[int, int]]:
        """Rows that are quantised at a time; none of them share a scale with rows of another band."""
        rows = max(SQUARE, WEIGHTS_AT_ONCE // self.matrix.in_ // SQUARE * SQUARE)
        for start in range(0, self.matrix.out, rows):
            yield start, min(start + rows, self.matrix.out)

    def _check(self, band: Tensor, start: int) -> None:
        if place := nonfinite(band):
            row, column = place
            index = ", ".join(map(str, (*self.matrix.lead, self.matrix.first + start + row, column)))
            raise CheckpointError(f"{self.matrix.tensor}[{index}] is {band[place].item()}: it has no code")

    def _name(self, part: str | None) -> str:
        return f"{self.matrix.module}.{part}"


Job = Copy | Quantize
"""Makes some tensors, all of which lie in one file."""
