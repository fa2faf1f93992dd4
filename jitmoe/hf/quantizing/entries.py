"""A tensor of a safetensors file before there is the file: its name, dtype and shape, and so its bytes."""

import math
from dataclasses import dataclass

from jitmoe.errors import CheckpointError

ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("BF16", "F16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
}
"""Bytes of an item by dtype, as safetensors calls them."""


@dataclass(frozen=True)
class Entry:
    """A tensor of a file.

    Attributes:
        name: of the tensor.
        dtype: as safetensors calls it.
        shape: of the tensor.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def item_bytes(self) -> int:
        """Bytes of one item.

        Raises:
            CheckpointError: a dtype that is not known.
        """
        if self.dtype not in ITEM_BYTES:
            raise CheckpointError(
                f"{self.name} is {self.dtype}, which is no dtype of a checkpoint that is not quantised"
            )
        return ITEM_BYTES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.item_bytes
