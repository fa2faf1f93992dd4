"""The sizes of a model's experts, from its transformers ``config.json``.

A field about experts or layers that is not understood is an error by name: a wrong number of layers is a wrong answer.
"""

import importlib
import importlib.util
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jitmoe.config import read_fields
from jitmoe.errors import ConfigError, UnsupportedExpertsError
from jitmoe.memory.layers import LAYER_FIELDS, count_expert_layers
from jitmoe.memory.presets import PRESETS
from jitmoe.quantization_config import find_config, read_schemes


@dataclass(frozen=True)
class Model:
    """The Mixture-of-Experts part of a transformers model.

    Attributes:
        fields: sizes, and the format of quantised weights, under the names of :class:`~jitmoe.config.MoEConfig`.
        layers: number of layers with experts.
        notes: what jitmoe does not compute of these experts, and what options replaced, for people.
    """

    fields: dict[str, Any]
    layers: int
    notes: tuple[str, ...]


NAMES = {
    "num_experts": ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"),
    "hidden_size": ("hidden_size", "d_model"),
    "intermediate_size": ("moe_intermediate_size", "expert_ffn_hidden_size", "ffn_hidden_size", "intermediate_size"),
    "top_k": (
        *("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts"),
        *("experts_per_token", "moe_num_active_experts"),
    ),
}
"""Fields of ``config.json``; the first that is there counts. Where a model also has dense layers, their width is
``intermediate_size`` and that of experts ``moe_intermediate_size``."""

SUSPICIOUS = re.compile(r"expert|moe|sparse|dense|layer|block|mlp|ffn")
"""Names of fields that may say how many experts there are, of which sizes, and in which layers."""

HARMLESS = re.compile(
    r"""shared_expert | share_expert | n_shared | num_shared | router | routed_scaling | routing | aux | loss | jitter
    | expert_bias | expert_group | expert_selection | renormalize | normalize_expert | norm_min | capacity
    | token_dropout    | fp32_combine | _gate$ | apply_router | moe_lora | expert_sink
    | layer_?norm | layer_types$ | layerdrop | rope | kv_ | nextn | mtp | window | attn | attention | sliding
    | index_ | chunk | gradient | per_layer_input | num_kv_shared_layers | layer_group_size | layerscale
    | mlp_bias | mlp_(alpha|beta)_factor | dense_act_fn | intermediate_size_mlp | dense_intermediate_size
    | ^block_size$ | hidden_act | act_fn | output_router_logits | layers_to_transform | _dim$ | use_double_wide_mlp""",
    re.VERBOSE,
)
"""Suspicious names that say nothing about the routed experts: shared ones, routers, norms, attention."""

TWO_MATRICES = ("relu2", "relu_squared")
"""Activations of experts without a gate: two matrices, which are no experts of ours."""


def read_model(path: Path, given: Mapping[str, int] | None = None, layers: int | None = None) -> Model:
    """Sizes of the experts from a transformers ``config.json``; of a multimodal model, those of its text part.

    Where transformers is installed and knows the model, its own class fills in what the file leaves at the default.

    Args:
        path: the file, or a name of :data:`~jitmoe.memory.presets.PRESETS`.
        given: sizes that the user says under the names of MoEConfig: they fill gaps of the file, and replace it.
        layers: likewise the number of layers with experts.

    Raises:
        ConfigError: the file cannot be read, belongs to no model with experts, or has a field about them that is not
            understood; the message names it.
    """
    given = given or {}
    preset = None if path.exists() else PRESETS.get(str(path))
    whole = with_defaults(preset or read_fields(path, "the config.json of a transformers model"))
    content = _text_part(whole)
    _refuse_two_matrices(path, content)
    if layers is None or not {"num_experts", "intermediate_size", "top_k"} <= given.keys():
        _refuse_unknown(path, content)
    found: dict[str, Any] = {field: _first(path, content, field, given) for field in NAMES}
    weights, notes = _weight_format(whole)
    if layers is None:
        layers = _count_layers(path, content)
    notes = (*_notes(content), *notes, *_other_parts(whole, content), *_replaced(content, given))
    return Model(found | weights, layers, notes)


def _weight_format(content: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Fields for the experts of a quantised checkpoint, and what to say of them."""
    config = find_config(content)
    if config is None:
        return {}, ()
    try:
        first, *others = read_schemes(config)
    except UnsupportedExpertsError as error:
        return {}, (f"the experts are counted as bfloat16: {error}",)
    if others:
        names = ", ".join(scheme.weight_format for scheme in (first, *others))
        return {}, (f"the weights are in several formats ({names}), and the experts are counted as bfloat16: give "
                    f"--weight-format",)  # fmt: skip
    fields: dict[str, Any] = {"weight_format": first.weight_format}
    if first.group:
        fields["group_size"] = first.group
    return fields, (f"the experts are counted as {first.weight_format}, as the checkpoint has them",)


def _count_layers(path: Path, content: Mapping[str, Any]) -> int:
    try:
        layers = count_expert_layers(content)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}: give --layers, the number of layers with experts") from error
    if not layers:
        raise ConfigError(f"{path} has no layer with experts")
    return layers


def with_defaults(content: dict[str, Any]) -> dict[str, Any]:
    """The fields with the defaults of transformers' class of this model, where it is installed and has one."""
    model_type = content.get("model_type")
    if not isinstance(model_type, str) or importlib.util.find_spec("transformers") is None:
        return content
    try:
        classes = importlib.import_module("transformers").CONFIG_MAPPING
        known: dict[str, Any] = classes[model_type](**content).to_dict() if model_type in classes else {}
    except Exception:  # its classes check the values, each in its own way; the file's own fields remain
        return content
    return content | {name: value for name, value in known.items() if content.get(name) is None or name in LAYER_FIELDS}


def _text_part(content: dict[str, Any]) -> dict[str, Any]:
    """The part about the language model: the experts of DBRX have one of their own beside it."""
    for name in ("thinker_config", "text_config", "language_config", "llm_config"):
        if isinstance(content.get(name), dict):
            return _text_part(content[name])
    inner = content.get("ffn_config")
    return {**content, **inner, "ffn_config": None} if isinstance(inner, dict) else content


def _refuse_unknown(path: Path, content: Mapping[str, Any]) -> None:
    known = {name for names in NAMES.values() for name in names} | LAYER_FIELDS
    unknown = sorted(
        name
        for name, value in content.items()
        if SUSPICIOUS.search(name) and name not in known and not HARMLESS.search(name) and _says_something(value)
    )
    if unknown:
        values = ", ".join(f"{name} ({str(content[name])[:40]})" for name in unknown)
        raise ConfigError(
            f"{path} has fields about experts or layers that jitmoe does not understand: {values}. Give the sizes as "
            "options: --num-experts, --intermediate-size, --top-k and --layers"
        )


def _says_something(value: Any) -> bool:
    if isinstance(value, dict):  # per layer, say: what is inside may be harmless
        return any(SUSPICIOUS.search(name) or _is_telling_dict(inner) for name, inner in value.items())
    return bool(value) and not isinstance(value, (str, float))


def _is_telling_dict(value: Any) -> bool:
    return isinstance(value, dict) and _says_something(value)


def _refuse_two_matrices(path: Path, content: Mapping[str, Any]) -> None:
    activation = content.get("mlp_hidden_act") or content.get("hidden_act")
    if activation in TWO_MATRICES or content.get("moe_latent_size"):
        raise ConfigError(
            f"{path} has experts of {'two matrices' if activation in TWO_MATRICES else 'another width than the model'} "
            f"({activation}): they are no experts of gate, up and down, and jitmoe does not compute them"
        )


def _first(path: Path, content: Mapping[str, Any], field: str, given: Mapping[str, int]) -> int:
    if field in given:
        return given[field]
    for name in NAMES[field]:
        value = content.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if value is not None:
            raise ConfigError(f"{path} has {name} {value!r}, expected an int: give --{field.replace('_', '-')}")
    raise ConfigError(
        f"{path} has none of the fields {', '.join(NAMES[field])}: not the config.json of a model with experts, or "
        f"give --{field.replace('_', '-')}"
    )


def _other_parts(whole: Mapping[str, Any], counted: Mapping[str, Any]) -> Iterator[str]:
    """Parts of a multimodal model that have experts too."""
    for name, part in whole.items():
        if name.endswith("_config") and isinstance(part, dict) and _text_part(part) != counted:
            experts = [field for field in NAMES["num_experts"] if isinstance(_text_part(part).get(field), int)]
            if experts:
                yield f"{name} has experts too ({_text_part(part)[experts[0]]}), which are not counted"


def _replaced(content: Mapping[str, Any], given: Mapping[str, int]) -> Iterator[str]:
    for field, value in given.items():
        name = next((name for name in NAMES.get(field, ()) if content.get(name) is not None), None)
        if name is not None and content[name] != value:
            yield f"--{field.replace('_', '-')} {value} replaces the model's {content[name]}"


def _notes(content: Mapping[str, Any]) -> Iterator[str]:
    """What these experts compute and :class:`~jitmoe.experts.layer.MoELayer` does not."""
    activation = content.get("hidden_act") or content.get("hidden_activation") or "silu"
    if content.get("model_type") == "gpt_oss":
        yield (
            "gpt-oss has biases, which are not counted; its layer takes activation='gpt_oss', bias=True and, as it is "
            "shipped, weight_format='mxfp4'"
        )
    elif activation not in ("silu", "swish"):
        yield f"the activation of this model is {activation}, and jitmoe computes silu; the bytes are right"
