"""Quantised base weights for tests: random codes and scales of every format, and the same layer in bfloat16."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from helpers import config_of, set_lora
from torch import Tensor
from yardstick import Case, Inputs

from jitmoe import MoELayer, Quantized
from jitmoe.formats import Packing, ScaleDtype, WeightFormat, packing_of
from jitmoe.oracle.formats import dequantize

BASES = ("gate_proj", "up_proj", "down_proj")

PACKINGS: dict[str, tuple[WeightFormat, int, ScaleDtype]] = {
    "fp8_block": ("fp8_block", 32, "float32"),
    "fp8_row": ("fp8_row", 32, "float32"),
    "fp8_row-bfloat16": ("fp8_row", 32, "bfloat16"),
    "int8_row": ("int8_row", 32, "float32"),
    "int4_group32": ("int4_group", 32, "bfloat16"),
    "int4_group64-float16": ("int4_group", 64, "float16"),
    "int4_group128-float32": ("int4_group", 128, "float32"),
    "mxfp4": ("mxfp4", 32, "e8m0"),
}
"""Every format with every dtype of scales and every group, by a readable name."""


def packing_named(name: str) -> Packing:
    return packing_of(*PACKINGS[name])


def random_quantized(packing: Packing, lead: tuple[int, ...], out: int, in_: int, seed: int, std: float) -> Quantized:
    """Codes of every kind but NaN, and scales that make weights of about ``std``. Filled words are random, too."""
    generator = torch.Generator().manual_seed(seed)
    form = packing.format
    value_bytes = {"int32": 4}.get(form.value_dtype, 1)
    shape = packing.value_shape(out, in_)
    codes = torch.randint(0, 256, (*lead, *shape[:-1], shape[-1] * value_bytes), dtype=torch.uint8, generator=generator)
    if form.value_dtype == "float8_e4m3fn":
        codes[(codes & 0x7F) == 0x7F] = 0x30
    values = codes.view(getattr(torch, form.value_dtype))
    largest = {"fp8_block": 100.0, "fp8_row": 100.0, "int8_row": 74.0, "int4_group": 4.6, "mxfp4": 2.9}[form.name]
    draws = torch.rand(*lead, *packing.scale_shape(out, in_), generator=generator)
    scales = (0.25 + draws) * (std / largest)
    if packing.scale == "e8m0":
        return Quantized(values, (scales.log2().round() + 127).to(torch.uint8))
    return Quantized(values, scales.to(getattr(torch, packing.scale)))


def quantized_base(case: Case, packing: Packing) -> dict[str, Quantized]:
    extents = ((case.intermediate, case.hidden), (case.intermediate, case.hidden), (case.hidden, case.intermediate))
    return {
        name: random_quantized(packing, (case.experts,), out, in_, seed, in_**-0.5)
        for seed, (name, (out, in_)) in enumerate(zip(BASES, extents, strict=True))
    }


def decoded(base: dict[str, Quantized], packing: Packing, case: Case) -> dict[str, Tensor]:
    """W' of ``base``."""
    extents = ((case.intermediate, case.hidden), (case.intermediate, case.hidden), (case.hidden, case.intermediate))
    return {
        name: dequantize(packing, matrix.values, matrix.scales, out, in_)
        for (name, matrix), (out, in_) in zip(base.items(), extents, strict=True)
    }


@dataclass(frozen=True)
class Pair:
    """A layer on quantised weights, and one on W'."""

    quantized: MoELayer
    plain: MoELayer

    def __iter__(self) -> Iterator[MoELayer]:
        return iter((self.quantized, self.plain))


def options_of(name: str) -> dict[str, object]:
    """Of the config, for the packing called ``name``."""
    weight_format, group, scale = PACKINGS[name]
    return {"weight_format": weight_format, "group_size": group, "scale_dtype": scale}


def pair_of(inputs: Inputs, name: str, isa: str, **options: object) -> Pair:
    case, packing = inputs.case, packing_named(name)
    base = quantized_base(case, packing)
    rest = {key: value for key, value in inputs.base().items() if key not in BASES}
    one = MoELayer(config_of(case, isa, **options_of(name), **options), **base, **rest)
    other = MoELayer(config_of(case, isa, **options), **decoded(base, packing, case), **rest)
    for layer in (one, other):
        assert layer.isa == isa
        set_lora(layer, inputs)
    return Pair(one, other)
