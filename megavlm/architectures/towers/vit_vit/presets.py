"""Published pairs: one row each, by the name that a recipe calls them."""

from __future__ import annotations

from typing import Any

from megavlm.architectures.towers.vit.presets import KINDS as VIT
from megavlm.architectures.towers.vit.presets import SIZES as VIT_SIZES


def _high(values: dict[str, Any]) -> dict[str, Any]:
    return {f"high_{key}": value for key, value in values.items()}


_SIGLIP = {**VIT["siglip_vit"], "post_layernorm": False}
_DINOV2 = {**VIT["dinov2_vit"], "class_position": False}

KINDS: dict[str, dict[str, Any]] = {"dinov2_siglip": {**_DINOV2, **_high(_SIGLIP)}}

SIZES: dict[str, dict[str, Any]] = {
    # han1997/cobra: timm's vit_large_patch14_reg4_dinov2.lvd142m, whose table is of 518 pixels, and
    # vit_so400m_patch14_siglip_384, both at 384 pixels and without their last layers.
    "cobra_dinov2_siglip": {
        **VIT_SIZES["dinov2_reg4_large_14"][0]._asdict(),
        **_high({**VIT_SIZES["siglip_so400m_14_384"][0]._asdict(), "num_layers": 26}),
        **KINDS["dinov2_siglip"],
    },
}
