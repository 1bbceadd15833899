"""Published picture tokenisers: one row each, by the name that a recipe calls them."""

from __future__ import annotations

from typing import Any

SIZES: dict[str, dict[str, Any]] = {
    # ``ChameleonVQVAEConfig`` of Transformers, which facebook/chameleon-{7b,30b} are.
    "chameleon_vq_gan": {
        "image_size": 512, "base_width": 128, "width_multipliers": (1, 1, 2, 2, 4), "blocks_per_level": 2,
        "latent_width": 256, "code_width": 256, "num_codes": 8192,
    },
}  # fmt: skip
