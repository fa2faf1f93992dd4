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
from jitmoe.hf.adapters.keys import LEAF, SGLANG, module_of, split
from jitmoe.hf.adapters.peft_config import Target, is_mixtral, leaves, new_config, other_targets
from jitmoe.hf.adapters.scaling import with_one_rank
from jitmoe.hf.adapters.stacked import layer_of, rank_and_plain_scale
from jitmoe.hf.adapters.value import ExpertAdapter

GATE_UP = "gate_up_proj"


def read(folder: Path, choices: Choices) -> ExpertAdapter:
    """The adapter in ``folder``; gate_up_proj with a shared A, or with A already put together, is read too.

    Raises:
        AdapterError: it is damaged or incomplete, or rsLoRA, which SGLang does not compute.
    """
    del choices
    config = read_config(folder / CONFIG)
    rank, scale = rank_and_plain_scale(config)
    groups, others = split(read_tensors(folder / MODEL).tensors, SGLANG, ("leaf", "side"))
    layers = tuple(layer_of(prefix, _named(prefix, tensors), rank, scale) for prefix, tensors in groups.items())
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


def _named(prefix: str, tensors: Mapping[tuple[str, str], torch.Tensor]) -> dict[str, torch.Tensor]:
    """``tensors`` under the names of our layer."""
    if any(tensor.dim() != 3 for tensor in tensors.values()):
        raise AdapterError(f"{prefix}: A and B must have three dimensions in this layout")
    named: dict[str, torch.Tensor] = {}
    for (leaf, side), tensor in [*tensors.items(), *_cut(prefix, tensors).items()]:
        if leaf != GATE_UP:
            name = f"{LEAF[leaf]}_lora_{side.lower()}"
            if name in named:
                raise AdapterError(f"{prefix} has {side} of {LEAF[leaf]} twice: which of them counts?")
            named[name] = tensor
    return named


def _cut(prefix: str, tensors: Mapping[tuple[str, str], torch.Tensor]) -> dict[tuple[str, str], torch.Tensor]:
    """gate_up_proj, if there, as gate_proj and up_proj."""
    a, b = tensors.get((GATE_UP, "A")), tensors.get((GATE_UP, "B"))
    if a is None and b is None:
        return {}
    if a is None or b is None or b.shape[1] % 2 or a.shape[1] not in (b.shape[2], 2 * b.shape[2]):
        raise AdapterError(f"{prefix}: {GATE_UP} lacks A or B, or their shapes do not go together")
    a_gate, a_up = (a, a) if a.shape[1] == b.shape[2] else a.chunk(2, dim=1)
    b_gate, b_up = b.chunk(2, dim=1)
    return {
        ("gate_proj", "A"): a_gate,
        ("gate_proj", "B"): b_gate,
        ("up_proj", "A"): a_up,
        ("up_proj", "B"): b_up,
    }
