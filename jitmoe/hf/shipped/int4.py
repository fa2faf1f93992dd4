"""Eight codes of 4 bits in a word along the inputs: compressed-tensors' pack-quantized, as of Kimi-K2."""

from jitmoe.errors import CheckpointError
from jitmoe.experts.quantized import SCALE_DTYPES, Quantized
from jitmoe.formats import Packing
from jitmoe.hf.shipped.reader import Reader, Shape, Tensors
from jitmoe.quantization_config import Scheme


def _scale_shapes(packing: Packing, out: int, in_: int) -> tuple[Shape, ...]:
    return (packing.scale_shape(out, in_),)


def _quantized(tensors: Tensors, scheme: Scheme, packing: Packing) -> Quantized:
    values, shape = tensors("values"), tensors("shape").tolist()
    if packing.value_shape(*shape) != tuple(values.shape):
        raise CheckpointError(f"weight_shape is {shape}, and weight_packed has shape {list(values.shape)}")
    return Quantized(values, tensors("scales").to(SCALE_DTYPES[packing.scale]))


READER = Reader(axes=2, extent=lambda shape: (shape[0], 8 * shape[1]), scale_shapes=_scale_shapes, quantized=_quantized)
