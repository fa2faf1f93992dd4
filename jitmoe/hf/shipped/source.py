"""A checkpoint under the names of a bfloat16 one, whatever its weights are."""

from collections.abc import Callable, Sequence

from torch import Tensor

from jitmoe.errors import CheckpointError
from jitmoe.experts.quantized import Quantized
from jitmoe.formats import BFLOAT16, Packing
from jitmoe.hf.checkpoint import Checkpoint
from jitmoe.hf.shipped.weights import find_weights
from jitmoe.quantization_config import Scheme

Matrix = Tensor | Quantized
"""bfloat16 [out, in] in the module's layout, or quantised [out, in] as shipped."""


class Source:
    """Weights of a checkpoint by name, quantised ones as they are.

    Args:
        checkpoint: its files.
        schemes: the kinds of quantised weights that it may have.

    Raises:
        CheckpointError: tensors of a weight are missing, or have another shape or dtype.
        UnsupportedExpertsError: weights that are quantised in a way that ``schemes`` does not describe.
    """

    def __init__(self, checkpoint: Checkpoint, schemes: Sequence[Scheme] = ()) -> None:
        self.checkpoint = checkpoint
        self.quantized = find_weights(checkpoint, schemes) if schemes else {}
        self._weight_of = {tensor: name for name, found in self.quantized.items() for tensor in found.tensors.values()}

    def __contains__(self, name: str) -> bool:
        return name in self.quantized or name in self.checkpoint

    def weight_of(self, tensor: str) -> str:
        """The weight that a tensor of the checkpoint belongs to, by name; itself where it is not quantised."""
        return self._weight_of.get(tensor, tensor)

    def weights(self) -> list[str]:
        """Of all tensors."""
        return list(dict.fromkeys(map(self.weight_of, self.checkpoint.names())))

    def packing(self, name: str) -> Packing:
        """Of one weight."""
        found = self.quantized.get(name)
        return found.packing if found is not None else BFLOAT16

    def read(self, name: str) -> Matrix:
        """A whole matrix."""
        found = self.quantized.get(name)
        if found is None:
            return self.checkpoint.read(name)
        if found.stacked:
            raise CheckpointError(f"{name} is stacked, expected the matrix of one expert")
        return found.read(self.checkpoint)

    def matrices(self, name: str) -> Callable[[int], Matrix]:
        """A function from an expert's number to its part of a stacked weight [E, ...]."""
        found = self.quantized.get(name)
        if found is None:
            return self.checkpoint.matrices(name)
        return lambda expert: found.read(self.checkpoint, expert)

    def expand(self, name: str, shape: Sequence[int]) -> Tensor:
        """W' of a quantised matrix, bfloat16 [out, in].

        Raises:
            CheckpointError: the matrix has another shape.
        """
        found = self.quantized[name]
        if found.stacked or len(shape) != 2 or not found.holds(*shape):
            raise CheckpointError(f"{name} is quantised and has not the shape {list(shape)} that the model has")
        return found.expand(self.checkpoint, shape[1])
