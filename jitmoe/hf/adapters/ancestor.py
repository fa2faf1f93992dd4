"""KTransformers: ``fused_expert_lora.safetensors`` beside the other LoRA of PEFT, ``layers.0.experts.gate_lora_a``.

A is [E, r, in] and B [E, out, r] (``_create_fused_expert_lora_buffers`` and ``_save_fused_expert_lora`` in
kt-kernel/python/sft/lora.py). Rank and alpha are those of ``adapter_config.json``, and the scale is lora_alpha / r.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from jitmoe.errors import AdapterError
from jitmoe.hf.adapters.choices import Choices
from jitmoe.hf.adapters.files import CONFIG, FUSED, MODEL, Content, Tensors, object_in, read_config, read_tensors
from jitmoe.hf.adapters.keys import OF_EXPERTS, module_of
from jitmoe.hf.adapters.peft_config import Target, new_config, other_targets
from jitmoe.hf.adapters.scaling import with_one_rank
from jitmoe.hf.adapters.stacked import layer_of, rank_and_plain_scale
from jitmoe.hf.adapters.value import ExpertAdapter

PREFIX = "base_model.model.model.layers.{layer}.mlp.experts"
"""Where the experts of a layer are in most models, for files that do not say it."""


def read(folder: Path, choices: Choices) -> ExpertAdapter:
    """The adapter in ``folder``; its ``adapter_model.safetensors``, if there is one, holds the others.

    Raises:
        AdapterError: it is damaged or incomplete, or nothing says alpha.
    """
    file = read_tensors(folder / FUSED)
    groups = _by_layer(file.tensors)
    config = _config(folder, groups, choices)
    rank, scale = rank_and_plain_scale(config)
    others = read_tensors(folder / MODEL).tensors if (folder / MODEL).exists() else {}
    if twice := next(filter(OF_EXPERTS.fullmatch, others), None):
        raise AdapterError(f"{folder / MODEL} has {twice}, and experts are in {FUSED}: which of them counts?")
    prefixes = _prefixes(folder / FUSED, file.metadata)
    layers = [
        layer_of(prefixes.get(layer) or PREFIX.format(layer=layer), tensors, rank, scale, f"layer {layer}")
        for layer, tensors in groups.items()
    ]
    return ExpertAdapter(tuple(layers), False, others, config)


def write(adapter: ExpertAdapter, choices: Choices) -> Mapping[str, Content]:
    """Files of ``adapter``; the prefixes are in the metadata, which KTransformers does not read.

    Raises:
        AdapterError: the scales have no common one, or two groups of experts are in one layer.
    """
    adapter = with_one_rank(adapter, choices.note)
    tensors: dict[str, torch.Tensor] = {}
    prefixes: dict[str, str] = {}
    targets = []
    for layer in adapter.layers:
        found = re.search(r"layers\.(\d+)\.", layer.prefix)
        if found is None or found[1] in prefixes:
            raise AdapterError(f"{layer.prefix!r}: this format has one group of experts for each layers.NUMBER")
        prefixes[found[1]] = layer.prefix
        for name, pair in layer.pairs():
            tensors[f"layers.{found[1]}.experts.{name}_lora_a"] = pair.a
            tensors[f"layers.{found[1]}.experts.{name}_lora_b"] = pair.b
            targets.append(Target(f"{module_of(layer.prefix)}.{name}", name, pair.rank, pair.scale))
    config = new_config(adapter, targets, rslora=False, for_experts=True)
    config["target_modules"] = other_targets(adapter)
    config["target_parameters"] = None
    contents: dict[str, Content] = {CONFIG: config, FUSED: Tensors(tensors, {"prefixes": json.dumps(prefixes)})}
    return contents | ({MODEL: Tensors(adapter.others)} if adapter.others else {})


def _by_layer(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        found = re.fullmatch(r"layers\.(\d+)\.experts\.([^.]+)", key)
        if found is None:
            raise AdapterError(f"{key} is not known in this layout of experts: it would be lost")
        groups.setdefault(found[1], {})[found[2]] = tensor
    return groups


def _prefixes(path: Path, metadata: Mapping[str, str]) -> dict[str, str]:
    """Where the experts of each layer are, as our own writer says it."""
    prefixes = object_in(path, metadata, "prefixes")
    if not all(isinstance(prefix, str) for prefix in prefixes.values()):
        raise AdapterError(f"{path}: prefixes in its metadata has values that are no text")
    return prefixes


def _config(folder: Path, groups: Mapping[str, Mapping[str, torch.Tensor]], choices: Choices) -> dict[str, Any]:
    if (folder / CONFIG).exists():
        return read_config(folder / CONFIG)
    ranks = {tensor.shape[1] for tensors in groups.values() for name, tensor in tensors.items() if name.endswith("_a")}
    if choices.lora_alpha is None or len(ranks) != 1:
        raise AdapterError(f"{folder} has no {CONFIG}, and nothing else says alpha: give --lora-alpha")
    return {"peft_type": "LORA", "r": ranks.pop(), "lora_alpha": choices.lora_alpha}
