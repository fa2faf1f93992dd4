"""The table of layouts that are read."""

from jitmoe.hf.shipped import elementwise, gptq, int4, mxfp4
from jitmoe.hf.shipped.reader import Reader
from jitmoe.quantization_config import TensorLayout

READERS: dict[TensorLayout, Reader] = {
    "fp8": elementwise.READER,
    "compressed": elementwise.READER,
    "compressed_packed": int4.READER,
    "gptq": gptq.READER,
    "mxfp4": mxfp4.READER,
}
