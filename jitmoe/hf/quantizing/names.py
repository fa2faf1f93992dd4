"""How the layouts of quantised checkpoints name their tensors, and what they say in config.json."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jitmoe.formats import SQUARE, Packing

WrittenFormat = Literal["int8_row", "fp8_block", "int4_group"]
"""Formats that checkpoints are written in."""

CONFIG_KEY = "quantization_config"
"""What config.json calls the description of the layout."""

QUANTIZED_KEYS = (CONFIG_KEY, "compression_config")
"""Fields of config.json that only quantised checkpoints have."""

QUANTIZED_SUFFIXES = (
    *("weight_scale_inv", "weight_scale", "weight_packed", "weight_shape", "weight_zero_point"),
    *("qweight", "qzeros", "g_idx", "_blocks", "_scales", "quant_state.bitsandbytes__nf4"),
)
"""Ends of names that only tensors of quantised checkpoints have."""

HEAD = "lm_head"
"""The linear module that has no tensor where it is tied to the embedding, and is not quantised there either."""


@dataclass(frozen=True)
class Layout:
    """Tensors of one quantised linear module.

    Attributes:
        method: ``quant_method`` of config.json.
        values: last part of the name of the values.
        scales: likewise of the scales.
        shape: likewise of a tensor with the shape of the weight, if there is one.
    """

    method: str
    values: str
    scales: str
    shape: str | None = None


LAYOUTS: dict[WrittenFormat, Layout] = {
    "fp8_block": Layout("fp8", "weight", "weight_scale_inv"),
    "int8_row": Layout("compressed-tensors", "weight", "weight_scale"),
    "int4_group": Layout("compressed-tensors", "weight_packed", "weight_scale", "weight_shape"),
}
"""By format: DeepSeek's and Qwen3's FP8; "int-quantized" and "pack-quantized" of compressed-tensors."""


def scale_shape(packing: Packing, out: int, in_: int) -> tuple[int, ...]:
    """Shape of the scales of a matrix [out, in] in a checkpoint: a column where rows have one each."""
    shape = packing.scale_shape(out, in_)
    return shape if len(shape) == 2 else (*shape, 1)


def quantization_config(packing: Packing, plain: Sequence[str]) -> dict[str, Any]:
    """The description of a checkpoint.

    Args:
        packing: of the experts.
        plain: names of the modules that are not quantised.
    """
    if packing.format.name == "fp8_block":
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [SQUARE, SQUARE],
            "modules_to_not_convert": list(plain),
        }
    grouped = packing.format.sharing == "group"
    weights = {
        "num_bits": packing.format.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group" if grouped else "channel",
        "group_size": packing.group if grouped else None,
        "dynamic": False,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized" if grouped else "int-quantized",
        "quantization_status": "compressed",
        # vLLM looks for the experts' scheme under this very target.
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": list(plain),
    }
