"""Published pairs: one row each, by the name that a recipe calls them."""

from __future__ import annotations

from typing import Any

from megavlm.architectures.towers.convnext.presets import SIZES as CONVNEXT
from megavlm.architectures.towers.vit.presets import KINDS as VIT
from megavlm.architectures.towers.vit.presets import SIZES as VIT_SIZES

_SIZE, _VALUES = VIT_SIZES["clip_vit_l_14_336"]

KINDS: dict[str, dict[str, Any]] = {"clip_convnext": {**VIT["clip_vit"], "low_from": "high"}}

SIZES: dict[str, dict[str, Any]] = {
    # MiniGemini: OpenAI's CLIP, and OpenCLIP's ConvNeXt, of whose pixels CLIP's are made.
    "minigemini_clip_convnext": {
        **_SIZE._asdict(),
        **_VALUES,
        "low_from": "high",
        **{f"high_{key}": value for key, value in CONVNEXT["openclip_convnext_l_d_768"][1].items()},
    },
}
