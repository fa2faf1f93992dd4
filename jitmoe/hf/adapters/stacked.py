"""What the layouts with a tensor [E, ...] for each A and B have in common: one rank and one scale for all of them."""

from collections.abc import Mapping
from typing import Any

import torch

from jitmoe.errors import AdapterError
from jitmoe.hf.adapters.keys import check_names, check_rank
from jitmoe.hf.adapters.peft_config import check_config
from jitmoe.hf.adapters.scaling import scale_of
from jitmoe.hf.adapters.value import LayerAdapter, Pair
from jitmoe.plan.projections import LORA_NAMES, NAMES


def layer_of(
    prefix: str, tensors: Mapping[str, torch.Tensor], rank: int, scale: float, where: str = ""
) -> LayerAdapter:
    """The layer with ``tensors``, under the names that they have in :class:`~jitmoe.MoELayer`.

    Raises:
        AdapterError: one is missing or unknown, or has another rank.
    """
    where = where or prefix
    check_names(where, tensors, LORA_NAMES)
    pairs = [
        check_rank(f"{where}: {name}", Pair(tensors[f"{name}_lora_a"], tensors[f"{name}_lora_b"], scale), rank)
        for name in NAMES
    ]
    return LayerAdapter(prefix, *pairs)


def rank_and_plain_scale(config: Mapping[str, Any]) -> tuple[int, float]:
    """Rank and scale of all experts by a config whose readers know neither patterns nor rsLoRA.

    Raises:
        AdapterError: it asks for rsLoRA, and its own programs would not follow.
    """
    check_config(config)
    if config.get("use_rslora"):
        raise AdapterError(
            "adapter_config.json asks for rsLoRA, and programs of this format scale by lora_alpha / r: set use_rslora "
            "to false, with the lora_alpha that is meant"
        )
    return int(config["r"]), scale_of(config["lora_alpha"], int(config["r"]), False)
