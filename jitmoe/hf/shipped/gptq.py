"""GPTQ: eight codes of 4 bits in a word along the inputs as in compressed-tensors, words and scales transposed."""

import torch
from torch import Tensor

from jitmoe.errors import UnsupportedExpertsError
from jitmoe.experts.quantized import SCALE_DTYPES, Quantized
from jitmoe.formats import Packing
from jitmoe.hf.shipped.reader import Reader, Shape, Tensors
from jitmoe.quantization_config import ADVICE, Scheme


def _scale_shapes(packing: Packing, out: int, in_: int) -> tuple[Shape, ...]:
    _, groups = packing.scale_shape(out, in_)
    return ((groups, out),)


def _quantized(tensors: Tensors, scheme: Scheme, packing: Packing) -> Quantized:
    words, scales = tensors("values"), tensors("scales")
    _check_zeros(tensors("zeros"), words.shape[1], scheme.stored_zero)
    _check_groups(tensors("groups"), 8 * len(words), scheme.group)
    return Quantized(words.mT.contiguous(), scales.mT.contiguous().to(SCALE_DTYPES[packing.scale]))


def _check_zeros(words: Tensor, out: int, stored: int) -> None:
    """Where a nibble of 8 is zero, files of GPTQ's first version hold 7."""
    nibbles = (words[..., None] >> torch.arange(0, 32, 4, device="cpu")) & 0xF
    if (nibbles.flatten(-2)[:, :out] != stored).any():
        raise UnsupportedExpertsError(
            f"qzeros of GPTQ are not all {stored}: the weights are asymmetric, or of another checkpoint_format than "
            f"the config says. {ADVICE}"
        )


def _check_groups(groups: Tensor, in_: int, group: int) -> None:
    if groups.numel() and not torch.equal(groups.long(), torch.arange(in_, device="cpu") // group):
        raise UnsupportedExpertsError(
            f"g_idx of GPTQ is not in order (act-order), although the config says desc_act: false. {ADVICE}"
        )


READER = Reader(axes=2, extent=lambda shape: (shape[1], 8 * shape[0]), scale_shapes=_scale_shapes, quantized=_quantized)
