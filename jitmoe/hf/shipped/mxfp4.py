"""MXFP4 of gpt-oss: [out, in / 32, 16] bytes, also where the module's own matrices are [in, out]."""

from jitmoe.experts.quantized import Quantized
from jitmoe.formats import Packing
from jitmoe.hf.shipped.reader import Reader, Shape, Tensors
from jitmoe.quantization_config import Scheme


def _scale_shapes(packing: Packing, out: int, in_: int) -> tuple[Shape, ...]:
    return (packing.scale_shape(out, in_),)


def _quantized(tensors: Tensors, scheme: Scheme, packing: Packing) -> Quantized:
    return Quantized(tensors("values"), tensors("scales"))


READER = Reader(
    axes=3, extent=lambda shape: (shape[0], 32 * shape[1]), scale_shapes=_scale_shapes, quantized=_quantized
)
