"""``adapter_config.json`` of PEFT: the rank and alpha of a module from it, and a new one for other tensors."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jitmoe.errors import AdapterError
from jitmoe.hf.adapters.keys import LEAF, module_of
from jitmoe.hf.adapters.scaling import alpha_of, scale_of
from jitmoe.hf.adapters.value import ExpertAdapter

CHANGES_BASE = ("pissa", "olora", "corda", "loftq")
"""Initialisations that change the base weights: their A and B alone are not the adapter."""


@dataclass(frozen=True)
class Target:
    """What one A and B adapt.

    Attributes:
        module: path of the module or parameter, a regular expression as PEFT takes it in its patterns.
        short: a pattern for the same projection in all layers.
        rank: of A and B.
        scale: of B A.
    """

    module: str
    short: str
    rank: int
    scale: float


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse what is no plain LoRA.

    Raises:
        AdapterError: it is another method, or rank and alpha are not there.
    """
    if str(config.get("peft_type", "LORA")).upper() != "LORA":
        raise AdapterError(f"adapter_config.json is of {config['peft_type']}, and only LoRA can be converted")
    initialisation = config.get("init_lora_weights")
    if isinstance(initialisation, str) and initialisation.lower().startswith(CHANGES_BASE):
        raise AdapterError(
            f"init_lora_weights={initialisation!r} changes the base weights: convert the adapter to plain LoRA first, "
            "with path_initial_model_for_weight_conversion of PEFT"
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1:
        raise AdapterError(f"adapter_config.json has r {rank!r}, expected a positive int")
    if not isinstance(alpha, int | float):
        raise AdapterError(f"adapter_config.json has lora_alpha {alpha!r}, expected a number")


def rank_and_scale(config: Mapping[str, Any], name: str) -> tuple[int, float]:
    """Rank and scale that PEFT gives the module or parameter ``name``, as its ``get_pattern_key`` finds them.

    Raises:
        AdapterError: they are no numbers that make LoRA.
    """
    module = module_of(name)
    rank = _matching(config.get("rank_pattern") or {}, module, config["r"])
    alpha = _matching(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
    if not (isinstance(rank, int) and rank > 0 and isinstance(alpha, int | float)):
        raise AdapterError(
            f"adapter_config.json gives {module or 'r and lora_alpha'} rank {rank!r} and alpha {alpha!r}"
        )
    return rank, scale_of(alpha, rank, bool(config.get("use_rslora")))


def new_config(
    adapter: ExpertAdapter, experts: Sequence[Target], *, rslora: bool, for_experts: bool = False, patterns: bool = True
) -> dict[str, Any]:
    """The config of ``adapter`` with other tensors: the ranks and alphas of ``experts``, those of the others kept.

    Args:
        adapter: whose config is carried on.
        experts: what the new tensors of experts adapt.
        rslora: whether alpha is written as rsLoRA has it.
        for_experts: whether r and lora_alpha must be those of the experts, for readers that look nowhere else.
        patterns: whether readers know patterns of ranks and alphas.

    Raises:
        AdapterError: more than one rank or alpha without ``patterns``.
    """
    others = [Target(name, name, *rank_and_scale(adapter.config, name)) for name in other_modules(adapter)]
    rank, scale = experts[0].rank, experts[0].scale
    if others and not for_experts:
        rank = adapter.config["r"]
        scale = scale_of(adapter.config["lora_alpha"], rank, bool(adapter.config.get("use_rslora")))
    alpha = alpha_of(scale, rank, rslora)
    targets = [*experts, *others]
    ranks = _patterns(targets, {target: target.rank for target in targets}, rank)
    alphas = _patterns(targets, {target: alpha_of(target.scale, target.rank, rslora) for target in targets}, alpha)
    if not patterns and (ranks or alphas):
        raise AdapterError(f"this format has one rank and alpha, and {next(iter(ranks or alphas))} has others")
    return {
        "bias": "none",
        "peft_type": "LORA",
        "task_type": None,
        **adapter.config,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "use_rslora": rslora,
    }


def other_modules(adapter: ExpertAdapter) -> list[str]:
    """Paths of the modules outside the experts that have LoRA."""
    found = {name.partition(".lora_")[0] for name in adapter.others if ".lora_" in name}
    return sorted(module_of(name) for name in found)


def other_targets(adapter: ExpertAdapter) -> list[str]:
    """``target_modules`` for the modules outside the experts: the entries of the config that match one, or its path."""
    modules = other_modules(adapter)
    entries = adapter.config.get("target_modules")
    known = entries if isinstance(entries, list) else []
    kept = [entry for entry in known if any(_matches(entry, module) for module in modules)]
    return sorted({*kept, *(module for module in modules if not any(_matches(entry, module) for entry in kept))})


def is_interleaved(config: Mapping[str, Any], choice: bool | None) -> bool:
    """Whether rows of gate and up alternate in gate_up_proj, as in gpt-oss.

    Raises:
        AdapterError: the base model seems to be gpt-oss, and nobody has said so.
    """
    base = (config.get("auto_mapping") or {}).get("base_model_class")
    if choice is not None or base:
        return base == "GptOssForCausalLM" if choice is None else choice
    if re.search(r"gpt.?oss", str(config.get("base_model_name_or_path")), re.IGNORECASE):
        raise AdapterError(
            f"the base model {config['base_model_name_or_path']} looks like gpt-oss, whose rows of gate and up "
            "alternate: say --interleaved, or --concatenated if they do not"
        )
    return False


def leaves(mixtral: bool) -> dict[str, str]:
    """Names of the modules of gate, up and down; Mixtral's are numbers."""
    return {projection: leaf for leaf, projection in LEAF.items() if leaf.startswith("w") == mixtral}


def is_mixtral(prefix: str) -> bool:
    """Whether experts at ``prefix`` are named as Mixtral's in transformers 4."""
    return prefix.endswith("block_sparse_moe.experts")


def _matches(entry: str, module: str) -> bool:
    return module == entry or module.endswith(f".{entry}")


def _matching(patterns: Mapping[str, float], module: str, default: float) -> float:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _patterns(targets: Iterable[Target], values: Mapping[Target, float], default: float) -> dict[str, float]:
    """Entries for what differs from the default, short where all layers have the same value."""
    by_short: dict[str, dict[str, float]] = {}
    for target in targets:
        by_short.setdefault(target.short, {})[target.module] = values[target]
    patterns: dict[str, float] = {}
    for short, found in by_short.items():
        if len(set(found.values())) > 1:
            patterns |= {module: value for module, value in found.items() if value != default}
        elif (value := next(iter(found.values()))) != default:
            patterns[short] = value
    return patterns
