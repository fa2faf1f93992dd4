"""Makes quantised base weights of bfloat16 ones, and says what that loses."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from jitmoe.errors import InputError
from jitmoe.experts.quantized import SCALE_DTYPES, Quantized
from jitmoe.formats import Packing, ScaleDtype, WeightFormat, packing_of
from jitmoe.oracle.formats import E2M1, dequantize, scales_of
from jitmoe.text import table

LARGEST_E4M3, LARGEST_INT8, LARGEST_INT4 = 448.0, 127, 7


@dataclass(frozen=True)
class Loss:
    """What matrices lose: sums over W' - W and over W, which add up over matrices.

    Attributes:
        lost: sum of squares of W' - W.
        held: sum of squares of W.
        lost_most: largest magnitude of W' - W.
        held_most: largest magnitude of W.
    """

    lost: float = 0.0
    held: float = 0.0
    lost_most: float = 0.0
    held_most: float = 0.0

    def __add__(self, other: "Loss") -> "Loss":
        return Loss(
            self.lost + other.lost,
            self.held + other.held,
            max(self.lost_most, other.lost_most),
            max(self.held_most, other.held_most),
        )

    @property
    def rms(self) -> float:
        """Root of the mean square of W' - W, over that of W."""
        return math.sqrt(self.lost / self.held) if self.held else 0.0

    @property
    def largest(self) -> float:
        """Largest magnitude of W' - W, over that of W."""
        return self.lost_most / self.held_most if self.held_most else 0.0


@dataclass(frozen=True)
class QuantizationError:
    """What one projection loses: W' - W over all its experts, beside W.

    Attributes:
        rms: root of the mean square of W' - W, over that of W.
        largest: largest magnitude of W' - W, over that of W.
        worst: rms of the expert that loses most, likewise over its own W.
        expert: that expert.
    """

    rms: float
    largest: float
    worst: float
    expert: int


@dataclass(frozen=True)
class QuantizationReport:
    """The errors of each projection by name; prints as a table."""

    weight_format: str
    errors: Mapping[str, QuantizationError]

    def __str__(self) -> str:
        head = (self.weight_format, "rms(W' - W) / rms(W)", "max|W' - W| / max|W|", "worst expert")
        rows = [(n, f"{e.rms:.2e}", f"{e.largest:.2e}", f"{e.expert}: {e.worst:.2e}") for n, e in self.errors.items()]
        return table([head, *rows])


def quantize(
    base: Mapping[str, Tensor],
    weight_format: WeightFormat = "int8_row",
    group_size: int = 32,
    scale_dtype: ScaleDtype | None = None,
) -> tuple[dict[str, Quantized], QuantizationReport]:
    """Quantise base weights, expert by expert: each weight to the nearest code, ties to even.

    The largest magnitude of the weights that share a scale becomes the largest code: 127 of "int8_row", 448 of the fp8
    formats, 7 of "int4_group". In "mxfp4" the scale is the power of two 2^(floor(log2 of it) - 2) (OCP Microscaling
    Formats 1.0), and what is too large becomes the largest code.

    Args:
        base: bfloat16 [E, out, in] by name, such as ``gate_proj``.
        weight_format: as in :class:`~jitmoe.config.MoEConfig`, which also has the other two.
        group_size: inputs that share a scale in "int4_group".
        scale_dtype: of the scales; None is the usual one of the format.

    Returns:
        The sources for the layer under the same names, and what they lose.

    Raises:
        InputError: a weight is not finite (it is named), or the format has no scales.
    """
    packing = packing_of(weight_format, group_size, scale_dtype)
    if not packing.quantized:
        raise InputError(f"{weight_format} is no quantised format: choose another weight_format")
    sources, errors = {}, {}
    for name, weights in base.items():
        found, losses = [], []
        for expert, matrix in enumerate(weights):
            if place := nonfinite(matrix):
                row, column = place
                raise InputError(f"{name}[{expert}, {row}, {column}] is {matrix[place].item()}: it has no code")
            quantized, loss = quantize_matrix(packing, matrix)
            found.append(quantized)
            losses.append(loss)
        sources[name] = Quantized(torch.stack([q.values for q in found]), torch.stack([q.scales for q in found]))
        errors[name] = error_of(losses)
    return sources, QuantizationReport(weight_format, errors)


def quantize_matrix(packing: Packing, matrix: Tensor) -> tuple[Quantized, Loss]:
    """Codes and scales of one matrix [out, in] of finite weights, and what it loses.

    Rows that share no scale may come apart: whole rows, or 128 rows at a time in "fp8_block", give the same codes.

    Args:
        packing: of a quantised format.
        matrix: bfloat16, float16 or float32; each weight becomes the code nearest to it as it is.
    """
    quantized = _encode(packing, matrix.float())
    return quantized, loss_of(packing, quantized, matrix)


def nonfinite(matrix: Tensor) -> tuple[int, int] | None:
    """Row and column of the first weight that is not finite and so has no code."""
    if matrix.isfinite().all():
        return None
    row, column = (~matrix.isfinite()).nonzero()[0].tolist()
    return row, column


def _encode(packing: Packing, matrix: Tensor) -> Quantized:
    """Nearest codes, and scales, of one matrix [out, in], float32; see :func:`quantize`."""
    out, in_ = matrix.shape
    scales = _scales(packing, matrix)
    wide = scales_of(packing, scales, out, in_)
    # Where all weights are zero, so is the scale, and any code would do.
    codes = torch.where(wide == 0, 0.0, matrix / wide)
    return Quantized(ENCODERS[packing.format.name](codes).reshape(packing.value_shape(out, in_)), scales)


def _scales(packing: Packing, matrix: Tensor) -> Tensor:
    out, in_ = matrix.shape
    shape = packing.scale_shape(out, in_)
    columns = shape[1] if len(shape) > 1 else 1
    tall, wide = {"square": (128, 128), "group": (1, packing.group)}.get(packing.format.sharing, (1, in_))
    padded = torch.zeros(shape[0] * tall, columns * wide, device="cpu")
    padded[:out, :in_] = matrix.abs()
    largest = padded.view(shape[0], tall, columns, wide).amax((1, 3)).view(shape)
    if packing.scale == "e8m0":
        exponents = torch.frexp(largest)[1] - 3  # frexp has mantissas from 0.5 on
        return (exponents + 127).clamp(0, 254).to(torch.uint8)
    most = {"int8_row": LARGEST_INT8, "int4_group": LARGEST_INT4}.get(packing.format.name, LARGEST_E4M3)
    return (largest / most).to(SCALE_DTYPES[packing.scale])


def _to_int4(codes: Tensor) -> Tensor:
    nibbles = _filled(codes.round().clamp(-8, LARGEST_INT4).to(torch.int32) + 8, 8, 8)
    return (nibbles << torch.arange(0, 32, 4, device="cpu")).sum(-1, dtype=torch.int32)


def _to_e2m1(codes: Tensor) -> Tensor:
    values = E2M1[:8]
    middles = (values[1:] + values[:-1]) / 2
    up, down = (torch.bucketize(codes.abs(), middles, right=right) for right in (True, False))
    nearest = torch.where(up % 2 == 0, up, down)  # at a middle the two differ, and the even one is taken
    nibbles = _filled(nearest.to(torch.uint8) | (codes.signbit().to(torch.uint8) << 3), 32, 2)
    return nibbles[..., 0] | nibbles[..., 1] << 4


def _filled(nibbles: Tensor, whole: int, side_by_side: int) -> Tensor:
    """Rows with codes of zero up to a multiple of ``whole``, in runs of ``side_by_side``."""
    missing = -nibbles.shape[1] % whole
    zero = 8 if side_by_side == 8 else 0
    return torch.nn.functional.pad(nibbles, (0, missing), value=zero).view(nibbles.shape[0], -1, side_by_side)


ENCODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "fp8_block": lambda codes: codes.clamp(-LARGEST_E4M3, LARGEST_E4M3).to(torch.float8_e4m3fn),
    "fp8_row": lambda codes: codes.clamp(-LARGEST_E4M3, LARGEST_E4M3).to(torch.float8_e4m3fn),
    "int8_row": lambda codes: codes.round().clamp(-LARGEST_INT8, LARGEST_INT8).to(torch.int8),
    "int4_group": _to_int4,
    "mxfp4": _to_e2m1,
}
"""From codes as float32 [out, in] to values as shipped."""


def loss_of(packing: Packing, quantized: Quantized, matrix: Tensor) -> Loss:
    """What one matrix [out, in] loses as ``quantized``."""
    exact = matrix.double()
    error = dequantize(packing, quantized.values, quantized.scales, *matrix.shape).double() - exact
    return Loss(
        error.square().sum().item(), exact.square().sum().item(), error.abs().max().item(), exact.abs().max().item()
    )


def error_of(losses: list[Loss]) -> QuantizationError:
    """What a projection loses whose experts lose ``losses``."""
    whole = sum(losses, Loss())
    expert = max(range(len(losses)), key=lambda expert: losses[expert].rms)
    return QuantizationError(whole.rms, whole.largest, worst=losses[expert].rms, expert=expert)
