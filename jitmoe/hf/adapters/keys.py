"""Names of tensors in adapters: which of them belong to routed experts, and in which layout."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from jitmoe.errors import AdapterError
from jitmoe.hf.adapters.value import Pair

PREFIX = r"(?P<prefix>(?:.+\.)?experts)"
LEAF = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}
"""Projections by their names in modules; w1, w2 and w3 are Mixtral's."""

PEFT_FUSED = re.compile(rf"{PREFIX}\.(?P<inner>base_layer\.)?lora_(?P<side>[AB])\.weight")
PER_EXPERT = re.compile(rf"{PREFIX}\.(?P<expert>\d+)\.(?P<leaf>{'|'.join(LEAF)})\.lora_(?P<side>[AB])\.weight")
SGLANG = re.compile(rf"{PREFIX}\.(?P<leaf>{'|'.join(LEAF)}|gate_up_proj)\.lora_(?P<side>[AB])\.weight")

OF_EXPERTS = re.compile(r"(?:.+\.)?experts\..+")
"""Whatever belongs to routed experts. Shared experts have other names."""

Groups = dict[str, dict[Any, torch.Tensor]]
"""Tensors of experts by prefix, and then by what a layout tells them apart with."""


def split(
    tensors: Mapping[str, torch.Tensor], layout: re.Pattern[str], parts: Sequence[str]
) -> tuple[Groups, dict[str, torch.Tensor]]:
    """Tensors of experts, by prefix and by the named ``parts`` of their names, and the others.

    Raises:
        AdapterError: a tensor belongs to experts and has no place in this layout.
    """
    groups: Groups = {}
    others = {}
    for name, tensor in tensors.items():
        if found := layout.fullmatch(name):
            groups.setdefault(found["prefix"], {})[tuple(found[part] or "" for part in parts)] = tensor
        elif OF_EXPERTS.fullmatch(name):
            raise AdapterError(f"{name} is not known in this layout of experts: it would be lost")
        else:
            others[name] = tensor
    return groups, others


def check_names(where: str, found: Iterable[Any], expected: Iterable[Any]) -> None:
    """Raise unless both are the same.

    Raises:
        AdapterError: something is missing or unknown.
    """
    missing = sorted(set(expected) - set(found))
    unknown = sorted(set(found) - set(expected))
    if missing or unknown:
        said = [
            f"{word} {', '.join(map(str, names[:3]))}"
            for word, names in (("lacks", missing), ("has", unknown))
            if names
        ]
        raise AdapterError(f"{where} {' and '.join(said)}: expected A and B of gate, up and down of every expert")


def check_rank(where: str, pair: Pair, rank: int) -> Pair:
    """``pair``, if its tensors have the rank that the config says.

    Raises:
        AdapterError: they have another one, and the scale would be a guess.
    """
    if pair.a.dim() == 3 and pair.rank != rank:
        raise AdapterError(f"{where} has rank {pair.rank}, and adapter_config.json says {rank}")
    return pair


def module_of(name: str) -> str:
    """The path of a module as the patterns of PEFT see it."""
    return name.removeprefix("base_model.model.")
