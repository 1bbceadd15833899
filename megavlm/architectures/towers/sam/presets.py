"""Published SAM towers: one row each, by the name that a recipe calls them."""

from __future__ import annotations

from typing import Any

KINDS: dict[str, dict[str, Any]] = {"sam_vit": {}}

_B: dict[str, Any] = {
    "image_size": 1024, "patch_size": 16, "hidden_size": 768, "num_layers": 12, "num_attention_heads": 12,
    "ffn_hidden_size": 3072, "window_size": 14, "global_layers": (2, 5, 8, 11), "neck_size": 256,
}  # fmt: skip
SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    # facebook/sam-vit-base. Vary's convolutions make 16 x 16 features of its map.
    "sam_vit_b_1024": ("sam_vit", {**_B, "output_grid": 16}),
    # deepseek-community/deepseek-vl-7b-{base,chat}: 24 x 24, and a second neck for the first global layer's map.
    "deepseek_vl_sam_b_1024": ("sam_vit", {**_B, "output_grid": 24, "second_neck_layer": 2}),
}
