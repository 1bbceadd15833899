"""Short trainings of tiny models with experts, which save and load; started with ``ranks.run``."""

from __future__ import annotations

from typing import Any

from megavlm.parallel.device import prepare_device

prepare_device()

import run_cases  # noqa: E402

VOCABULARY = 512
_SIZES: dict[str, Any] = {
    "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "num_query_groups": 4, "kv_channels": 16,
    "vocab_size": VOCABULARY, "num_layers": 4, "num_moe_experts": 4, "moe_ffn_hidden_size": 40,
}  # fmt: skip
STACKED: dict[str, Any] = {**_SIZES, "moe_aux_loss_coeff": 0.02}
"""Experts in all layers."""
BIASED: dict[str, Any] = _SIZES | {
    "moe_layer_freq": [0, 1, 1, 1], "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True,
    "moe_router_num_groups": 2, "moe_router_group_topk": 1, "moe_router_bias_update_rate": 0.01,
    "moe_shared_expert_intermediate_size": 48,
}  # fmt: skip
"""The first layer dense, the others with shared experts, groups and biases."""


def train(language: dict[str, Any], layout: dict[str, Any], root: str, load: str | None) -> list[float]:
    """Train two steps and save, or load and save at once; return the losses."""
    model = {
        "preset": "tiny",
        "vision": {"image_size": 32, "hidden_size": 48, "num_layers": 2, "ffn_hidden_size": 96}
        | {"num_attention_heads": 4, "positional_grid": 2},
        "connector": {"num_queries": 4, "head_dim": 16},
        "language": language,
    }
    recipe = {"model": model, "parallel": {"transformer_impl": "torch", **layout}, "training": {"precision": "bf16"}}
    return run_cases.train(recipe, root, load, save_at=(2,))
