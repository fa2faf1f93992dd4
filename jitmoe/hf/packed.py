"""The memory behind packed weights of an experts module: read and written expert by expert."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from jitmoe.experts.pack import empty_packed, pack_experts, unpack_experts
from jitmoe.hf.layout import PARTS, Layout, WeightName


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
    def of(cls, layout: Layout, name: WeightName, matrix_of: Callable[[int], Tensor]) -> "Packed":
        """Packed from the matrix of each expert, bfloat16 in the module's own layout."""
        packed = cls.empty(layout, name)
        for expert in range(layout.experts):
            packed.write(expert, matrix_of(expert))
        return packed

    @property
    def parts(self) -> tuple[str, ...]:
        """The projections."""
        return PARTS[self.name]

    def read(self, experts: Sequence[int], parts: tuple[str, ...]) -> Tensor:
        """Matrices of these experts, bfloat16 [number, ...] in the module's layout, bit for bit what was packed."""
        kernels = self.layout.packing_kernels()
        read = [unpack_experts(kernels, self.tensors[p], *self.layout.extent(p), experts) for p in parts]
        return self.layout.join(read)

    def write(self, expert: int, matrix: Tensor) -> None:
        """Pack the matrix of one expert, in the module's layout."""
        kernels = self.layout.packing_kernels()
        for part, rows in zip(self.parts, self.layout.split(matrix, self.parts), strict=True):
            place = self.tensors[part][expert : expert + 1]
            pack_experts(kernels, f"{self.name}[{expert}]", [rows], place, *self.layout.extent(part))
        self.writes += 1
