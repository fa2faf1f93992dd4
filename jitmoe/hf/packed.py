"""The memory behind packed weights of an experts module: read and written expert by expert."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from jitmoe.experts.pack import empty_packed, pack_experts, unpack_experts
from jitmoe.experts.quantized import check_base
from jitmoe.formats import BFLOAT16
from jitmoe.hf.layout import PARTS, Layout, WeightName
from jitmoe.process import usable_threads

BATCH_BYTES = 8 << 20
"""Bytes that are packed at a time."""


@dataclass(eq=False)
class Packed:
    """The memory behind the weights of one name: packed projections, and how often they were written.

    Attributes:
        layout: of the module.
        name: of the parameter.
        tensors: int16 [E, packed elements] of each projection.
        writes: counts writes, for those who prepared something from the contents.
    """

    layout: Layout
    name: WeightName
    tensors: dict[str, Tensor]
    writes: int = field(default=0)

    @classmethod
    def empty(cls, layout: Layout, name: WeightName) -> "Packed":
        """Room for the weights."""
        parts = PARTS[name]
        return cls(layout, name, {part: empty_packed(layout.experts, *layout.extent(part)) for part in parts})

    @classmethod
    def of(cls, layout: Layout, name: WeightName, parts_of: Callable[[int], Sequence[Tensor]]) -> "Packed":
        """Packed from the projections of each expert, bfloat16 [out, in], in batches that several threads share.

        Raises:
            InputError: a matrix has another shape; names weight and expert.
            InputTypeError: a matrix is not bfloat16.
        """
        packed = cls.empty(layout, name)
        kernels, threads = layout.packing_kernels(), usable_threads(torch.get_num_threads())
        extents = [layout.extent(part) for part in packed.parts]
        count = max(1, BATCH_BYTES // sum(2 * out * in_ for out, in_ in extents))
        stages = [torch.empty(min(count, layout.experts), *extent, dtype=torch.int16) for extent in extents]
        for first in range(0, layout.experts, count):
            batch = range(first, min(first + count, layout.experts))
            for place, expert in enumerate(batch):
                for stage, extent, matrix in zip(stages, extents, parts_of(expert), strict=True):
                    check_base(f"{name}[{expert}]", matrix, (), *extent, BFLOAT16)
                    # NumPy copies on this thread: to wake others costs more, on a busy machine much more.
                    stage.numpy()[place] = matrix.detach().view(torch.int16).numpy()
            for part, stage, extent in zip(packed.parts, stages, extents, strict=True):
                target = packed.tensors[part][first]
                kernels.pack(stage.data_ptr(), target.data_ptr(), len(batch), *extent, threads)
        return packed

    @property
    def parts(self) -> tuple[str, ...]:
        """The projections."""
        return PARTS[self.name]

    def read(self, experts: Sequence[int], parts: tuple[str, ...]) -> Tensor:
        """Matrices of these experts, bfloat16 [number, ...] in the module's layout, bit for bit what was packed."""
        kernels = self.layout.packing_kernels()
        read = []
        for part in parts:
            matrices = unpack_experts(kernels, self.tensors[part], *self.layout.extent(part), experts)
            assert isinstance(matrices, Tensor)
            read.append(matrices)
        return self.layout.join(read)

    def write(self, expert: int, matrix: Tensor) -> None:
        """Pack the matrix of one expert, in the module's layout."""
        kernels = self.layout.packing_kernels()
        for part, rows in zip(self.parts, self.layout.split(matrix, self.parts), strict=True):
            place = self.tensors[part][expert : expert + 1]
            pack_experts(kernels, f"{self.name}[{expert}]", [rows], place, *self.layout.extent(part))
            if not self.tensors[part].is_inference():  # inside of an operator a view counts its writes for itself
                increment_version(self.tensors[part])
        self.writes += 1
