"""LLaVA-1.6 (NeXT) and LLaVA-OneVision as Transformers has them: LLaVA, whose pictures are cut to tiles.

A learned vector, ``image_newline``, ends each row of a picture's features. Transformers:
``LlavaNextForConditionalGeneration``, ``LlavaOnevisionForConditionalGeneration``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from megavlm.architectures.connectors.mlp.tables import TILES_PROJECTOR
from megavlm.architectures.decoders.decoder.tables import LLAMA_LANGUAGE
from megavlm.architectures.towers.vit.tables import TRANSFORMERS_VISION
from megavlm.config.errors import UserError
from megavlm.config.schema import ModelConfig
from megavlm.data.media import plan_of
from megavlm.data.plans_tiles import AnyresMaxPlan, AnyresPlan
from megavlm.families.anyres import anyres_branch, aspect_of, trained_anyres
from megavlm.families.common import expect, need
from megavlm.families.decoders import llama_language
from megavlm.families.family import Tower, Tree, config_file
from megavlm.families.films import film_branch
from megavlm.families.llama import LLAMA, MISTRAL, QWEN2, no_llama
from megavlm.families.llava import LlavaFamily
from megavlm.families.preprocessor import llava_processor, normalisation
from megavlm.families.towers import transformers_vision
from megavlm.families.vit import no_llava_tower
from megavlm.weights.rules import Table
from megavlm.weights.source import Source

# What a config.json leaves out, as Transformers' classes have it.
_DEFAULTS: dict[str, Tree] = {
    "llama": LLAMA.defaults,
    "mistral": {**MISTRAL.defaults, "sliding_window": 4096},
    "qwen2": QWEN2.defaults,
}


def _with_newline(styles: Mapping[str, Mapping[str, str]]) -> dict[str, Mapping[str, str]]:
    """Return LLaVA's namings, with the newline vector's name in each."""
    return {
        style: {**names, "newline": "model.image_newline" if style.startswith("modules") else "image_newline"}
        for style, names in styles.items()
    }


class LlavaNextFamily(LlavaFamily):
    """``LlavaNextForConditionalGeneration``."""

    name = "llava_next"
    title = "LLaVA-1.6, LLaVA-NeXT (LlavaNextForConditionalGeneration)"
    styles: ClassVar = _with_newline(LlavaFamily.styles)
    own_rotary = own_norms = False
    plan: ClassVar[str] = "anyres"
    """Of its pictures."""
    default_strategy: ClassVar[str] = "default"
    """``vision_feature_select_strategy`` of a config.json that leaves it out."""

    def detect(self, source: Source) -> bool:
        """By ``model_type``."""
        return source.config.get("model_type") == self.name

    def branches(self, source: Source) -> Tree:
        """Return all three branches, and what becomes of pictures."""
        config, where = source.config, config_file(source)
        expect(config, where, projector_hidden_act="gelu", multimodal_projector_bias=True)
        expect(config, where, use_image_newline_parameter=True)
        tower, layer = self.tower_of(config, source.directory)
        vision = transformers_vision(tower, layer, where)
        _check_strategy(config, vision, self.default_strategy, where)
        vision |= normalisation(source, vision["image_size"])
        language = _language(source, self.styles[self.style_of(source)]["head"] + "weight")
        image = anyres_branch(source, vision["image_size"], self.plan)
        return {"vision": vision, "connector": {"preset": "mlp2x_gelu"}, "language": language, "image": image}

    def tables(self, model: ModelConfig, style: str) -> Sequence[Table]:
        """Return the three tables; the newline vector is the connector's."""
        names = self.styles[style]
        return [
            dataclasses.replace(TRANSFORMERS_VISION, prefix=names["tower"]),
            dataclasses.replace(TILES_PROJECTOR, prefix=names["projector"], names={"newline": names["newline"]}),
            dataclasses.replace(LLAMA_LANGUAGE, names={"model": names["model"], "head": names["head"]}),
        ]

    def config(self, model: ModelConfig, tokens: Mapping[str, int]) -> Tree:
        """Return a configuration whose tower ends with the layer whose features are taken."""
        own = {"architectures": ["LlavaNextForConditionalGeneration"], "model_type": self.name}
        return {**super().config(model, tokens), **own, "use_image_newline_parameter": True, **self.pictures_of(model)}

    def pictures_of(self, model: ModelConfig) -> Tree:
        """Return the resolutions, which the model's code reads as the processor's does."""
        plan = plan_of(model)
        assert isinstance(plan, AnyresPlan)
        return {"image_grid_pinpoints": [list(one) for one in plan.pinpoints]}

    def processor(self, model: ModelConfig, image_token: str) -> Tree:
        """Return what Transformers' processor needs to make slots of an image's token."""
        return {**llava_processor(model.vision, image_token), "processor_class": "LlavaNextProcessor"}

    def trained_pictures(self, model: ModelConfig, old: Mapping[str, Any]) -> Tree | None:
        """Pictures are cut to tiles."""
        return trained_anyres(model) if model.image.kind == self.plan else None

    def refuses(self, model: ModelConfig) -> str | None:
        """Tower, connector, language model and image plan must be the family's kinds."""
        if model.connector.preset != "mlp2x_gelu":
            return f"the connector is {model.connector.preset}, LLaVA's is mlp2x_gelu"
        if model.image.kind != self.plan:
            return f"the image plan is {model.image.kind}, that of {self.title} is {self.plan}"
        if model.image.fill not in (None, (0, 0, 0)):
            return f"pictures are padded with {model.image.fill} (model.image.fill); Transformers pads with black"
        try:
            plan_of(model)
        except UserError as error:
            return str(error)
        return no_llava_tower(model.vision) or no_llama(model.language)

    def templates(self, source: Source) -> tuple[str, ...]:
        """Its own ``chat_template``, else the form of its language model."""
        text = source.config.get("text_config")
        kind = text.get("model_type", "llama") if isinstance(text, dict) else "llama"
        rows = {"mistral": ("mistral",), "qwen2": ("qwen2",)}
        # Llama 3, and Yi with its ChatML, have Llama's names, and tokens of their own.
        return ("checkpoint", *rows.get(kind, ("llama_3", "chatml_direct", "vicuna_v1")))


class LlavaOnevisionFamily(LlavaNextFamily):
    """``LlavaOnevisionForConditionalGeneration``: anyres with a limit, and films of 196 tokens a frame."""

    name = "llava_onevision"
    title = "LLaVA-OneVision (LlavaOnevisionForConditionalGeneration)"
    plan = "anyres_max"
    film_plans: ClassVar[tuple[str, ...]] = ("llava_onevision",)
    default_strategy = "full"

    def branches(self, source: Source) -> Tree:
        """Return all three branches, and what becomes of pictures."""
        branches = super().branches(source)
        if branches["image"]:
            branches["image"]["max_tiles"] = aspect_of(source)
            branches["video"] = film_branch(source, branches["vision"], self.film_plans[0])
        return branches

    def tower_of(self, config: Mapping[str, Any], directory: Path) -> Tower:
        """Both lie in the configuration, whose defaults are others than LLaVA's."""
        tower, _ = super().tower_of(config, directory)
        return {"model_type": "siglip_vision_model", **tower}, config.get("vision_feature_layer", -1)

    def config(self, model: ModelConfig, tokens: Mapping[str, int]) -> Tree:
        """Return a configuration whose tower ends with the layer whose features are taken."""
        config = super().config(model, tokens)
        del config["image_seq_length"]
        config["architectures"] = ["LlavaOnevisionForConditionalGeneration"]
        video = {"video_token_index": tokens["video"]} if "video" in tokens else {}
        return {**config, **video}

    def pictures_of(self, model: ModelConfig) -> Tree:
        """Return the resolutions, and the limit of a picture's features."""
        plan = plan_of(model)
        assert isinstance(plan, AnyresMaxPlan)
        return {**super().pictures_of(model), "vision_aspect_ratio": f"anyres_max_{plan.max_tiles}"}

    def processor(self, model: ModelConfig, image_token: str) -> Tree:
        """Return what Transformers' processor needs to make slots of an image's token."""
        clip, views = model.vision.class_token, model.tokens_per_view
        return {
            # Its processor takes one token away where the tower has a class token that is dropped.
            "image_token": image_token, "num_image_tokens": views + int(clip),
            "processor_class": "LlavaOnevisionProcessor",
            "vision_aspect_ratio": self.pictures_of(model)["vision_aspect_ratio"],
            "vision_feature_select_strategy": "default" if clip else "full",
        }  # fmt: skip

    def tokens(self, source: Source) -> dict[str, int]:
        """``image_token_index`` and ``video_token_index``, or their newer names."""
        video = source.config.get("video_token_id", source.config.get("video_token_index"))
        return {**super().tokens(source), **({"video": video} if isinstance(video, int) else {})}


def _check_strategy(config: Mapping[str, Any], vision: Mapping[str, Any], default: str, where: str) -> None:
    """Check that what is taken of the tower's features is the patches.

    Raises:
        UserError: it is the class token too, or a patch is left out for one that is not there.
    """
    strategy = config.get("vision_feature_select_strategy") or default
    wanted = "default" if vision["class_token"] else "full"
    if strategy == wanted:
        return
    there = "with a class token, which would stand" if vision["class_token"] else "without a class token, and a patch"
    rest = "among the patches" if vision["class_token"] else "would be dropped for it"
    raise UserError(
        f"{where}: vision_feature_select_strategy is {strategy!r}, but the tower of vision_config is one {there} "
        f"{rest}; only {wanted!r} is supported with it"
    )


def _language(source: Source, head: str) -> Tree:
    """Return the language model's branch; Mistral without its window is a Llama.

    Raises:
        UserError: it is a model that is not known here, or has a window that has an effect.
    """
    config, where = source.config, config_file(source)
    text = dict(need(config, "text_config", where))
    kind = text.setdefault("model_type", "llama")
    text = {**_DEFAULTS.get(kind, {}), **text}
    if kind == "mistral":
        window, longest = text.get("sliding_window"), text["max_position_embeddings"]
        if window is not None and window < longest:
            raise UserError(
                f"{where}: sliding_window of text_config is {window!r}, and max_position_embeddings {longest}; only"
                " null, or a window that none leaves, is supported"
            )
        text["model_type"] = "llama"
    language = llama_language(text, where)
    # A head that is written out is one of its own, unless the model's own key ties it.
    language["tie_word_embeddings"] = head not in source or bool(config.get("tie_word_embeddings", False))
    return language
