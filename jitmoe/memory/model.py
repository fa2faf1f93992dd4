"""The sizes of a model's experts, from its transformers ``config.json``."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jitmoe.config import read_fields
from jitmoe.errors import ConfigError


@dataclass(frozen=True)
class Model:
    """The Mixture-of-Experts part of a transformers model.

    Attributes:
        fields: sizes under the names of :class:`~jitmoe.config.MoEConfig`.
        layers: number of layers with experts.
        notes: what jitmoe does not compute of these experts, for people.
    """

    fields: dict[str, int]
    layers: int
    notes: tuple[str, ...]


NAMES = {
    "num_experts": ("num_experts", "n_routed_experts", "num_local_experts"),
    "hidden_size": ("hidden_size",),
    "intermediate_size": ("moe_intermediate_size", "intermediate_size"),
    "top_k": ("num_experts_per_tok",),
}
"""Fields of ``config.json`` in Qwen3-MoE, OLMoE, DeepSeek-V2 and V3, and Mixtral; the first that is there counts. Where
a model also has dense layers, their width is ``intermediate_size`` and that of experts ``moe_intermediate_size``."""


def read_model(path: Path) -> Model:
    """Sizes of the experts from a transformers ``config.json``; of a multimodal model, those of its text part.

    Raises:
        ConfigError: the file cannot be read, or belongs to no model with experts.
    """
    content = read_fields(path, "the config.json of a transformers model")
    if isinstance(content.get("text_config"), dict):
        content = content["text_config"]
    fields = {field: _first(path, content, names) for field, names in NAMES.items()}
    total = _first(path, content, ("num_hidden_layers",))
    layers = sum(_has_experts(path, content, layer) for layer in range(total))
    return Model(fields, layers, tuple(_notes(content)))


def _first(path: Path, content: Mapping[str, Any], names: tuple[str, ...]) -> int:
    for name in names:
        value = content.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    raise ConfigError(f"{path} has none of the fields {', '.join(names)}: not the config.json of a model with experts")


def _has_experts(path: Path, content: Mapping[str, Any], layer: int) -> bool:
    """Whether a layer has experts, by the fields of Qwen3-MoE and of DeepSeek; without these fields every layer has."""
    dense = content.get("mlp_only_layers") or ()
    qwen = layer not in dense and (layer + 1) % _every(path, content, "decoder_sparse_step") == 0
    first = content.get("first_k_dense_replace") or 0
    return qwen and layer >= first and layer % _every(path, content, "moe_layer_freq") == 0


def _every(path: Path, content: Mapping[str, Any], name: str) -> int:
    """The field ``name``, which makes every n-th layer sparse; 1 where a model lacks it."""
    value = content.get(name)
    if value is None:
        return 1
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"{path} has {name} {value!r}, expected a positive int: give the sizes as options instead")
    return value


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
