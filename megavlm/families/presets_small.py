"""Presets of small systems on CLIP or SigLIP whose layouts are their own; :mod:`megavlm.families.presets` has the others.

Names as their authors have them, sizes from the public ``config.json`` files.
"""

from __future__ import annotations

from typing import Any

from megavlm.config.architecture import MODELS

CLIP: dict[str, Any] = {"preset": "clip_vit_l_14_336"}
"""CLIP-L/336 without its last layer."""
SIGLIP: dict[str, Any] = {"preset": "siglip_so400m_14_384", "num_layers": 26, "post_layernorm": False}
"""SigLIP-SO400M/384 without its last layer."""

# tinyllava/TinyLLaVA-1.5B, -2.0B, -3.1B: the language model, and the template. The factory leaves out SigLIP's first patch.
_TINYLLAVA = {
    "1_5b": ("tinyllama_1_1b", "vicuna_v1"),
    "2_0b": ("stablelm_2_1_6b", "vicuna_v1_endoftext"),
    "3_1b": ("phi_2", "vicuna_v1_endoftext"),
}


def register() -> None:
    """Register them."""
    for size, (language, template) in _TINYLLAVA.items():
        MODELS.register(
            f"tinyllava_{size}",
            vision=SIGLIP,
            connector={"preset": "mlp2x_gelu", "drop_first_feature": True},
            language={"preset": language},
            image={"kind": "squash"},
            template=template,
        )
