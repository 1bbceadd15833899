"""CLIP and SigLIP towers as Transformers writes them: a whole dual encoder, or its vision half."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from megavlm.architectures.towers.vit.tables import TRANSFORMERS_VISION
from megavlm.config.schema import ModelConfig, VisionConfig
from megavlm.families.family import Constants, Family, Tree, config_file
from megavlm.families.preprocessor import normalisation
from megavlm.families.towers import LAST_HIDDEN_STATE, transformers_vision, transformers_vision_config
from megavlm.weights.rules import Aside, Table
from megavlm.weights.source import Source

OTHER_HALF = Aside(
    r"{top}text_model\..*|{top}(visual|text)_projection\..*|{top}logit_(scale|bias)",
    "text tower and projections",
    carried=True,
)


class ClipFamily(Family):
    """OpenAI's and LAION's CLIP."""

    name = "clip"
    title = "CLIP vision towers (OpenAI, LAION) in Transformers' layout"
    parts = ("vision",)
    architectures: ClassVar[Mapping[str, tuple[str, ...]]] = {"vision": ("vit",)}
    preprocesses = True
    styles: ClassVar = {"vision_model.": {}, "": {}}
    kinds: ClassVar[tuple[str, ...]] = ("clip", "clip_vision_model")

    def detect(self, source: Source) -> bool:
        """By ``model_type``."""
        return source.config.get("model_type") in self.kinds

    def probe(self, style: str) -> str:
        """Return the name of the patch embedding."""
        return style + "embeddings.patch_embedding.weight"

    def branches(self, source: Source) -> Tree:
        """Return the vision branch."""
        half = source.config.get("vision_config", source.config)
        vision = transformers_vision(half, source.feature_layer, config_file(source))
        return {"vision": vision | normalisation(source, vision["image_size"])}

    def tables(self, model: ModelConfig, style: str) -> Sequence[Table]:
        """Return the table."""
        aside = (*TRANSFORMERS_VISION.aside, OTHER_HALF)
        return [dataclasses.replace(TRANSFORMERS_VISION, prefix=style, aside=aside, names={"top": ""})]

    def config(self, model: ModelConfig, tokens: Mapping[str, int]) -> Tree:
        """Return the configuration of a vision half whose last layer is the last that runs."""
        config = transformers_vision_config(model.vision)
        return {**config, "architectures": ["CLIPVisionModel" if model.vision.class_token else "SiglipVisionModel"]}

    def constants(self, model: ModelConfig, style: str) -> Constants:
        """Return the norm behind the layers, where the features are taken in front of it."""
        if model.vision.post_layernorm:
            return {}
        prefix, shape = style + "post_layernorm.", (model.vision.hidden_size,)
        return {prefix + "weight": (shape, 1.0), prefix + "bias": (shape, 0.0)}

    def feature_layer(self, model: ModelConfig) -> Any:
        """Return the last layer, with which the tower ends here, or several."""
        if model.vision.feature_layers is not None:
            return list(model.vision.feature_layers)
        return LAST_HIDDEN_STATE if model.vision.post_layernorm else -1

    def refuses(self, model: ModelConfig) -> str | None:
        """A class token and a first norm make a CLIP."""
        return no_transformers_tower(model.vision, clip=self.name == "clip")


class SiglipFamily(ClipFamily):
    """SigLIP."""

    name = "siglip"
    title = "SigLIP vision towers in Transformers' layout"
    kinds = ("siglip", "siglip_vision_model")


def no_llava_tower(vision: VisionConfig) -> str | None:
    """Return why no LLaVA can have a tower, or None."""
    if vision.post_layernorm:
        return "the features are taken behind the tower's last norm, which no LLaVA does"
    return no_transformers_tower(vision)


def no_transformers_tower(vision: VisionConfig, *, clip: bool | None = None) -> str | None:
    """Return why a tower is neither CLIP's nor SigLIP's (or not the one asked for), or None."""
    if vision.s2_scales is not None:
        return "the tower sees pictures at several sizes (model.vision.s2_scales), for which this layout has no word"
    if vision.positional_grid != vision.image_size // vision.patch_size:
        return f"the tower's positional table is {vision.positional_grid} wide, for images of another size"
    if (has := beside_plain(vision)) is not None:
        return f"the vision tower is neither CLIP's nor SigLIP's: it has {has}"
    if not plain_layers(vision):
        return "the vision tower is neither CLIP's nor SigLIP's: its layers are InternViT's"
    is_clip = vision.class_token and not vision.conv_bias and vision.pre_layernorm and not vision.post_layernorm
    is_siglip = vision.conv_bias and not vision.class_token and not vision.pre_layernorm
    if clip is None and not (is_clip or is_siglip):
        return "the vision tower is neither CLIP's nor SigLIP's"
    if clip is True and not is_clip:
        return "the vision tower is not CLIP's"
    if clip is False and not is_siglip:
        return "the vision tower is not SigLIP's"
    return None


def plain_layers(vision: VisionConfig) -> bool:
    """Whether a tower's layers are those of the first ViTs: LayerNorms, biases everywhere, no scale, no other norm."""
    other = vision.normalization != "LayerNorm" or vision.qk_norm is not None or beside_plain(vision) is not None
    return vision.add_qkv_bias and not vision.layer_scale and not other


_LATER = {
    "gated_mlp": "a gate in the MLP", "mlp_norm": "a norm inside the MLP", "attention_norm": "a norm inside attention",
    "register_tokens": "register tokens", "rotary_base": "rotary angles", "positional_antialias": "a table that is"
    " interpolated with a filter",
}  # fmt: skip


def beside_plain(vision: VisionConfig) -> str | None:
    """Return what a tower has that DINOv2 and EVA02 brought, or None."""
    if not vision.key_bias:
        return "keys without a bias (model.vision.key_bias)"
    return next((f"{text} (model.vision.{key})" for key, text in _LATER.items() if getattr(vision, key)), None)
