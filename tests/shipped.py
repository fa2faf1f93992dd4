"""Tiny quantised checkpoints in the layouts of public ones, written from the descriptions of these, in NumPy alone.

Nothing here comes from jitmoe: an encoder and a reader with the same mistake would agree.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import EXPERTS, eager_model
from safetensors.torch import load_file, save_file
from torch import Tensor

Array = np.ndarray[Any, Any]
Encoded = tuple[dict[str, Tensor], Array]
"""Tensors by what follows the name of the weight, and W' as float32 [out, in]."""


def bfloat16(values: Array) -> Array:
    """Rounded to nearest even, as float32; finite values."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def e4m3_values() -> Array:
    """What the bytes 0 to 255 stand for in OCP's E4M3."""
    byte = np.arange(256)
    exponent, mantissa = byte >> 3 & 15, byte & 7
    size = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    size[byte & 127 == 127] = np.nan
    return np.where(byte < 128, size, -size)


E4M3 = e4m3_values()
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def nearest(values: Array, table: Array) -> Array:
    """The number of the entry of ``table`` that is nearest to each value."""
    order = np.argsort(table)[: np.isfinite(table).sum()]
    middles = (table[order][1:] + table[order][:-1]) / 2
    return order[np.searchsorted(middles, values)].astype(np.uint8)


def e4m3(weight: Array, scales: Array) -> tuple[Tensor, Array]:
    """Bytes, and W'."""
    codes = nearest(weight / scales, E4M3)
    return torch.from_numpy(codes).view(torch.float8_e4m3fn), bfloat16((E4M3[codes] * scales).astype(np.float32))


def spread(scales: Array, tall: int, wide: int, shape: tuple[int, ...]) -> Array:
    """Each scale over ``tall`` rows and ``wide`` columns."""
    return np.kron(scales, np.ones((tall, wide)))[: shape[0], : shape[1]].astype(np.float32)


def largest(weight: Array, tall: int, wide: int) -> Array:
    """Of the weights that share a scale."""
    rows, columns = -(-weight.shape[0] // tall), -(-weight.shape[1] // wide)
    blocks = [
        [weight[i * tall : (i + 1) * tall, j * wide : (j + 1) * wide] for j in range(columns)] for i in range(rows)
    ]
    return np.array([[np.abs(block).max() for block in row] for row in blocks], np.float32)


def fp8_block(weight: Array) -> Encoded:
    scales = largest(weight, 128, 128) / np.float32(448)
    values, decoded = e4m3(weight, spread(scales, 128, 128, weight.shape))
    return {".weight": values, ".weight_scale_inv": torch.from_numpy(scales)}, decoded


def fp8_row(weight: Array) -> Encoded:
    scales = bfloat16(largest(weight, 1, weight.shape[1]) / np.float32(448))
    values, decoded = e4m3(weight, spread(scales, 1, weight.shape[1], weight.shape))
    return {".weight": values, ".weight_scale": torch.from_numpy(scales).bfloat16()}, decoded


def int8_row(weight: Array) -> Encoded:
    scales = largest(weight, 1, weight.shape[1]) / np.float32(127)
    codes = np.rint(weight / scales).astype(np.int8)
    tensors = {".weight": torch.from_numpy(codes), ".weight_scale": torch.from_numpy(scales)}
    return tensors, bfloat16((codes * scales).astype(np.float32))


def int4(weight: Array, group: int, rounded: Callable[[Array], Array]) -> tuple[Array, Array, Array]:
    """Codes from 0 to 15 where 8 is zero, scales and W'."""
    scales = rounded(largest(weight, 1, group) / np.float32(7))
    wide = spread(scales, 1, group, weight.shape)
    codes = np.clip(np.rint(weight / wide), -8, 7).astype(np.int64)
    return codes + 8, scales, bfloat16((codes * wide).astype(np.float32))


def words(codes: Array) -> Array:
    """Eight codes along the last axis in an int32, the first in the lowest bits."""
    filled = np.pad(codes, ((0, 0), (0, -codes.shape[1] % 8)))
    eights = filled.reshape(len(codes), -1, 8)
    return sum(eights[:, :, place] << 4 * place for place in range(8)).astype(np.uint32).view(np.int32)


def int4_packed(group: int) -> Callable[[Array], Encoded]:
    def encode(weight: Array) -> Encoded:
        codes, scales, decoded = int4(weight, group, bfloat16)
        return {
            ".weight_packed": torch.from_numpy(words(codes)),
            ".weight_scale": torch.from_numpy(scales).bfloat16(),
            ".weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
        }, decoded

    return encode


def gptq(group: int, stored_zero: int) -> Callable[[Array], Encoded]:
    """Words [in / 8, out]; ``stored_zero`` is 7 in files of the first version, which hold the zero point minus one."""

    def encode(weight: Array) -> Encoded:
        codes, scales, decoded = int4(weight, group, lambda s: s.astype(np.float16).astype(np.float32))
        zeros = np.full((scales.shape[1], -(-len(weight) // 8) * 8), stored_zero)
        return {
            ".qweight": torch.from_numpy(np.ascontiguousarray(words(codes).T)),
            ".scales": torch.from_numpy(np.ascontiguousarray(scales.T)).half(),
            ".qzeros": torch.from_numpy(words(zeros)),
            ".g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // group,
        }, decoded

    return encode


def mxfp4(weight: Array) -> Encoded:
    """Of gpt-oss: blocks of 32 inputs, the even one in the low half of a byte."""
    exponents = np.floor(np.log2(largest(weight, 1, 32))) - 2
    wide = spread(2.0**exponents, 1, 32, weight.shape)
    codes = nearest(weight / wide, E2M1)
    blocks = codes.reshape(len(weight), -1, 32)
    bytes_ = blocks[..., 0::2] | blocks[..., 1::2] << 4
    scales = torch.from_numpy((exponents + 127).astype(np.uint8))
    return {"_blocks": torch.from_numpy(bytes_), "_scales": scales}, bfloat16((E2M1[codes] * wide).astype(np.float32))


def compressed(form: str, weights: dict[str, Any]) -> dict[str, Any]:
    """A quantization_config of compressed-tensors."""
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"symmetric": True, "dynamic": False, "actorder": None, "group_size": None, **weights},
                "input_activations": None,
                "output_activations": None,
            }
        },
    }


FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head"],
}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False, "true_sequential": True}
GPTQ_SAID = "int4_group, groups of 32, float16"
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"]}


@dataclass(frozen=True)
class Layout:
    """A layout of quantised weights, in a model that ships in it.

    Attributes:
        config: the quantization_config.
        encode: a weight float32 [out, in] of an expert.
        weight_format: of the experts in jitmoe.
        said: by the report.
        family: of the model.
        sizes: H and I, unequal and then equal.
        others: likewise of attention and shared experts; None leaves them in bfloat16.
    """

    config: dict[str, Any]
    encode: Callable[[Array], Encoded]
    weight_format: str
    said: str
    family: str = "qwen3_moe"
    sizes: tuple[tuple[int, int], ...] = ((46, 27), (46, 46))
    others: Callable[[Array], Encoded] | None = None

    def encoder(self, name: str) -> Callable[[Array], Encoded] | None:
        """For the weight of this name; None of one that stays bfloat16, as routers, heads and norms do."""
        if not (name.endswith(("_proj.weight", "experts.gate_up_proj", "experts.down_proj")) or ".experts." in name):
            return None
        return None if name.endswith("_bias") else self.encode if ".experts." in name else self.others


INT4_32 = compressed("pack-quantized", {"type": "int", "num_bits": 4, "strategy": "group", "group_size": 32})
INT4_64 = compressed("pack-quantized", {"type": "int", "num_bits": 4, "strategy": "group", "group_size": 64})
FLOAT8 = compressed("float-quantized", {"type": "float", "num_bits": 8, "strategy": "channel"})
INT8 = compressed("int-quantized", {"type": "int", "num_bits": 8, "strategy": "channel"})

MIXED = {
    **INT4_32,
    "format": "mixed-precision",
    "config_groups": {
        "experts": {**INT4_32["config_groups"]["group_0"], "format": "pack-quantized", "targets": ["re:.*experts.*"]},
        "others": {**FLOAT8["config_groups"]["group_0"], "format": "float-quantized"},
    },
}

LAYOUTS = {
    "fp8-qwen3": Layout(
        FP8, fp8_block, "fp8_block", "fp8_block, 128x128", sizes=((136, 130), (130, 130)), others=fp8_block
    ),
    "fp8-deepseek": Layout(
        FP8, fp8_block, "fp8_block", "fp8_block, 128x128", "deepseek_v3", ((136, 130),), others=fp8_block
    ),
    "int4-kimi": Layout(INT4_32, int4_packed(32), "int4_group", "int4_group, groups of 32, bfloat16", "deepseek_v3"),
    "int4-and-fp8": Layout(MIXED, int4_packed(32), "int4_group", "int4_group, groups of 32, bfloat16", others=fp8_row),
    "int4-64": Layout(INT4_64, int4_packed(64), "int4_group", "int4_group, groups of 64", sizes=((136, 130),)),
    "fp8-channel": Layout(FLOAT8, fp8_row, "fp8_row", "fp8_row, a bfloat16 scale a row", "glm4_moe", others=fp8_row),
    "int8-channel": Layout(INT8, int8_row, "int8_row", "int8_row, a float32 scale a row", others=int8_row),
    "gptq": Layout(GPTQ, gptq(32, 7), "int4_group", GPTQ_SAID, "mixtral", ((40, 24), (40, 40)), others=gptq(32, 7)),
    "gptq-v2": Layout(
        {**GPTQ, "checkpoint_format": "gptq_v2"}, gptq(32, 8), "int4_group", GPTQ_SAID, sizes=((40, 24),)
    ),
    "mxfp4": Layout(MXFP4, mxfp4, "mxfp4", "mxfp4, groups of 32", "gpt_oss", ((64, 32), (64, 64))),
}


@dataclass
class Written:
    """Folders of one model.

    Attributes:
        quantised: the checkpoint.
        plain: the same in bfloat16, with W'.
        tensors: of the quantised one, by name.
        decoded: W' of each weight that is quantised, by its name.
    """

    quantised: Path
    plain: Path
    tensors: dict[str, Tensor] = field(default_factory=dict)
    decoded: dict[str, Tensor] = field(default_factory=dict)


def write(layout: Layout, folder: Path, sizes: tuple[int, int] = (0, 0), **fields: Any) -> Written:
    """Both checkpoints of a model of the layout's family, in ``folder``."""
    hidden, intermediate = sizes if sizes[0] else layout.sizes[0]
    name = "intermediate_size" if layout.family in ("mixtral", "gpt_oss") else "moe_intermediate_size"
    eager_model(layout.family, hidden_size=hidden, **{name: intermediate, **fields}).save_pretrained(folder / "plain")
    return quantise(layout, Written(folder / "quantised", folder / "plain"))


def quantise(layout: Layout, found: Written) -> Written:
    """Write the quantised checkpoint to its folder, from the plain one, which gets W'."""
    shutil.copytree(found.plain, found.quantised)
    plain = load_file(found.plain / "model.safetensors")
    for weight, tensor in plain.items():
        encode = layout.encoder(weight)
        if encode is None:
            found.tensors[weight] = tensor
            continue
        tensors, decoded = encode_any(encode, tensor.float().numpy())
        found.tensors |= {weight.removesuffix(".weight") + suffix: values for suffix, values in tensors.items()}
        found.decoded[weight] = torch.from_numpy(decoded).bfloat16()
    save_file(plain | found.decoded, found.plain / "model.safetensors", metadata={"format": "pt"})
    save(found, layout.config)
    return found


def save(found: Written, config: dict[str, Any]) -> None:
    """The quantised checkpoint, anew."""
    save_file(found.tensors, found.quantised / "model.safetensors", metadata={"format": "pt"})
    path = found.quantised / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": config}))


def encode_any(encode: Callable[[Array], Encoded], weight: Array) -> Encoded:
    """A matrix, or one for each expert as gpt-oss stacks them: [E, in, out] in bfloat16, [E, out, in] quantised."""
    if weight.ndim == 2:
        return encode(weight)
    each = [encode(np.ascontiguousarray(matrix.T)) for matrix in weight]
    tensors = {suffix: torch.stack([tensors[suffix] for tensors, _ in each]) for suffix in each[0][0]}
    return tensors, np.ascontiguousarray(np.stack([decoded.T for _, decoded in each]))


def cells(*slow: str) -> Iterator[Any]:
    """Every layout in each of its sizes, as parameters; those of equal sizes, and of ``slow`` layouts, are slow."""
    for name, layout in LAYOUTS.items():
        for hidden, intermediate in layout.sizes:
            marks = [pytest.mark.slow] if hidden == intermediate or name in slow else []
            yield pytest.param(layout, (hidden, intermediate), id=f"{name}-{hidden}x{intermediate}", marks=marks)


def stack(found: Written) -> None:
    """Put stacked tensors of all experts in the place of those of each, gate above up."""
    each = {name: tensor for name, tensor in found.tensors.items() if ".experts." in name}
    for name in each:
        del found.tensors[name]
    ends = sorted({name.rpartition(".weight")[2] for name in each})
    for module in sorted({name.partition(".experts.")[0] for name in each}):
        for end in ends:

            def of(projection: str, module: str = module, end: str = end) -> Tensor:
                names = (f"{module}.experts.{expert}.{projection}.weight{end}" for expert in range(EXPERTS))
                return torch.stack([each[name] for name in names])

            bytes_ = [of(name).view(torch.uint8) for name in ("gate_proj", "up_proj")]
            found.tensors[f"{module}.experts.gate_up_proj{end}"] = torch.cat(bytes_, 1).view(of("up_proj").dtype)
            found.tensors[f"{module}.experts.down_proj{end}"] = of("down_proj")
