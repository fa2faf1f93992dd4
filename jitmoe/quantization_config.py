"""What the ``quantization_config`` of a checkpoint says of its weights; what is not understood is refused by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jitmoe.errors import UnsupportedExpertsError
from jitmoe.formats import FORMATS, GROUP_SIZES, SQUARE, WeightFormat

TensorLayout = Literal["fp8", "compressed", "compressed_packed", "gptq", "mxfp4"]
"""How a checkpoint names the tensors of a quantised weight, and what lies in them."""

KNOWN = "jitmoe reads fp8 in 128 x 128 blocks, compressed-tensors, symmetric 4 bit GPTQ and mxfp4"

ADVICE = (
    "Take the checkpoint of this model in bfloat16 or in one of those formats, or expand this one with the tool that "
    "quantised it"
)


@dataclass(frozen=True)
class Scheme:
    """One kind of quantised weights in a checkpoint.

    Attributes:
        layout: names and contents of the tensors.
        weight_format: what the weights are for jitmoe.
        group: inputs that share a scale in int4_group, else 0.
        stored_zero: what ``qzeros`` of GPTQ holds where a nibble of 8 is zero.
    """

    layout: TensorLayout
    weight_format: WeightFormat
    group: int = 0
    stored_zero: int = 0

    @property
    def value_dtype(self) -> str:
        """torch's name of the dtype of the values."""
        return FORMATS[self.weight_format].value_dtype


def find_config(content: Mapping[str, Any]) -> Any:
    """The ``quantization_config`` in a config.json, of the model or of its text part; None where there is none."""
    parts = [content.get(name) for name in ("text_config", "language_config", "llm_config", "thinker_config")]
    holders = [content, *(part for part in parts if isinstance(part, Mapping))]
    return next((found for holder in holders if (found := holder.get("quantization_config"))), None)


def read_schemes(config: Any) -> tuple[Scheme, ...]:
    """The kinds of quantised weights that a checkpoint with this ``quantization_config`` has.

    Raises:
        UnsupportedExpertsError: a method or an option that jitmoe does not read; names it and what to do.
    """
    if not isinstance(config, Mapping):
        raise _refused(f"its quantization_config is {type(config).__name__}, expected an object of named options")
    method = config.get("quant_method")
    if method is None and (config.get("load_in_4bit") or config.get("load_in_8bit")):
        method = "bitsandbytes"
    reader = METHODS.get(str(method))
    if reader is None:
        raise _refused(f"quant_method {method!r} is none that jitmoe knows")
    return reader(config)


def _refused(reason: str) -> UnsupportedExpertsError:
    return UnsupportedExpertsError(f"the quantised weights cannot be read: {reason}. {KNOWN}. {ADVICE}")


def _require(config: Mapping[str, Any], where: str, **allowed: tuple[Any, ...]) -> None:
    """Each option must have one of the values, of which the first is what a missing one means."""
    for name, values in allowed.items():
        value = config.get(name, values[0])
        if value not in values:
            raise _refused(f"{where} has {name} {value!r}, and jitmoe knows {' or '.join(map(repr, values))} there")


def _fp8(config: Mapping[str, Any]) -> tuple[Scheme, ...]:
    blocks = config.get("weight_block_size")
    if blocks is None or list(blocks) != [SQUARE, SQUARE]:
        raise _refused(f"fp8 has weight_block_size {blocks!r}, and jitmoe knows [{SQUARE}, {SQUARE}] there")
    _require(config, "fp8", fmt=("e4m3",), expert_dtype=("fp8",), activation_scheme=("dynamic", "static"))
    return (Scheme("fp8", "fp8_block"),)


def _mxfp4(config: Mapping[str, Any]) -> tuple[Scheme, ...]:
    return (Scheme("mxfp4", "mxfp4"),)


def _gptq(config: Mapping[str, Any]) -> tuple[Scheme, ...]:
    _require(config, "GPTQ", bits=(None, 4), pack_dtype=("int32",), is_marlin_format=(False,))
    _require(config, "GPTQ", checkpoint_format=("gptq", "gptq_v2"), group_size=(None, *GROUP_SIZES))
    if config.get("bits") is None or config.get("group_size") is None:
        raise _refused("GPTQ does not say its bits and group_size")
    if not config.get("sym", True):
        raise _refused("GPTQ is asymmetric (sym is false): its weights have zero points")
    if config.get("desc_act"):
        raise _refused("GPTQ has desc_act (act-order): its groups are not contiguous inputs")
    if config.get("dynamic"):
        raise _refused("GPTQ has other options for some modules (dynamic)")
    first_version = config.get("checkpoint_format", "gptq") == "gptq"
    return (Scheme("gptq", "int4_group", config["group_size"], stored_zero=7 if first_version else 8),)


def _compressed(config: Mapping[str, Any]) -> tuple[Scheme, ...]:
    _require(config, "compressed-tensors", quantization_status=("compressed",))
    sparsity = config.get("sparsity_config") or {}
    if sparsity and sparsity.get("format", "dense") != "dense":
        raise _refused(f"compressed-tensors has sparse weights ({sparsity['format']})")
    if (config.get("transform_config") or {}).get("config_groups"):
        raise _refused("compressed-tensors has a transform_config: its weights are rotated")
    groups = config.get("config_groups") or {}
    if not groups:
        raise _refused("compressed-tensors has no config_groups")
    found = (_of_group(name, group, group.get("format") or config.get("format")) for name, group in groups.items())
    return tuple(dict.fromkeys(found))


def _of_group(name: str, group: Mapping[str, Any], form: Any) -> Scheme:
    where = f"{name} of compressed-tensors"
    weights = group.get("weights")
    if not weights:
        raise _refused(f"{where} quantises activations alone: without that it would be another model")
    if not weights.get("symmetric", True):
        raise _refused(f"{where} is asymmetric: its weights have zero points")
    if weights.get("actorder") not in (None, False, "weight", "static"):
        raise _refused(f"{where} has actorder {weights['actorder']!r}: its groups are not contiguous inputs")
    _require(weights, f"the weights of {where}", dynamic=(False,))
    kind = (form, weights.get("type"), weights.get("num_bits"), weights.get("strategy"))
    if kind == ("pack-quantized", "int", 4, "group"):
        _require(weights, f"the weights of {where}", group_size=(None, *GROUP_SIZES))
        if weights.get("group_size") is not None:
            return Scheme("compressed_packed", "int4_group", weights["group_size"])
    if kind == ("float-quantized", "float", 8, "channel"):
        return Scheme("compressed", "fp8_row")
    if kind == ("float-quantized", "float", 8, "block") and weights.get("block_structure") == [SQUARE, SQUARE]:
        return Scheme("compressed", "fp8_block")
    if kind == ("int-quantized", "int", 8, "channel"):
        return Scheme("compressed", "int8_row")
    words = "format {!r}, type {!r}, num_bits {!r}, strategy {!r}".format(*kind)
    raise _refused(
        f"{where} has {words}, group_size {weights.get('group_size')!r} and block_structure "
        f"{weights.get('block_structure')!r}, and jitmoe knows pack-quantized int 4 in groups of 32, 64 or 128, "
        f"float-quantized float 8 by channel or in 128 x 128 blocks, and int-quantized int 8 by channel"
    )


METHODS: dict[str, Callable[[Mapping[str, Any]], tuple[Scheme, ...]]] = {
    "fp8": _fp8,
    "compressed-tensors": _compressed,
    "gptq": _gptq,
    "mxfp4": _mxfp4,
}
"""Readers of the options, by ``quant_method``."""
