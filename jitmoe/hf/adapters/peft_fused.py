"""PEFT's ``target_parameters``: one A and B for all experts of a parameter, gate and up on one A.

The wrapper of down_proj lies around that of gate_up_proj, so ``experts.lora_A`` is down's and
``experts.base_layer.lora_A`` is that of gate and up. A is [E * r, in], expert by expert; B is [out, r * E], the expert
fastest (``ParamWrapper.get_delta_weight`` in peft/tuners/lora/layer.py).

PEFT before 0.19 took in and out of these parameters for each other: delta^T = B A. With the pairs of gate_up and down
the shapes always tell. Now A of gate_up is as wide as B of down is tall (H), and B of gate_up is twice as tall (2 I) as
A of down is wide (I). Before, it was the other way round: both at a time would need I = 2 I.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from jitmoe.errors import AdapterError
from jitmoe.hf.adapters.choices import Choices
from jitmoe.hf.adapters.files import CONFIG, MODEL, Content, Tensors, read_config, read_tensors
from jitmoe.hf.adapters.keys import PEFT_FUSED, check_names, module_of, split
from jitmoe.hf.adapters.peft_config import (
    Target,
    check_config,
    is_interleaved,
    new_config,
    other_targets,
    rank_and_scale,
)
from jitmoe.hf.adapters.scaling import with_shared_a
from jitmoe.hf.adapters.value import ExpertAdapter, LayerAdapter, Pair

INNER, OUTER = "base_layer.", ""
NEW_LAYOUT = "0.19.0"
"""The first version of PEFT with today's layout."""


def read(folder: Path, choices: Choices) -> ExpertAdapter:
    """The adapter in ``folder``.

    Raises:
        AdapterError: it is damaged or incomplete.
    """
    config = read_config(folder / CONFIG)
    check_config(config)
    interleaved = is_interleaved(config, choices.interleaved)
    groups, others = split(read_tensors(folder / MODEL).tensors, PEFT_FUSED, ("inner", "side"))
    layers, layouts = [], set()
    for prefix, tensors in groups.items():
        check_names(prefix, map(_name, tensors), [_name((part, side)) for part in (INNER, OUTER) for side in "AB"])
        is_old = _is_old(prefix, tensors)
        layouts.add(is_old)
        gate_up, down = (
            _unpacked(f"{prefix}.{name}", tensors[part, "A"], tensors[part, "B"], config, is_old)
            for part, name in ((INNER, "gate_up_proj"), (OUTER, "down_proj"))
        )
        gate, up = _split_rows(prefix, gate_up, interleaved)
        layers.append(LayerAdapter(prefix, gate, up, down))
    if True in layouts:
        choices.note("the file has the layout of PEFT before 0.19, in and out exchanged")
        config.pop("peft_version", None)
    return ExpertAdapter(tuple(layers), bool(config.get("use_rslora")), others, config)


def write(adapter: ExpertAdapter, choices: Choices) -> Mapping[str, Content]:
    """Files of ``adapter`` in the layout of PEFT since 0.19.

    Raises:
        AdapterError: gate and up have scales that one parameter cannot have.
    """
    interleaved = is_interleaved(adapter.config, choices.interleaved)
    tensors = dict(adapter.others)
    targets = []
    doubled = [layer for layer in adapter.layers if not layer.shares_a]
    if doubled:
        layer = doubled[0]
        choices.note(
            f"RANK DOUBLED: gate and up have different A in {len(doubled)} layer(s), so that of gate_up is both "
            f"(rank {layer.gate.rank} + {layer.up.rank} in {layer.prefix}); alpha follows, the scale stays"
        )
    for layer in map(with_shared_a, adapter.layers):
        if not layer.prefix:
            raise AdapterError("these experts belong to no module: there is no name for them in a file of PEFT")
        gate_up = Pair(layer.gate.a, _joined_rows(layer.gate.b, layer.up.b, interleaved), layer.gate.scale)
        for part, name, pair in ((INNER, "gate_up_proj", gate_up), (OUTER, "down_proj", layer.down)):
            tensors[f"{layer.prefix}.{part}lora_A.weight"] = pair.a.flatten(0, 1)
            tensors[f"{layer.prefix}.{part}lora_B.weight"] = pair.b.permute(1, 2, 0).flatten(1)
            targets.append(Target(f"{module_of(layer.prefix)}.{name}", _short(layer, name), pair.rank, pair.scale))
    config = new_config(adapter, targets, rslora=adapter.rslora)
    config["target_modules"] = other_targets(adapter)
    config["target_parameters"] = config.get("target_parameters") or sorted({target.short for target in targets})
    config.setdefault("peft_version", NEW_LAYOUT)
    return {CONFIG: config, MODEL: Tensors(tensors)}


def _name(part_and_side: tuple[str, str]) -> str:
    return "{}lora_{}".format(*part_and_side)


def _short(layer: LayerAdapter, name: str) -> str:
    return ".".join([*layer.prefix.split(".")[-2:], name])


def _is_old(prefix: str, tensors: Mapping[Any, torch.Tensor]) -> bool:
    """Whether in and out are exchanged, as before PEFT 0.19."""
    if any(tensor.dim() != 2 for tensor in tensors.values()):
        raise AdapterError(f"{prefix}: A and B must be matrices in this layout")
    (inner_in, inner_out), (outer_in, outer_out) = (
        (tensors[part, "A"].shape[1], tensors[part, "B"].shape[0]) for part in (INNER, OUTER)
    )
    if inner_in == outer_out and inner_out == 2 * outer_in:
        return False
    if inner_out == outer_in and inner_in == 2 * outer_out:
        return True
    raise AdapterError(
        f"{prefix}: gate_up has A with {inner_in} columns and B with {inner_out} rows, down {outer_in} and "
        f"{outer_out}: no hidden and intermediate size fits, neither in PEFT's layout of today nor in that before 0.19"
    )


def _unpacked(name: str, a: torch.Tensor, b: torch.Tensor, config: Mapping[str, Any], is_old: bool) -> Pair:
    """A [E, r, in] and B [E, out, r] of one parameter."""
    rank, scale = rank_and_scale(config, name)
    if len(a) % rank or b.shape[1] != len(a):
        raise AdapterError(
            f"{name}: A has {len(a)} rows and B {b.shape[1]} columns, expected experts times the rank {rank} of "
            "adapter_config.json in both"
        )
    by_expert, by_rank = a.reshape(-1, rank, a.shape[1]), b.reshape(len(b), rank, -1)
    if is_old:
        return Pair(by_rank.permute(2, 1, 0), by_expert.transpose(1, 2), scale)
    return Pair(by_expert, by_rank.permute(2, 0, 1), scale)


def _split_rows(prefix: str, gate_up: Pair, interleaved: bool) -> tuple[Pair, Pair]:
    rows = gate_up.b.shape[1]
    if rows % 2:
        raise AdapterError(f"{prefix}: B of gate_up has {rows} rows, expected as many for gate as for up")
    gate, up = (gate_up.b[:, 0::2], gate_up.b[:, 1::2]) if interleaved else gate_up.b.chunk(2, dim=1)
    return Pair(gate_up.a, gate, gate_up.scale), Pair(gate_up.a, up, gate_up.scale)


def _joined_rows(gate: torch.Tensor, up: torch.Tensor, interleaved: bool) -> torch.Tensor:
    return torch.stack([gate, up], dim=2).flatten(1, 2) if interleaved else torch.cat([gate, up], dim=1)
