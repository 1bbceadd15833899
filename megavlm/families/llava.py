"""LLaVA as Transformers has it: CLIP or SigLIP, two linear layers, and a language model of any kind that it has."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from megavlm.architectures.connectors.mlp.tables import LLAVA_PROJECTOR
from megavlm.architectures.towers.vit.tables import TRANSFORMERS_VISION
from megavlm.config.schema import ModelConfig
from megavlm.data.media import plan_of
from megavlm.families.common import expect, need
from megavlm.families.family import Constants, Family, Tower, Tree, config_file
from megavlm.families.llama import LLAMA
from megavlm.families.preprocessor import image_branch, llava_processor, normalisation
from megavlm.families.text import no_half, text_branch, text_config, text_kind, text_table
from megavlm.families.towers import transformers_vision, transformers_vision_config
from megavlm.families.vit import no_llava_tower
from megavlm.weights.rules import Table
from megavlm.weights.source import CONFIG, Source


class LlavaFamily(Family):
    """``LlavaForConditionalGeneration``."""

    name = "llava"
    title = "LLaVA (LlavaForConditionalGeneration)"
    # As its data asks (llava_v1_5_mix665k); what the numbers count: issue 606 of haotian-liu/LLaVA.
    finds = "Please provide the bounding box coordinate of the region this sentence describes: {thing}"
    box_plane = True
    parts = ("vision", "connector", "language")
    architectures: ClassVar[Mapping[str, tuple[str, ...]]] = {"vision": ("vit",), "language": ("decoder",)}
    styles: ClassVar = {
        # As published on the hub, and read by every version of Transformers.
        "hub": {
            "tower": "vision_tower.vision_model.",
            "projector": "multi_modal_projector.",
            "model": "language_model.model.",
            "head": "language_model.lm_head.",
        },
        # As Transformers 5 writes it.
        "transformers5": {
            "tower": "vision_tower.",
            "projector": "multi_modal_projector.",
            "model": "language_model.model.",
            "head": "language_model.lm_head.",
        },
        # Names of the modules since Transformers 4.52.
        "modules": {
            "tower": "model.vision_tower.vision_model.",
            "projector": "model.multi_modal_projector.",
            "model": "model.language_model.",
            "head": "lm_head.",
        },
        "modules5": {
            "tower": "model.vision_tower.",
            "projector": "model.multi_modal_projector.",
            "model": "model.language_model.",
            "head": "lm_head.",
        },
    }

    modules = "modules5"
    preprocesses = True
    own_rotary = own_norms = True

    def detect(self, source: Source) -> bool:
        """By ``model_type``, which LLaVA's own code has as well, without ``text_config``."""
        config = source.config
        return config.get("model_type") == "llava" and not any(key.startswith("mm_") for key in config)

    def probe(self, style: str) -> str:
        """Return the name of the patch embedding."""
        return self.styles[style]["tower"] + "embeddings.patch_embedding.weight"

    def branches(self, source: Source) -> Tree:
        """Return all three branches."""
        config, where = source.config, config_file(source)
        expect(config, where, projector_hidden_act="gelu", multimodal_projector_bias=True)
        vision = transformers_vision(*self.tower_of(config, source.directory), where)
        # Without a class token there is nothing in front of the patches that "default" may drop.
        strategy = "default" if vision["class_token"] else "full"
        expect({"vision_feature_select_strategy": config.get("vision_feature_select_strategy", "default")}, where,
               vision_feature_select_strategy=strategy)  # fmt: skip
        vision |= normalisation(source, vision["image_size"])
        head = self.styles[self.style_of(source)]["head"]
        language = text_branch(source, need(config, "text_config", where), head, where)
        image = image_branch(source, vision["image_size"], clip=vision["class_token"])
        return {"vision": vision, "connector": {"preset": "mlp2x_gelu"}, "language": language, "image": image}

    def tables(self, model: ModelConfig, style: str) -> Sequence[Table]:
        """Return the three tables."""
        names = self.styles[style]
        return [
            dataclasses.replace(TRANSFORMERS_VISION, prefix=names["tower"]),
            dataclasses.replace(LLAVA_PROJECTOR, prefix=names["projector"]),
            text_table(model.language, model=names["model"], head=names["head"]),
        ]

    def config(self, model: ModelConfig, tokens: Mapping[str, int]) -> Tree:
        """Return a LLaVA configuration whose tower ends with the layer whose features are taken."""
        image = tokens.get("image", model.language.vocab_size - 1)
        return {
            "architectures": ["LlavaForConditionalGeneration"],
            "image_seq_length": model.tokens_per_view,
            "image_token_id": image,
            "image_token_index": image,
            "model_type": "llava",
            "multimodal_projector_bias": True,
            "projector_hidden_act": "gelu",
            "text_config": text_config(model.language),
            "tie_word_embeddings": model.language.tie_word_embeddings,
            "vision_config": transformers_vision_config(model.vision),
            "vision_feature_layer": list(model.vision.feature_layers or ()) or -1,
            "vision_feature_select_strategy": "default" if model.vision.class_token else "full",
        }

    def tower_of(self, config: Mapping[str, Any], directory: Path) -> Tower:
        """Both lie in the configuration."""
        where = str(directory / CONFIG)
        return need(config, "vision_config", where), config.get("vision_feature_layer", -2)

    def with_tower(self, config: Tree, vision_config: Tree, layer: Any) -> Tree:
        """Put both into it."""
        return {**config, "vision_config": vision_config, "vision_feature_layer": layer}

    def constants(self, model: ModelConfig, style: str) -> Constants:
        """Return the norm behind the tower's layers, which LLaVA has and does not use."""
        prefix, shape = self.styles[style]["tower"] + "post_layernorm.", (model.vision.hidden_size,)
        return {prefix + "weight": (shape, 1.0), prefix + "bias": (shape, 0.0)}

    def processor(self, model: ModelConfig, image_token: str) -> Tree:
        """Return what LLaVA's processor needs."""
        return llava_processor(model.vision, image_token)

    def refuses(self, model: ModelConfig) -> str | None:
        """Tower, connector and language model must be LLaVA's kinds."""
        if model.connector.preset != "mlp2x_gelu":
            return f"the connector is {model.connector.preset}, LLaVA's is mlp2x_gelu"
        if not plan_of(model).fixed:
            return f"the image plan is {model.image.kind}, LLaVA-1.5 has one view of a picture"
        return no_llava_tower(model.vision) or no_half(model.language)

    def templates(self, source: Source) -> tuple[str, ...]:
        """Its own ``chat_template``, else the form of its language model; LLaVA-1.5's is Vicuna v1."""
        kind = text_kind(source.config.get("text_config")) or LLAMA
        return ("checkpoint", *kind.templates)

    def tokens(self, source: Source) -> dict[str, int]:
        """``image_token_index``, or its newer name."""
        token = source.config.get("image_token_id", source.config.get("image_token_index"))
        return {"image": token} if isinstance(token, int) else {}
