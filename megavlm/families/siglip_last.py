"""What families share that Transformers builds of a SigLIP's last layer and a language model.

PaliGemma, Gemma 3, DeepSeek-VL, Idefics3: ``config.json`` has a ``vision_config`` beside the ``model_type`` that the
family is called by, and the features are those behind the tower's norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megavlm.config.schema import VisionConfig
from megavlm.families.common import expect, need
from megavlm.families.family import Family, Tower, Tree
from megavlm.families.towers import LAST_HIDDEN_STATE, transformers_vision
from megavlm.families.vit import no_transformers_tower
from megavlm.weights.source import CONFIG, Source


class SiglipLastFamily(Family):
    """A family of Transformers' own layout, with such a tower."""

    def detect(self, source: Source) -> bool:
        """By ``model_type``."""
        return source.config.get("model_type") == self.name

    def probe(self, style: str) -> str:
        """Return the name of the patch embedding."""
        return self.styles[style]["tower"] + "embeddings.patch_embedding.weight"

    def tower_of(self, config: Mapping[str, Any], directory: Path) -> Tower | None:
        """The last layer's features, behind the norm."""
        return need(config, "vision_config", str(directory / CONFIG)), LAST_HIDDEN_STATE

    def with_tower(self, config: Tree, vision_config: Tree, layer: Any) -> Tree:
        """Put it into the configuration."""
        return {**config, "vision_config": vision_config}


def siglip_last(config: Mapping[str, Any], layer: Any, where: str) -> Tree:
    """Return ``model.vision`` of a SigLIP whose last layer's features are taken, behind the norm.

    Raises:
        UserError: it is another tower, or has a value that is not known.
    """
    expect(config, where, model_type="siglip_vision_model", vision_use_head=False)
    return transformers_vision({**config, "model_type": "siglip_vision_model"}, layer, where)


def no_siglip_last(vision: VisionConfig) -> str | None:
    """Return why a tower is no such SigLIP, or None."""
    if not vision.post_layernorm or vision.feature_layers is not None:
        return "the features are not those behind the tower's last norm alone"
    return no_transformers_tower(vision, clip=False)
