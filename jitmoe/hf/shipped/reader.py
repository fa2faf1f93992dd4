"""What a reader of one layout of quantised weights knows and does."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from jitmoe.experts.quantized import Quantized
from jitmoe.formats import Packing
from jitmoe.hf.shipped.names import Role
from jitmoe.quantization_config import Scheme

Shape = tuple[int, ...]
Tensors = Callable[[Role], Tensor]
"""The tensors of one matrix as they are shipped; each call reads one."""


@dataclass(frozen=True)
class Reader:
    """One layout.

    Attributes:
        axes: of the values of one matrix.
        extent: (out, in) from the shape of these values; in may be what fills the last word.
        scale_shapes: that the scales of a matrix (out, in) may have.
        quantized: values and scales as jitmoe takes them. Codes are not changed, scales widened at most.
    """

    axes: int
    extent: Callable[[Shape], tuple[int, int]]
    scale_shapes: Callable[[Packing, int, int], tuple[Shape, ...]]
    quantized: Callable[[Tensors, Scheme, Packing], Quantized]
