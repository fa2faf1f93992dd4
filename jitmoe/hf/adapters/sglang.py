"""SGLang's stacked experts: ``experts.gate_proj.lora_A.weight`` [E, r, in], B [E, out, r], one rank and alpha.

SGLang puts gate and up together when it loads: A [E, 2 r, H] (``LoRAAdapter.normalize_gate_up_proj`` in
sglang/srt/lora/lora.py). Tensors already named gate_up_proj it takes for a shared A [E, r, H], and repeats that, so
unshared A must come as gate_proj and up_proj. The scale is lora_alpha / r, with rsLoRA too.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from jitmoe.errors import AdapterError
from jitmoe.hf.adapters.choices import Choices
from jitmoe.hf.adapters.files import CONFIG, MODEL, Content, Tensors, read_config, read_tensors
from jitmoe.hf.adapters.keys import LEAF, SGLANG, check_names, check_rank, module_of, split
from jitmoe.hf.adapters.peft_config import Target, check_config, is_mixtral, leaves, new_config, other_targets
from jitmoe.hf.adapters.scaling import scale_of, with_one_rank
from jitmoe.hf.adapters.value import ExpertAdapter, LayerAdapter, Pair


def read(folder: Path, choices: Choices) -> ExpertAdapter:
    """The adapter in ``folder``; gate_up_proj with a shared A, or with A already put together, is read too.

    Raises:
        AdapterError: it is damaged or incomplete, or rsLoRA, which SGLang does not compute.
    """
    del choices
    config = read_config(folder / CONFIG)
    check_config(config)
    refuse_rslora(config)
    groups, others = split(read_tensors(folder / MODEL).tensors, SGLANG, ("leaf", "side"))
    layers = tuple(_layer(prefix, tensors, config) for prefix, tensors in groups.items())
    return ExpertAdapter(layers, False, others, config)


def write(adapter: ExpertAdapter, choices: Choices) -> Mapping[str, Content]:
    """Files of ``adapter``.

    Raises:
        AdapterError: the scales have no common one, or a module outside the experts has another rank or alpha.
    """
    adapter = with_one_rank(adapter, choices.note)
    tensors = dict(adapter.others)
    targets, names = [], set()
    for layer in adapter.layers:
        if not layer.prefix:
            raise AdapterError("these experts belong to no module: there is no name for them in a file of SGLang")
        for projection, pair in layer.pairs():
            leaf = leaves(is_mixtral(layer.prefix))[projection]
            tensors[f"{layer.prefix}.{leaf}.lora_A.weight"] = pair.a
            tensors[f"{layer.prefix}.{leaf}.lora_B.weight"] = pair.b
            targets.append(Target(f"{module_of(layer.prefix)}.{leaf}", f"experts.{leaf}", pair.rank, pair.scale))
            names.add(leaf)
    config = new_config(adapter, targets, rslora=False, for_experts=True, patterns=False)
    config["target_modules"] = sorted({*other_targets(adapter), *names})
    config["target_parameters"] = None
    return {CONFIG: config, MODEL: Tensors(tensors)}


def refuse_rslora(config: Mapping[str, object]) -> None:
    """Refuse a config that its own program would scale otherwise than it says.

    Raises:
        AdapterError: it asks for rsLoRA.
    """
    if config.get("use_rslora"):
        raise AdapterError(
            "adapter_config.json asks for rsLoRA, and programs of this format scale by lora_alpha / r: set use_rslora "
            "to false, with the lora_alpha that is meant"
        )


def _layer(prefix: str, tensors: Mapping[tuple[str, str], torch.Tensor], config: Mapping[str, float]) -> LayerAdapter:
    if any(tensor.dim() != 3 for tensor in tensors.values()):
        raise AdapterError(f"{prefix}: A and B must have three dimensions in this layout")
    named = {
        (LEAF.get(leaf, "gate_up"), side): tensor for (leaf, side), tensor in _without_gate_up(prefix, tensors).items()
    }
    check_names(prefix, named, [(projection, side) for projection in ("gate", "up", "down") for side in "AB"])
    rank = int(config["r"])
    scale = scale_of(config["lora_alpha"], rank, False)
    return LayerAdapter(
        prefix,
        **{
            projection: check_rank(
                f"{prefix}: {projection}", Pair(named[projection, "A"], named[projection, "B"], scale), rank
            )
            for projection in ("gate", "up", "down")
        },
    )


def _without_gate_up(
    prefix: str, tensors: Mapping[tuple[str, str], torch.Tensor]
) -> dict[tuple[str, str], torch.Tensor]:
    """``tensors`` with gate_up_proj, if there, cut into gate_proj and up_proj."""
    cut = dict(tensors)
    a, b = cut.pop(("gate_up_proj", "A"), None), cut.pop(("gate_up_proj", "B"), None)
    if a is None and b is None:
        return cut
    if a is None or b is None or b.shape[1] % 2 or a.shape[1] not in (b.shape[2], 2 * b.shape[2]):
        raise AdapterError(f"{prefix}: gate_up_proj lacks A or B, or their shapes do not go together")
    a_gate, a_up = (a, a) if a.shape[1] == b.shape[2] else a.chunk(2, dim=1)
    b_gate, b_up = b.chunk(2, dim=1)
    parts = {"gate_proj": (a_gate, b_gate), "up_proj": (a_up, b_up)}
    return cut | {(leaf, side): pair["AB".index(side)] for leaf, pair in parts.items() for side in "AB"}
