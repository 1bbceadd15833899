"""Published towers of this kind, by the name that a recipe calls them."""

from __future__ import annotations

from typing import Any

KINDS: dict[str, dict[str, Any]] = {"mllama_vit": {"layernorm_epsilon": 1e-5}}
"""What is the same in all."""

SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    # meta-llama/Llama-3.2-{11B,90B}-Vision-Instruct; the base models' tiles have 448 pixels.
    "mllama_vit_h_560": (
        "mllama_vit",
        {
            "image_size": 560, "patch_size": 14, "hidden_size": 1280, "num_layers": 32, "num_global_layers": 8,
            "num_attention_heads": 16, "ffn_hidden_size": 5120, "intermediate_layers": (3, 7, 15, 23, 30),
        },
    ),
}  # fmt: skip
"""Kind, and sizes in the public ``config.json``."""
