"""Published pairs: one row each, by the name that a recipe calls them."""

from __future__ import annotations

from typing import Any

from megavlm.architectures.towers.sam.presets import SIZES as SAM
from megavlm.architectures.towers.vit.presets import KINDS as VIT
from megavlm.architectures.towers.vit.presets import SIZES as VIT_SIZES

_SIZE, _VALUES = VIT_SIZES["siglip_large_16_384"]

KINDS: dict[str, dict[str, Any]] = {"siglip_sam": VIT["siglip_vit"]}

SIZES: dict[str, dict[str, Any]] = {
    # deepseek-community/deepseek-vl-7b-{base,chat}: SigLIP-L with erf GELU, as DeepSeek-VL-1.3B's.
    "deepseek_vl_hybrid": {
        **_SIZE._asdict(),
        **_VALUES,
        "activation": "gelu",
        **{f"high_{key}": value for key, value in SAM["deepseek_vl_sam_b_1024"][1].items()},
    },
}
