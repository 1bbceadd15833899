"""Published pairs: one row each, by the name that a recipe calls them."""

from __future__ import annotations

from typing import Any

from megavlm.architectures.towers.vit.presets import KINDS as VIT
from megavlm.architectures.towers.vit.presets import SIZES as VIT_SIZES


def _second(values: dict[str, Any]) -> dict[str, Any]:
    return {f"high_{key}": value for key, value in values.items()}


_SIGLIP = {**VIT["siglip_vit"], "post_layernorm": False}
_DINOV2 = {**VIT["dinov2_vit"], "class_position": False}
_TABLES = {"feature_table": True, "high_feature_table": True}

KINDS: dict[str, dict[str, Any]] = {
    # CogAgent's, where what the second one makes goes to the language model's layers: that the model says (high_to).
    "eva02_pair": {**VIT["eva02_e_vit"], **_second(VIT["eva02_vit"]), **_TABLES},
    "dinov2_siglip": {**_DINOV2, **_second(_SIGLIP)},
}

_LOW, _HIGH = VIT_SIZES["eva02_clip_e_14_224"], VIT_SIZES["eva02_clip_l_14_336"]

SIZES: dict[str, dict[str, Any]] = {
    # THUDM/cogagent-chat-hf: EVA02-CLIP-E at 224, and EVA02-CLIP-L at 1120, the last layer of each left out.
    "cogagent_eva02_pair": {
        **_LOW[0]._asdict(),
        **_LOW[1],
        **_second(_HIGH[0]._asdict() | _HIGH[1] | {"image_size": 1120, "positional_grid": 80}),
        **_TABLES,
    },
    # han1997/cobra: timm's vit_large_patch14_reg4_dinov2.lvd142m, whose table is of 518 pixels, and
    # vit_so400m_patch14_siglip_384, both at 384 pixels and without their last layers.
    "cobra_dinov2_siglip": {
        **VIT_SIZES["dinov2_reg4_large_14"][0]._asdict(),
        **_second({**VIT_SIZES["siglip_so400m_14_384"][0]._asdict(), "num_layers": 26}),
        **KINDS["dinov2_siglip"],
    },
}
"""Sizes, and what else is not a default."""
