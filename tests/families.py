"""Tiny models of the families that jitmoe runs in transformers, with odd sizes and seven experts."""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'jitmoe[hf]'")

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE, VOCABULARY = 7, 3, 46, 27, 61
LAYERS = 2

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": TOP_K,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WIDE = {"intermediate_size": 33, "moe_intermediate_size": INTERMEDIATE, "head_dim": 16}
DEEPSEEK = {
    **WIDE,
    "head_dim": 8,
    "n_routed_experts": EXPERTS,
    "first_k_dense_replace": 0,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("Qwen3MoeConfig", {**WIDE, "num_experts": EXPERTS, "norm_topk_prob": True}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {**WIDE, "num_experts": EXPERTS, "shared_expert_intermediate_size": 21},
    ),
    "mixtral": (
        "MixtralConfig",
        {"head_dim": 16, "intermediate_size": INTERMEDIATE, "num_local_experts": EXPERTS},
    ),
    "olmoe": (
        "OlmoeConfig",
        {"num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": INTERMEDIATE, "num_experts": EXPERTS},
    ),
    "deepseek_v2": ("DeepseekV2Config", {**DEEPSEEK, "topk_method": "greedy", "routed_scaling_factor": 1.5}),
    "deepseek_v3": ("DeepseekV3Config", {**DEEPSEEK, "routed_scaling_factor": 2.5, "norm_topk_prob": True}),
    "glm4_moe": ("Glm4MoeConfig", {**DEEPSEEK, "head_dim": 16, "partial_rotary_factor": 0.5}),
    "gpt_oss": (
        "GptOssConfig",
        {
            "head_dim": 16,
            "intermediate_size": INTERMEDIATE,
            "num_local_experts": EXPERTS,
            "layer_types": ["full_attention", "sliding_attention"],
            "sliding_window": 8,
        },
    ),
}
"""Name of the config class, and what it has beside :data:`COMMON`."""

SPREAD = 2.0
"""Of gate and up over all tokens: few gates of gpt-oss reach its limit, where rounding decides about a gradient."""

EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)


def config_of(family: str, **others: Any) -> Any:
    name, fields = FAMILIES[family]
    return getattr(transformers, name)(**{**COMMON, **fields, **others})


def eager_model(family: str, seed: int = 0, **fields: Any) -> Any:
    """A bfloat16 model on the eager experts, whose values are large enough for experts to matter."""
    torch.manual_seed(seed)  # for what is left as it was made
    model = transformers.AutoModelForCausalLM.from_config(
        config_of(family, **fields), dtype=torch.bfloat16, experts_implementation="eager"
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or name.endswith("bias"):
                spread = SPREAD * parameter.shape[-1] ** -0.5 if "experts" in name and parameter.dim() == 3 else 0.3
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    return model.train(False)


def on_jitmoe(model: nn.Module) -> Any:
    """A copy of the model that runs its experts on jitmoe."""
    copied: Any = copy.deepcopy(model)
    copied.set_experts_implementation("jitmoe")
    return copied


def experts_of(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "_apply_gate")}


def tokens(rows: int = 2, length: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def freeze_experts(model: nn.Module) -> None:
    for module in experts_of(model).values():
        module.requires_grad_(False)


def routing_of(model: Any, run: Callable[[Any], Any]) -> tuple[Any, list[Tensor]]:
    """What ``run(model)`` returns, and the experts that each layer chose for each token."""
    chosen: list[Tensor] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, args: chosen.append(args[1].sort(-1).values))
        for module in experts_of(model).values()
    ]
    try:
        return run(model), chosen
    finally:
        for hook in hooks:
            hook.remove()


def seeds_with_same_routing(models: Sequence[Any], batch_of: Callable[[int], dict[str, Tensor]]) -> Iterator[int]:
    """Seeds of batches for which all models choose the same experts.

    Where a token stands between two experts, rounding decides, and the results have nothing to do with each other.
    """
    for seed in range(100):
        with torch.no_grad():
            first, *rest = (routing_of(model, lambda model: model(**batch_of(seed)))[1] for model in models)  # noqa: B023
        if all(all(map(torch.equal, first, chosen)) for chosen in rest):
            yield seed
    raise AssertionError("too few of 100 seeds give the same routing")
