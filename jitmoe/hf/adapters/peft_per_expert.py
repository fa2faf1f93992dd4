"""PEFT on experts that are modules, as in transformers 4: ``experts.{e}.gate_proj.lora_A.weight`` [r, in].

vLLM reads the same files, patterns of ranks and alphas included (``PEFTHelper.get_rank_and_scaling`` in
vllm/lora/peft_helper.py), and PEFT converts them to ``target_parameters`` at loading for the models that it knows.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from jitmoe.errors import AdapterError
from jitmoe.hf.adapters.choices import Choices
from jitmoe.hf.adapters.files import CONFIG, MODEL, Content, Tensors, read_config, read_tensors
from jitmoe.hf.adapters.keys import PER_EXPERT, check_names, check_rank, module_of, split
from jitmoe.hf.adapters.peft_config import (
    Target,
    check_config,
    is_mixtral,
    leaves,
    new_config,
    other_targets,
    rank_and_scale,
)
from jitmoe.hf.adapters.value import ExpertAdapter, LayerAdapter, Pair


def read(folder: Path, choices: Choices) -> ExpertAdapter:
    """The adapter in ``folder``.

    Raises:
        AdapterError: it is damaged or incomplete, or a projection has different ranks or scales in its experts.
    """
    del choices
    config = read_config(folder / CONFIG)
    check_config(config)
    groups, others = split(read_tensors(folder / MODEL).tensors, PER_EXPERT, ("expert", "leaf", "side"))
    layers = tuple(_layer(prefix, tensors, config) for prefix, tensors in groups.items())
    return ExpertAdapter(layers, bool(config.get("use_rslora")), others, config)


def write(adapter: ExpertAdapter, choices: Choices) -> Mapping[str, Content]:
    """Files of ``adapter``."""
    del choices
    tensors = dict(adapter.others)
    targets, names = [], set()
    for layer in adapter.layers:
        if not layer.prefix:
            raise AdapterError("these experts belong to no module: there is no name for them in a file of PEFT")
        for projection, pair in layer.pairs():
            leaf = leaves(is_mixtral(layer.prefix))[projection]
            for expert in range(len(pair.a)):
                tensors[f"{layer.prefix}.{expert}.{leaf}.lora_A.weight"] = pair.a[expert]
                tensors[f"{layer.prefix}.{expert}.{leaf}.lora_B.weight"] = pair.b[expert]
            module = rf"{module_of(layer.prefix)}.\d+.{leaf}"
            targets.append(Target(module, rf"experts.\d+.{leaf}", pair.rank, pair.scale))
            names.add(leaf)
    config = new_config(adapter, targets, rslora=adapter.rslora)
    config["target_modules"] = sorted({*other_targets(adapter), *names})
    config["target_parameters"] = None
    return {CONFIG: config, MODEL: Tensors(tensors)}


def _layer(
    prefix: str, tensors: Mapping[tuple[str, str, str], torch.Tensor], config: Mapping[str, object]
) -> LayerAdapter:
    experts = range(1 + max(int(expert) for expert, _, _ in tensors))
    names = leaves(mixtral=any(re.fullmatch(r"w\d", leaf) for _, leaf, _ in tensors))
    check_names(
        prefix,
        (f"{int(expert)}.{leaf}.lora_{side}" for expert, leaf, side in tensors),
        (f"{expert}.{leaf}.lora_{side}" for expert in experts for leaf in names.values() for side in "AB"),
    )
    pairs = {}
    for projection, leaf in names.items():
        settings = {rank_and_scale(config, f"{prefix}.{expert}.{leaf}") for expert in experts}
        if len(settings) > 1:
            raise AdapterError(f"{prefix}: experts have different ranks or alphas in {leaf}")
        a, b = (_stacked(prefix, leaf, [tensors[str(expert), leaf, side] for expert in experts]) for side in "AB")
        ((rank, scale),) = settings
        pairs[projection] = check_rank(f"{prefix}: {leaf}", Pair(a, b, scale), rank)
    return LayerAdapter(prefix, **pairs)


def _stacked(prefix: str, leaf: str, tensors: list[torch.Tensor]) -> torch.Tensor:
    shapes = {(tuple(tensor.shape), tensor.dtype) for tensor in tensors}
    if len(shapes) > 1:
        raise AdapterError(
            f"{prefix}: experts have A or B of different shapes or dtypes in {leaf}: {sorted(map(str, shapes))}"
        )
    return torch.stack(tensors)
