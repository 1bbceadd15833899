"""Published pairs: one row each, by the name that a recipe calls them."""

from __future__ import annotations

from typing import Any

from megavlm.architectures.towers.sam.presets import SIZES as SAM
from megavlm.architectures.towers.vit.presets import KINDS as VIT
from megavlm.architectures.towers.vit.presets import SIZES as VIT_SIZES

_SIZE, _VALUES = VIT_SIZES["siglip_large_16_384"]
_CLIP, _CLIP_VALUES = VIT_SIZES["clip_vit_l_14_224"]

KINDS: dict[str, dict[str, Any]] = {"siglip_sam": VIT["siglip_vit"], "clip_sam": VIT["clip_vit"]}

SIZES: dict[str, dict[str, Any]] = {
    # deepseek-community/deepseek-vl-7b-{base,chat}: SigLIP-L with erf GELU, as DeepSeek-VL-1.3B's.
    "deepseek_vl_hybrid": {
        **_SIZE._asdict(),
        **_VALUES,
        "activation": "gelu",
        **{f"high_{key}": value for key, value in SAM["deepseek_vl_sam_b_1024"][1].items()},
    },
    # Ucas-HaoranWei/Vary-toy @ c6e40597, vary/model/vary_toy_qwen1_8.py: openai/clip-vit-large-patch14, the features of
    # its last layer but one, and sam.py beside it; 16 x 16 features of either.
    "vary_clip_sam": {
        **_CLIP._asdict(),
        **_CLIP_VALUES,
        **{f"high_{key}": value for key, value in SAM["sam_vit_b_1024"][1].items()},
    },
}
