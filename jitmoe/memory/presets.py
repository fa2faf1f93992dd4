"""Published sizes of large models, under the names of their ``config.json``, for estimates without a download."""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "deepseek-v3": {
        "model_type": "deepseek_v3",
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 61,
        "first_k_dense_replace": 3,
        "moe_layer_freq": 1,
    },
    "qwen3-235b": {
        "model_type": "qwen3_moe",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 94,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "kimi-k2": {
        "model_type": "kimi_k2",
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 384,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 61,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
    },
}
"""DeepSeek-V3 (Liu et al. 2024), Qwen3-235B-A22B (Yang et al. 2025) and Kimi-K2 (Moonshot 2025), as published."""

DENSE_PARAMETERS = {"deepseek-v3": 17.1e9, "qwen3-235b": 8.0e9, "kimi-k2": 11.7e9}
"""Parameters beside the routed experts, which every token passes: the published totals (671, 235.1 and 1026.4 billion)
less the routed experts."""
