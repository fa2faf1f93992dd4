"""Which layers of a model have experts, by the fields that transformers' model families use to say it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jitmoe.errors import ConfigError

TOTAL = ("num_hidden_layers", "num_layers", "n_layers")
"""Fields with the number of all layers."""

MOST_LAYERS = 100_000
"""Far beyond every model; each is looked at."""

WITH_EXPERTS = ("sparse", "moe", "hash_moe", "E")
"""How a list, or a text of one letter a layer, calls a layer with experts."""

WITHOUT = (
    *("dense", "mlp", "mamba", "mamba2", "attention", "full_attention", "linear_attention", "sliding_attention"),
    *("M", "*", "-"),
)
"""How it calls the others. Any other word is an error."""


def _is_count(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _are_numbers(value: Any, _: int) -> bool:
    return isinstance(value, list) and all(_is_count(item, 0) for item in value)


def _is_flag(value: Any, _: int) -> bool:
    return isinstance(value, bool)


def _is_word_each(value: Any, total: int) -> bool:
    words = WITH_EXPERTS + WITHOUT
    return isinstance(value, (list, str)) and len(value) == total and all(word in words for word in value)


def _is_step_or_flag_each(value: Any, total: int) -> bool:
    return len(value) == total if isinstance(value, list) else _is_count(value)


@dataclass(frozen=True)
class Rule:
    """What one field says.

    Attributes:
        holds: whether a layer has experts, from the value, the number of the layer, and all fields.
        valid: whether the value, of a model of so many layers, says anything.
    """

    holds: Callable[[Any, int, Mapping[str, Any]], bool]
    valid: Callable[[Any, int], bool] = lambda value, _: _is_count(value)


WORDS = Rule(lambda value, layer, _: value[layer] in WITH_EXPERTS, _is_word_each)
NTH = Rule(lambda value, layer, _: (layer + 1) % value == 0)
PREFIX = Rule(lambda value, layer, _: layer >= value, lambda value, _: _is_count(value, 0))
WHOLE = Rule(lambda value, *_: bool(value), _is_flag)

LISTS = {
    "mlp_layer_types": WORDS,
    "layers_block_type": WORDS,
    "hybrid_override_pattern": WORDS,
    "moe_layers": Rule(lambda value, layer, _: layer in value, _are_numbers),
}
"""Fields that say it for each layer; the first that is there counts, and no rule beside it."""

RULES = {
    "decoder_sparse_step": NTH,
    "mlp_only_layers": Rule(lambda value, layer, _: layer not in value, _are_numbers),
    "first_k_dense_replace": PREFIX,
    "moe_layer_freq": Rule(
        lambda value, layer, _: bool(value[layer]) if isinstance(value, list) else layer % value == 0,
        _is_step_or_flag_each,
    ),
    "num_dense_layers": PREFIX,
    "moe_layer_start_index": PREFIX,
    "moe_layer_end_index": Rule(lambda value, layer, _: layer <= value or value == -1, lambda v, _: _is_count(v, -1)),
    "moe_layer_interval": NTH,
    "interleave_moe_layer_step": NTH,
    "expert_layer_period": Rule(lambda value, layer, fields: layer % value == fields.get("expert_layer_offset", 0)),
    "enable_moe_block": WHOLE,
    "is_moe": WHOLE,
}
"""Fields that are rules; a layer has experts where all of them agree."""

LAYER_FIELDS = {*TOTAL, *LISTS, *RULES, "expert_layer_offset"}


def count_expert_layers(fields: Mapping[str, Any]) -> int:
    """Number of the layers with experts; without any of these fields all layers have them.

    Raises:
        ConfigError: a field has a value that it should not have.
    """
    total = next((fields[name] for name in TOTAL if fields.get(name) is not None), None)
    if not isinstance(total, int) or not _is_count(total) or total > MOST_LAYERS:
        raise ConfigError(f"none of {', '.join(TOTAL)} is an int between 1 and {MOST_LAYERS}")
    listed = [name for name in LISTS if fields.get(name)]
    rules = {name: (LISTS | RULES)[name] for name in listed[:1] or RULES if fields.get(name) is not None}
    for name, rule in rules.items():
        if not rule.valid(fields[name], total):
            raise ConfigError(f"it has {name} {str(fields[name])[:80]}, which says nothing about its {total} layers")
    return sum(all(rule.holds(fields[name], layer, fields) for name, rule in rules.items()) for layer in range(total))
