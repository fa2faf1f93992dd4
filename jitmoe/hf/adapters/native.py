"""jitmoe's own file: the parameters of :class:`~jitmoe.MoELayer` under the prefix of their layer, in one safetensors.

``{prefix}.gate_lora_a`` and so on; alpha, rank and rslora, one of each, are in the metadata as the config takes them.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from jitmoe.errors import AdapterError
from jitmoe.hf.adapters.choices import Choices
from jitmoe.hf.adapters.files import Content, Tensors, object_in, read_tensors
from jitmoe.hf.adapters.scaling import alpha_of, scale_of, with_one_rank
from jitmoe.hf.adapters.stacked import layer_of
from jitmoe.hf.adapters.value import ExpertAdapter

LAYOUT = "jitmoe-lora-1"


def read(path: Path, choices: Choices) -> ExpertAdapter:
    """The adapter in the file ``path``.

    Raises:
        AdapterError: it is damaged or incomplete.
    """
    del choices
    file = read_tensors(path)
    try:
        alpha, rank = float(file.metadata["alpha"]), int(file.metadata["rank"])
        rslora = {"true": True, "false": False}[file.metadata["rslora"]]
        scale = scale_of(alpha, rank, rslora)
    except (KeyError, ValueError, ArithmeticError) as error:
        raise AdapterError(f"{path} does not say alpha, rank and rslora in its metadata: {error}") from error
    config = object_in(path, file.metadata, "config")
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in file.tensors.items():
        prefix, _, name = key.rpartition(".")
        groups.setdefault(prefix, {})[name] = tensor
    layers = [layer_of(prefix, tensors, rank, scale, prefix or str(path)) for prefix, tensors in groups.items()]
    return ExpertAdapter(tuple(layers), rslora, {}, config)


def write(adapter: ExpertAdapter, choices: Choices) -> Mapping[str, Content]:
    """The file of ``adapter``, which has one rank and one scale.

    Raises:
        AdapterError: the scales have no common one.
    """
    adapter = with_one_rank(adapter, choices.note)
    pair = adapter.layers[0].gate
    tensors = {
        ".".join(filter(None, [layer.prefix, f"{name}_lora_{side}"])): tensor
        for layer in adapter.layers
        for name, pair in layer.pairs()
        for side, tensor in (("a", pair.a), ("b", pair.b))
    }
    metadata = {
        "layout": LAYOUT,
        "alpha": repr(alpha_of(pair.scale, pair.rank, adapter.rslora)),
        "rank": str(pair.rank),
        "rslora": str(adapter.rslora).lower(),
        "config": json.dumps(adapter.config),
    }
    return {"": Tensors(tensors, metadata)}
