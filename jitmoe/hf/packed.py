"""The memory behind packed weights of an experts module: read and written expert by expert."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from jitmoe.errors import InputError
from jitmoe.experts.pack import decode_experts, empty_packed, pack_experts, unpack_experts
from jitmoe.experts.quantized import SCALE_DTYPES, ExpertSource, Quantized, check_base
from jitmoe.formats import BFLOAT16, SQUARE, Packing
from jitmoe.hf.layout import PARTS, Layout, WeightName
from jitmoe.process import usable_threads

BATCH_BYTES = 8 << 20
"""Bytes that are packed at a time."""

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
"""Integers of so many bytes, which NumPy has, too."""


@dataclass(eq=False)
class Packed:
    """The memory behind the weights of one name: packed projections, and how often they were written.

    Attributes:
        layout: of the module.
        name: of the parameter.
        tensors: int16 [E, packed elements] of each projection.
        packing: of these.
        writes: counts writes, for those who prepared something from the contents.
    """

    layout: Layout
    name: WeightName
    tensors: dict[str, Tensor]
    packing: Packing = BFLOAT16
    writes: int = field(default=0)

    @classmethod
    def empty(cls, layout: Layout, name: WeightName, packing: Packing = BFLOAT16) -> "Packed":
        """Room for the weights."""
        tensors = {part: empty_packed(layout.experts, *layout.extent(part), packing) for part in PARTS[name]}
        return cls(layout, name, tensors, packing)

    @classmethod
    def of(
        cls,
        layout: Layout,
        name: WeightName,
        parts_of: Callable[[int], Sequence[Tensor | Quantized]],
        packing: Packing = BFLOAT16,
    ) -> "Packed":
        """Packed from the projections of each expert, [out, in], in batches that several threads share.

        Raises:
            InputError: a matrix has another shape; names weight and expert.
            InputTypeError: a matrix is not of the packing's format.
        """
        packed = cls.empty(layout, name, packing)
        kernels, threads = layout.packing_kernels(packing), usable_threads(torch.get_num_threads())
        extents = [layout.extent(part) for part in packed.parts]
        count = max(1, BATCH_BYTES // sum(packing.packed_bytes(*extent) for extent in extents))
        stages = [_stages(packing, min(count, layout.experts), *extent) for extent in extents]
        for first in range(0, layout.experts, count):
            batch = range(first, min(first + count, layout.experts))
            for place, expert in enumerate(batch):
                for stage, extent, matrix in zip(stages, extents, parts_of(expert), strict=True):
                    checked = check_base(f"{name}[{expert}]", matrix, (), *extent, packing)
                    for room, tensor in zip(stage, (given for given in checked if given is not None), strict=True):
                        # NumPy copies on this thread: to wake others costs more, on a busy machine much more.
                        room.numpy()[place] = _bits(tensor).numpy()
            for part, stage, extent in zip(packed.parts, stages, extents, strict=True):
                values, *scales = (room.data_ptr() for room in stage)
                target = packed.tensors[part][first].data_ptr()
                kernels.pack(values, target, len(batch), *extent, threads, *scales)
        return packed

    @property
    def parts(self) -> tuple[str, ...]:
        """The projections."""
        return PARTS[self.name]

    @property
    def nbytes(self) -> int:
        """Bytes of the memory."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def read(self, experts: Sequence[int], parts: tuple[str, ...]) -> Tensor:
        """Matrices of these experts, bfloat16 [number, ...] in the module's layout, bit for bit what products read."""
        kernels = self.layout.packing_kernels(self.packing)
        read = []
        for part in parts:
            extent = self.layout.extent(part)
            if self.packing.quantized:
                matrices = decode_experts(kernels, self.tensors[part], *extent, experts)
            else:
                matrices = _tensor(unpack_experts(kernels, self.tensors[part], *extent, experts))
            read.append(matrices)
        return self.layout.join(read)

    def quantized(self, experts: Sequence[int], parts: tuple[str, ...]) -> dict[str, Quantized]:
        """Values and scales [number, ...] of these experts as they were packed, bit for bit, by projection.

        Raises:
            InputError: they are bfloat16.
        """
        kernels, found = self.layout.packing_kernels(self.packing), {}
        for part in parts:
            unpacked = unpack_experts(kernels, self.tensors[part], *self.layout.extent(part), experts, self.packing)
            if not isinstance(unpacked, Quantized):
                raise InputError(f"{self.name} is packed in bfloat16 and has no scales")
            found[part] = unpacked
        return found

    def write(self, expert: int, parts: Sequence[Tensor | Quantized]) -> None:
        """Pack the projections of one expert, [out, in]."""
        kernels = self.layout.packing_kernels(self.packing)
        for part, rows in zip(self.parts, parts, strict=True):
            place = self.tensors[part][expert : expert + 1]
            source: ExpertSource = [rows]  # type: ignore[assignment]
            pack_experts(kernels, f"{self.name}[{expert}]", source, place, *self.layout.extent(part), self.packing)
            if not self.tensors[part].is_inference():  # inside of an operator a view counts its writes for itself
                increment_version(self.tensors[part])
        self._count_write()

    def take(self, other: "Packed") -> bool:
        """Copy the memory of weights that are packed alike, bit for bit; whether they are."""
        if (other.layout, other.name, other.packing) != (self.layout, self.name, self.packing):
            return False
        for part in self.parts:
            self.tensors[part].copy_(other.tensors[part])
        self._count_write()
        return True

    def _count_write(self) -> None:
        self.writes += 1


def packing_words(packing: Packing) -> str:
    """In words: "fp8_block, 128x128"."""
    words = {
        "square": f"{SQUARE}x{SQUARE}",
        "row": f"a {packing.scale} scale a row",
        "group": f"groups of {packing.group}" + ("" if packing.scale == "e8m0" else f", {packing.scale} scales"),
    }
    shared = words.get(packing.format.sharing)
    return f"{packing.format.name}, {shared}" if shared else packing.format.name


def _stages(packing: Packing, count: int, out: int, in_: int) -> list[Tensor]:
    """Room for matrices as they are shipped, as integers: their values, and scales if there are any."""
    values = getattr(torch, packing.format.value_dtype)
    rooms = [torch.empty(count, *packing.value_shape(out, in_), dtype=values, device="cpu")]
    if packing.quantized:
        scales = SCALE_DTYPES[packing.scale]
        rooms.append(torch.empty(count, *packing.scale_shape(out, in_), dtype=scales, device="cpu"))
    return [_bits(room) for room in rooms]


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().view(BITS[tensor.element_size()])


def _tensor(found: Tensor | Quantized) -> Tensor:
    assert isinstance(found, Tensor)
    return found
