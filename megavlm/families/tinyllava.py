"""TinyLLaVA as its factory writes it (github.com/TinyLLaVA/TinyLLaVA_Factory, ``tinyllava/model``; arXiv 2402.14289).

Three modules side by side, each a class of Transformers inside one of the factory's: ``vision_tower._vision_tower``,
``connector._connector`` and ``language_model``. The factory drops the first feature of every tower, which is the class
token's behind a CLIP and a patch's behind a SigLIP, unless ``vision_feature_select_strategy`` is ``cls_patch``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from megavlm.architectures.towers.vit.tables import TRANSFORMERS_VISION
from megavlm.config.errors import UserError
from megavlm.config.schema import ModelConfig
from megavlm.families.common import expect, need
from megavlm.families.family import Constants, Family, Tower, Tree, config_file
from megavlm.families.preprocessor import image_branch, normalisation
from megavlm.families.projector import projector_branch, projector_table
from megavlm.families.text import no_half, text_branch, text_config, text_kind, text_table
from megavlm.families.towers import transformers_vision, transformers_vision_config
from megavlm.families.vit import no_llava_tower
from megavlm.weights.rules import Table
from megavlm.weights.source import CONFIG, Source

_PROJECTOR = "connector._connector."
_LANGUAGES = {
    "llama": ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "vicuna_v1"),
    "phi": ("microsoft/phi-2", "vicuna_v1_endoftext"),
    "stablelm": ("stabilityai/stablelm-2-zephyr-1_6b", "vicuna_v1_endoftext"),
    "gemma": ("google/gemma-2b-it", "vicuna_v1_gemma"),
    "qwen2": ("Qwen/Qwen2-0.5B", "vicuna_v1_endoftext"),
}
"""By ``model_type``: the public name by which the factory finds the class, and the template
(``tinyllava/data/template/{llama,phi,gemma,qwen2_base}_template.py`` @ 0fd71549)."""
_INSTRUCT = "vicuna_v1_im_end"
"""The template of a Qwen2 that had instructions before (``qwen2_instruct_template.py``)."""
_TOWERS = {True: "openai/clip-vit-large-patch14-336", False: "google/siglip-so400m-patch14-384"}
"""Public names by which the factory finds the tower's class: of a CLIP, and of a SigLIP."""


class TinyLlavaFamily(Family):
    """``TinyLlavaForConditionalGeneration``."""

    name = "tinyllava"
    title = "TinyLLaVA (TinyLlavaForConditionalGeneration of TinyLLaVA Factory)"
    parts = ("vision", "connector", "language")
    architectures: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "vision": ("vit",), "connector": ("mlp",), "language": ("decoder",),
    }  # fmt: skip
    styles: ClassVar = {
        "factory": {"tower": "vision_tower._vision_tower.vision_model."},
        # The same with Transformers 5, whose towers have no module of that name.
        "transformers5": {"tower": "vision_tower._vision_tower."},
    }
    slotless = True
    own_rotary = True
    drops_first = True
    own_multiplier = True

    def detect(self, source: Source) -> bool:
        """By ``model_type``."""
        return source.config.get("model_type") == self.name

    def probe(self, style: str) -> str:
        """Return the name of the patch embedding."""
        return self.styles[style]["tower"] + "embeddings.patch_embedding.weight"

    def branches(self, source: Source) -> Tree:
        """Return all three branches, and what becomes of pictures."""
        config, where = source.config, config_file(source)
        expect(config, where, image_aspect_ratio=("pad", "square"), vision_model_name_or_path2=("",))
        vision = transformers_vision(*self.tower_of(config, source.directory), where)
        _check_width(config, "vision_hidden_size", vision["hidden_size"], "features of vision_config", where)
        vision |= normalisation(source, vision["image_size"])
        text = need(config, "text_config", where)
        kind = text_kind(text)
        if kind is None or kind.model_type not in _LANGUAGES:
            raise UserError(
                f"{where}: model_type of text_config is {text.get('model_type')!r}; of TinyLLaVA's language models "
                f"{', '.join(_LANGUAGES)} are known"
            )
        language = text_branch(source, text, "language_model.lm_head.", where)
        _check_width(config, "hidden_size", language["hidden_size"], "vectors of text_config", where)
        return {
            "vision": vision,
            "connector": {**_connector(source, clip=vision["class_token"]), **_multiplied(language)},
            "language": language,
            "image": _pictures(source, vision),
        }

    def tables(self, model: ModelConfig, style: str) -> Sequence[Table]:
        """Return the three tables."""
        return [
            dataclasses.replace(TRANSFORMERS_VISION, prefix=self.styles[style]["tower"]),
            projector_table(model, _PROJECTOR),
            text_table(model.language, model="language_model.model.", head="language_model.lm_head."),
        ]

    def config(self, model: ModelConfig, tokens: Mapping[str, int]) -> Tree:
        """Return the configuration of a model whose tower ends with the layer whose features are taken."""
        text, clip = text_config(model.language), model.vision.class_token
        language, tower = _LANGUAGES[text["model_type"]][0], _TOWERS[clip]
        if model.template == _INSTRUCT:
            language += "-Instruct"
        first = clip or model.connector.drop_first_feature
        return {
            "architectures": ["TinyLlavaForConditionalGeneration"],
            "connector_type": model.connector.preset,
            "hidden_size": model.language.hidden_size,
            "ignore_index": -100,
            **self.pictures_of(model),
            "image_token_index": -200,
            "llm_model_name_or_path": language,
            "model_type": self.name,
            "text_config": text,
            "tokenizer_model_max_length": model.language.max_position_embeddings,
            "tokenizer_name_or_path": language,
            "tokenizer_padding_side": "right",
            "tokenizer_use_fast": False,
            "vision_config": {**transformers_vision_config(model.vision), "model_name_or_path": tower},
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "patch" if first else "cls_patch",
            "vision_hidden_size": model.vision.hidden_size,
            "vision_model_name_or_path": tower,
            "vision_model_name_or_path2": "",
            "vocab_size": model.language.vocab_size,
        }

    def pictures_of(self, model: ModelConfig) -> Tree:
        """Return what the factory reads; how else a picture becomes a square is its tower's processor's matter."""
        return {"image_aspect_ratio": "pad" if model.image.kind == "pad" else "square"}

    def tower_of(self, config: Mapping[str, Any], directory: Path) -> Tower:
        """Both lie in the configuration."""
        return need(config, "vision_config", str(directory / CONFIG)), config.get("vision_feature_layer", -2)

    def with_tower(self, config: Tree, vision_config: Tree, layer: Any) -> Tree:
        """Put both into it."""
        own = {"model_name_or_path": config["vision_model_name_or_path"]}
        return {**config, "vision_config": {**vision_config, **own}, "vision_feature_layer": layer}

    def constants(self, model: ModelConfig, style: str) -> Constants:
        """Return the norm behind the tower's layers, which its class has and nothing uses."""
        prefix, shape = self.styles[style]["tower"] + "post_layernorm.", (model.vision.hidden_size,)
        return {prefix + "weight": (shape, 1.0), prefix + "bias": (shape, 0.0)}

    def refuses(self, model: ModelConfig) -> str | None:
        """Tower, connector, language model and image plan must be TinyLLaVA's kinds."""
        if model.image.kind not in ("pad", "squash", "crop"):
            return f"the image plan is {model.image.kind}; TinyLLaVA has one view of a picture"
        if model.vision.feature_layers is not None:
            return "features of several layers are taken (model.vision.feature_layers); TinyLLaVA takes one layer's"
        if model.connector.drop_first_feature and model.vision.class_token:
            return "the first feature is left out beside the class token's; TinyLLaVA leaves out one"
        reason = no_llava_tower(model.vision) or no_half(model.language, head_bias=True)
        if reason is not None:
            return reason
        kind = text_config(model.language)["model_type"]
        if kind == "phi" and not model.language.lm_head_bias:
            return "the output layer has no bias (model.language.lm_head_bias), which the factory's Phi has"
        if kind not in _LANGUAGES:
            return f"the language model is a {kind}; TinyLLaVA's here are {', '.join(_LANGUAGES)}"
        there, wanted = model.connector.output_multiplier, getattr(model.language, "embedding_multiplier", 1.0)
        if there != wanted:
            return f"image features are multiplied by {there} (model.connector.output_multiplier), here by {wanted}"
        return None

    def unsaid(self, model: ModelConfig, template: str) -> list[str]:
        """Pictures are made pixels by the processor of the tower that ``config.json`` names."""
        own = "crop" if model.vision.class_token else "squash"
        if model.image.kind in ("pad", own) and model.image.resample == "bicubic":
            return []
        return [
            f"model.image: {model.image.kind} ({model.image.resample}) was trained; the factory takes the tower's own "
            f"processor, which makes {own} (bicubic)"
        ]

    def templates(self, source: Source) -> tuple[str, ...]:
        """By the language model, and by its name where one kind has two forms."""
        kind = text_kind(source.config.get("text_config"))
        if kind is None or kind.model_type not in _LANGUAGES:
            return ()
        told = kind.model_type == "qwen2" and "Instruct" in str(source.config.get("llm_model_name_or_path"))
        return (_INSTRUCT,) if told else (_LANGUAGES[kind.model_type][1],)


def _multiplied(language: Mapping[str, Any]) -> Tree:
    """Return by what features are multiplied: Gemma's class did so behind the place where pictures come in.

    Of Transformers 4.40, with which the published ones were trained; in its class of today embeddings do it.
    """
    scale = language.get("embedding_multiplier", 1.0)
    return {} if scale == 1 else {"output_multiplier": scale}


def _connector(source: Source, *, clip: bool) -> Tree:
    """Return the connector's branch.

    Raises:
        UserError: it is of another kind, or says another than its weights.
    """
    config, where = source.config, config_file(source)
    named = str(need(config, "connector_type", where))
    if not re.fullmatch("linear|mlp[0-9]+x_gelu", named):
        raise UserError(
            f"{where}: connector_type is {named!r}; of TinyLLaVA's connectors linear and mlpNx_gelu are here"
        )
    connector = projector_branch(source, _PROJECTOR)
    if named != connector["preset"]:
        raise UserError(
            f"{where}: connector_type is {named!r}, but the weights' names under {_PROJECTOR} are those of "
            f"{connector['preset']}; correct one"
        )
    strategy = config.get("vision_feature_select_strategy", "patch")
    if strategy not in ("patch", "cls_patch") or (clip and strategy == "cls_patch"):
        known = "'patch'" if clip else "'patch' and 'cls_patch'"
        raise UserError(
            f"{where}: vision_feature_select_strategy is {strategy!r}; of a {'CLIP' if clip else 'SigLIP'} only "
            f"{known} is supported"
        )
    return {**connector, "drop_first_feature": not clip and strategy == "patch"}


def _pictures(source: Source, vision: Mapping[str, Any]) -> Tree:
    """Return ``model.image``: padded where config.json says so, else as the tower's own processor does."""
    clip = bool(vision["class_token"])
    if source.config.get("image_aspect_ratio", "square") == "pad":
        return image_branch(source, vision["image_size"], clip=clip)
    return {"kind": "crop" if clip else "squash"}


def _check_width(config: Mapping[str, Any], key: str, width: int, whose: str, where: str) -> None:
    """Check a width that config.json repeats.

    Raises:
        UserError: it is another.
    """
    if config.get(key, width) != width:
        raise UserError(f"{where}: {key} is {config[key]!r}, but the {whose} are {width} wide; correct one")
