"""Published ConvNeXt towers: one row each, by the name that a recipe calls them."""

from __future__ import annotations

from typing import Any

KINDS: dict[str, dict[str, Any]] = {"convnext": {}}

SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    # laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup (open_clip: convnext_large_d_320), at MiniGemini's
    # 768 pixels, and all four of its stages; without the head behind them.
    "openclip_convnext_l_d_768": (
        "convnext",
        {"image_size": 768, "depths": (3, 3, 27, 3), "widths": (192, 384, 768, 1536), "feature_stages": (1, 2, 3, 4)},
    ),
}
