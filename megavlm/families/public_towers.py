"""Public towers, by the names that LLaVA's ``mm_vision_tower`` gives them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megavlm.families.towers import transformers_vision
from megavlm.weights.source import CONFIG

Tree = dict[str, Any]


def _clip(width: int, layers: int, heads: int, image: int, patch: int, **more: Any) -> Tree:
    return {
        "model_type": "clip_vision_model", "hidden_size": width, "intermediate_size": 4 * width, "image_size": image,
        "num_hidden_layers": layers, "num_attention_heads": heads, "patch_size": patch, "hidden_act": "quick_gelu",
    } | more  # fmt: skip


def _siglip(width: int, mlp: int, layers: int, heads: int, image: int, patch: int) -> Tree:
    return _clip(width, layers, heads, image, patch, model_type="siglip_vision_model", intermediate_size=mlp) | {
        "hidden_act": "gelu_pytorch_tanh", "vision_use_head": True,
    }  # fmt: skip


TOWERS: dict[str, Tree] = {
    "openai/clip-vit-large-patch14-336": _clip(1024, 24, 16, 336, 14),
    "openai/clip-vit-large-patch14": _clip(1024, 24, 16, 224, 14),
    "openai/clip-vit-base-patch16": _clip(768, 12, 12, 224, 16),
    "openai/clip-vit-base-patch32": _clip(768, 12, 12, 224, 32),
    "laion/CLIP-ViT-L-14-laion2B-s32B-b82K": _clip(1024, 24, 16, 224, 14, hidden_act="gelu"),
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": _clip(1280, 32, 16, 224, 14, hidden_act="gelu"),
    "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k": _clip(1664, 48, 16, 224, 14, hidden_act="gelu", intermediate_size=8192),
    "google/siglip-so400m-patch14-384": _siglip(1152, 4304, 27, 16, 384, 14),
    "google/siglip-so400m-patch14-224": _siglip(1152, 4304, 27, 16, 224, 14),
    "google/siglip-large-patch16-384": _siglip(1024, 4096, 24, 16, 384, 16),
    "google/siglip-base-patch16-224": _siglip(768, 3072, 12, 12, 224, 16),
    "google/siglip-large-patch16-256": _siglip(1024, 4096, 24, 16, 256, 16),
    "google/siglip-base-patch16-384": _siglip(768, 3072, 12, 12, 384, 16),
    "google/siglip-base-patch16-512": _siglip(768, 3072, 12, 12, 512, 16),
    # SigLIP 2 of one resolution: those of 14 pixels a patch, and some others, have the shapes above.
    "google/siglip2-base-patch16-224": _siglip(768, 3072, 12, 12, 224, 16),
    "google/siglip2-base-patch16-384": _siglip(768, 3072, 12, 12, 384, 16),
    "google/siglip2-base-patch16-512": _siglip(768, 3072, 12, 12, 512, 16),
    "google/siglip2-large-patch16-256": _siglip(1024, 4096, 24, 16, 256, 16),
    "google/siglip2-large-patch16-384": _siglip(1024, 4096, 24, 16, 384, 16),
    "google/siglip2-large-patch16-512": _siglip(1024, 4096, 24, 16, 512, 16),
    "google/siglip2-so400m-patch14-224": _siglip(1152, 4304, 27, 16, 224, 14),
    "google/siglip2-so400m-patch14-384": _siglip(1152, 4304, 27, 16, 384, 14),
    "google/siglip2-so400m-patch16-256": _siglip(1152, 4304, 27, 16, 256, 16),
    "google/siglip2-so400m-patch16-384": _siglip(1152, 4304, 27, 16, 384, 16),
    "google/siglip2-so400m-patch16-512": _siglip(1152, 4304, 27, 16, 512, 16),
    "google/siglip2-giant-opt-patch16-256": _siglip(1536, 6144, 40, 16, 256, 16),
    "google/siglip2-giant-opt-patch16-384": _siglip(1536, 6144, 40, 16, 384, 16),
}
"""Shapes of public towers, by the name that ``mm_vision_tower`` gives them."""


def known_tower(name: str) -> Tree | None:
    """Return the shape of a public tower, by its name with or without an owner; None for one that is not known."""
    return {full.split("/")[1]: tree for full, tree in TOWERS.items()}.get(Path(name).name)


def public_name(vision_config: Mapping[str, Any], layer: Any) -> tuple[str, Any] | None:
    """Return the name of the public tower of which a tower is, and whose output is taken there; None for no such one.

    Args:
        vision_config: a vision configuration of Transformers; layers behind the one that is taken may be missing.
        layer: whose output is taken, or several.
    """
    wanted = transformers_vision(vision_config, layer, CONFIG)
    taken = wanted["feature_layers"] or [wanted["num_layers"]]
    for name, known in TOWERS.items():
        layers = known["num_hidden_layers"]
        there = [one - layers - 1 for one in taken]
        own = there[0] if len(there) == 1 else there
        if max(taken) <= layers and transformers_vision(known, own, CONFIG) == wanted:
            return name, own
    return None
