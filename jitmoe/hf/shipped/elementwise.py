"""A code for each weight, in the weight's own place: fp8 of DeepSeek and Qwen, fp8 and int8 of compressed-tensors."""

from jitmoe.experts.quantized import SCALE_DTYPES, Quantized
from jitmoe.formats import Packing
from jitmoe.hf.shipped.reader import Reader, Shape, Tensors
from jitmoe.quantization_config import Scheme


def _scale_shapes(packing: Packing, out: int, in_: int) -> tuple[Shape, ...]:
    if packing.format.sharing == "row":
        return (out, 1), (out,)
    return (packing.scale_shape(out, in_),)


def _quantized(tensors: Tensors, scheme: Scheme, packing: Packing) -> Quantized:
    values = tensors("values")
    scales = tensors("scales").to(SCALE_DTYPES[packing.scale])
    return Quantized(values, scales.reshape(packing.scale_shape(*values.shape)))


READER = Reader(axes=2, extent=lambda shape: (shape[0], shape[1]), scale_shapes=_scale_shapes, quantized=_quantized)
