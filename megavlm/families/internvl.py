"""InternVL 2.5, 3 and 3.5, dense and on Qwen3-MoE: as Transformers has them, and as their authors write them.

Transformers: ``InternVLForConditionalGeneration``. The authors: ``InternVLChatModel`` of github.com/OpenGVLab/InternVL
(``internvl_chat/internvl/model``), whose tower has q, k and v in one matrix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from megavlm.architectures.connectors.pixel_shuffle.tables import PIXEL_SHUFFLE
from megavlm.architectures.decoders.decoder.tables import LLAMA_LANGUAGE
from megavlm.config.errors import UserError
from megavlm.config.json_object import read_json
from megavlm.config.schema import ModelConfig
from megavlm.data.media import plan_of
from megavlm.data.templates import find_template, is_checkpoint
from megavlm.families.common import expect, flag, need, number
from megavlm.families.decoders import llama_config, llama_language
from megavlm.families.experts import QWEN3_MOE
from megavlm.families.family import Family, Tree, config_file
from megavlm.families.films import film_branch
from megavlm.families.intern_vit import (
    MEAN,
    ORIGINAL_TOWER,
    STD,
    TRANSFORMERS_TOWER,
    no_intern_vit,
    original_config,
    original_tower,
    tower_config,
    transformers_tower,
)
from megavlm.families.llama import no_llama
from megavlm.families.preprocessor import image_branch, normalisation
from megavlm.weights.rules import Table
from megavlm.weights.source import Source

TEMPLATE = "internvl2_5"
IMAGE_TOKEN = "<IMG_CONTEXT>"
_LANGUAGES = ("qwen2", "qwen3", "llama", "qwen3_moe")


def _names(tower: str, projector: str, model: str, head: str) -> dict[str, str]:
    layers = {"norm": "layer_norm", "linear_1": "linear_1", "linear_2": "linear_2"}
    return {"tower": tower, "model": model, "head": head} | {ours: projector + own for ours, own in layers.items()}


class InternVLFamily(Family):
    """``InternVLForConditionalGeneration``."""

    name = "internvl"
    title = "InternVL 2.5, 3, 3.5 (InternVLForConditionalGeneration)"
    # evaluate_grounding.py of OpenGVLab/InternVL.
    finds = "Please provide the bounding box coordinate of the region this sentence describes: <ref>{thing}</ref>"
    parts: ClassVar[tuple[str, ...]] = ("vision", "connector", "language")
    architectures: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "vision": ("vit",),
        "connector": ("pixel_shuffle",),
        "language": ("decoder",),
    }
    styles: ClassVar[Mapping[str, Mapping[str, str]]] = {
        # As published on the hub, and written by every version of Transformers.
        "hub": _names("vision_tower.", "multi_modal_projector.", "language_model.model.", "language_model.lm_head."),
        # Names of the modules since Transformers 4.52.
        "modules": _names("model.vision_tower.", "model.multi_modal_projector.", "model.language_model.", "lm_head."),
    }
    modules: ClassVar[str | None] = "modules"
    wraps_pictures: ClassVar[tuple[str, str] | None] = ("<img>", "</img>")
    preprocesses = True
    film_plans: ClassVar[tuple[str, ...]] = ("internvl",)
    tower: ClassVar[Table] = TRANSFORMERS_TOWER

    def detect(self, source: Source) -> bool:
        """By ``model_type``."""
        return source.config.get("model_type") == "internvl"

    def probe(self, style: str) -> str:
        """Return the name of the patch embedding."""
        return self.styles[style]["tower"] + "embeddings.patch_embeddings.projection.weight"

    def branches(self, source: Source) -> Tree:
        """Return all three branches, and what becomes of pictures."""
        config, where = source.config, config_file(source)
        expect(config, where, projector_hidden_act="gelu", vision_feature_select_strategy="default")
        vision_config = need(config, "vision_config", where)
        vision = transformers_tower(vision_config, config.get("vision_feature_layer", -1), where)
        vision |= normalisation(source, vision["image_size"])
        # Its processor cuts pictures to tiles whatever crop_to_patches the image processor's file says. Without a file
        # there is no branch, and no conversion.
        image = image_branch(source, vision["image_size"], clip=False, tiles=True)
        image = {"kind": "dynamic_tiles", "min_tiles": 1, "max_tiles": 12, **image} if image else {}
        return self._branches(source, vision, image, need(config, "text_config", where))

    def tables(self, model: ModelConfig, style: str) -> Sequence[Table]:
        """Return the three tables."""
        names = self.styles[style]
        language = LLAMA_LANGUAGE if model.language.num_moe_experts is None else QWEN3_MOE.table
        return [dataclasses.replace(table, names=names) for table in (self.tower, PIXEL_SHUFFLE, language)]

    def config(self, model: ModelConfig, tokens: Mapping[str, int]) -> Tree:
        """Return the configuration of a model whose tower ends with the layer whose features are taken."""
        vision = model.vision
        side = [vision.positional_grid * vision.patch_size] * 2
        return {
            "architectures": ["InternVLForConditionalGeneration"],
            "downsample_ratio": 1 / model.connector.factor,
            "image_seq_length": model.tokens_per_view,
            "image_token_id": tokens.get("image", model.language.vocab_size - 1),
            "model_type": "internvl",
            "projector_hidden_act": "gelu",
            "text_config": _text_config(model),
            "tie_word_embeddings": model.language.tie_word_embeddings,
            "vision_config": {
                **tower_config(vision),
                "attention_bias": vision.add_qkv_bias,
                "architectures": ["InternVLVisionModel"],
                "image_size": side,
                "layer_scale_init_value": vision.layer_scale_init,
                "model_type": "internvl_vision",
                "patch_size": [vision.patch_size] * 2,
                "use_absolute_position_embeddings": True,
                "use_mask_token": False,
                "use_mean_pooling": True,
                "use_qk_norm": vision.qk_norm is not None,
            },
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "default",
        }

    def refuses(self, model: ModelConfig) -> str | None:
        """Tower, connector, language model and image plan must be InternVL's kinds."""
        return no_internvl(model) or self._refuses_pictures(model)

    def tokens(self, source: Source) -> dict[str, int]:
        """``image_token_id``."""
        token = source.config.get("image_token_id", _added_token(source))
        return {"image": token} if isinstance(token, int) else {}

    def processor(self, model: ModelConfig, image_token: str) -> Tree:
        """Return what Transformers' processor needs to make slots of an image's token."""
        return {"image_seq_length": model.tokens_per_view, "processor_class": "InternVLProcessor"}

    def trained_pictures(self, model: ModelConfig, old: Mapping[str, Any]) -> Tree | None:
        """Pictures are cut to tiles."""
        image, side, kind = model.image, model.vision.image_size, str(old.get("image_processor_type"))
        if image.kind != "dynamic_tiles":
            return None
        return {
            "crop_to_patches": True,
            "image_processor_type": kind if kind.startswith("GotOcr2") else "GotOcr2ImageProcessor",
            "max_patches": image.max_tiles or 12,
            "min_patches": image.min_tiles or 1,
            "size": {"height": side, "width": side},
        }

    def named_tokens(self, image_token: str, known: Callable[[str], bool]) -> dict[str, str]:
        """Return the names that Transformers' processor has for the tokens around pictures."""
        # Another than an image's, which the processor would look for videos at.
        video = next((token for token in ("<video>", "<|video_pad|>") if known(token)), "<video>")
        around = {"start_image_token": "<img>", "end_image_token": "</img>"}
        return {**around, "context_image_token": image_token, "video_token": video}

    def unsaid(self, model: ModelConfig, template: str) -> list[str]:
        """Transformers' processor writes <img> and </img> around pictures, whatever the template has there."""
        if is_checkpoint(template) or find_template(template).image == self.wraps_pictures:
            return []
        return [
            f"model.template: pictures of {template} do not stand between <img> and </img>, which InternVLProcessor "
            "writes around them all the same"
        ]

    def _refuses_pictures(self, model: ModelConfig) -> str | None:
        if not model.image.thumbnail:
            return "pictures have no thumbnail behind their tiles (model.image.thumbnail), which InternVL's have"
        if model.vision.positional_grid != model.vision.image_size // model.vision.patch_size:
            return f"the tower's positional table is {model.vision.positional_grid} wide, for tiles of another size"
        if model.image.kind != "dynamic_tiles":
            return (
                f"the image plan is {model.image.kind}, InternVL's is dynamic_tiles (with max_tiles 1, pictures are"
                " squashed)"
            )
        return None

    def _branches(self, source: Source, vision: Tree, image: Tree, text: Mapping[str, Any]) -> Tree:
        config, where = source.config, config_file(source)
        language = _language(_text(text, where), where)
        # A head that is written out is one of its own, whatever Transformers' defaults say of it.
        head = self.styles[self.style_of(source)]["head"] + "weight"
        language["tie_word_embeddings"] = head not in source or (
            flag(text, "tie_word_embeddings", where, default=False)
            and flag(config, "tie_word_embeddings", where, default=True)
        )
        connector = {"preset": "pixel_shuffle", "factor": _factor(config, vision, where)}
        # What training looks up by its name; a template of the directory's own would be the same turns.
        return {
            "vision": vision, "connector": connector, "language": language, "image": image, "template": TEMPLATE,
            **({"video": film_branch(source, vision, self.film_plans[0])} if image else {}),
        }  # fmt: skip


class InternVLChatFamily(InternVLFamily):
    """``InternVLChatModel``, in the authors' layout."""

    name = "internvl_chat"
    title = "InternVL 2.5, 3, 3.5 in their authors' layout (InternVLChatModel)"
    styles: ClassVar = {
        "published": {
            "tower": "vision_model.",
            "norm": "mlp1.0",
            "linear_1": "mlp1.1",
            "linear_2": "mlp1.3",
            "model": "language_model.model.",
            "head": "language_model.lm_head.",
        },
    }
    modules: ClassVar[str | None] = None
    preprocesses = False
    tower = ORIGINAL_TOWER

    def detect(self, source: Source) -> bool:
        """By ``model_type``."""
        return source.config.get("model_type") == "internvl_chat"

    def probe(self, style: str) -> str:
        """Return the name of the patch embedding."""
        return "vision_model.embeddings.patch_embedding.weight"

    def branches(self, source: Source) -> Tree:
        """Return all three branches, and what becomes of pictures."""
        config, where = source.config, config_file(source)
        # v1 took the patches of a square column by column.
        expect({"ps_version": config.get("ps_version", "v1")}, where, ps_version="v2")
        expect(config, where, pad2square=False)
        vision = original_tower(need(config, "vision_config", where), config.get("select_layer", -1), where)
        size = config.get("force_image_size")
        vision |= {"image_size": size} if size is not None else {}
        tiles = {
            "kind": "dynamic_tiles",
            "min_tiles": config.get("min_dynamic_patch", 1),
            "max_tiles": config.get("max_dynamic_patch", 6),
            "thumbnail": flag(config, "use_thumbnail", where, default=False),
        }
        image = tiles if flag(config, "dynamic_image_size", where, default=False) else {"kind": "squash"}
        return self._branches(source, vision, image, need(config, "llm_config", where))

    def config(self, model: ModelConfig, tokens: Mapping[str, int]) -> Tree:
        """Return the configuration of a model whose tower ends with the layer whose features are taken."""
        vision, image = model.vision, model.image
        tiles = image.kind == "dynamic_tiles"
        return {
            "architectures": ["InternVLChatModel"],
            "auto_map": {
                "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
                "AutoModel": "modeling_internvl_chat.InternVLChatModel",
                "AutoModelForCausalLM": "modeling_internvl_chat.InternVLChatModel",
            },
            "downsample_ratio": 1 / model.connector.factor,
            "dynamic_image_size": tiles,
            "force_image_size": vision.image_size,
            "llm_config": _text_config(model),
            "max_dynamic_patch": (image.max_tiles or 12) if tiles else 1,
            "min_dynamic_patch": (image.min_tiles or 1) if tiles else 1,
            "model_type": "internvl_chat",
            "pad2square": False,
            "ps_version": "v2",
            "select_layer": -1,
            "template": TEMPLATE,
            "tie_word_embeddings": model.language.tie_word_embeddings,
            "use_backbone_lora": 0,
            "use_llm_lora": 0,
            "use_thumbnail": image.thumbnail,
            "vision_config": original_config(vision),
        }

    def unsaid(self, model: ModelConfig, template: str) -> list[str]:
        """Its code has its templates in a Python file, and takes the one that ``config.json`` names."""
        if template == TEMPLATE:
            return []
        return [
            f"model.template: {template} was trained, but InternVL's own code speaks {TEMPLATE}; "
            "chat_template.jinja has what was trained"
        ]

    def _refuses_pictures(self, model: ModelConfig) -> str | None:
        if model.image.kind not in ("dynamic_tiles", "squash"):
            return f"the image plan is {model.image.kind}, InternVL's are dynamic_tiles and squash"
        if [*model.vision.image_mean, *model.vision.image_std] != [*MEAN, *STD]:
            return "pictures are normalised with other numbers than ImageNet's, which InternVL's code has fixed"
        if model.image.resample != "bicubic":
            return f"pictures are resized {model.image.resample}; InternVL's code has bicubic"
        return None


def no_internvl(model: ModelConfig) -> str | None:
    """Return why a model's parts are not InternVL's, or None."""
    reason = no_intern_vit(model)
    if reason is not None:
        return reason
    if model.connector.preset != "pixel_shuffle":
        return f"the connector is {model.connector.preset}, InternVL's is pixel_shuffle"
    try:
        plan_of(model)
    except UserError as error:
        return str(error)
    return no_llama(model.language) if model.language.num_moe_experts is None else QWEN3_MOE.refuses(model.language)


def _factor(config: Mapping[str, Any], vision: Tree, where: str) -> int:
    """Return the side of the squares of patches that become one token.

    Raises:
        UserError: ``downsample_ratio`` is not one over a whole number that divides the tower's grid.
    """
    ratio = number(config, "downsample_ratio", where, 0.5)
    grid = vision["image_size"] // vision["patch_size"]
    factor = round(1 / ratio) if 0 < ratio <= 1 else 0
    if not factor or 1 / factor != ratio or grid % factor:
        fit = ", ".join(str(1 / side) for side in (1, 2, 4, 8) if grid % side == 0)
        raise UserError(
            f"{where}: downsample_ratio is {ratio!r}; it must be 1 over a whole number that divides the {grid} x {grid}"
            f" patches of the tower, such as {fit}"
        )
    return factor


def _text(text: Mapping[str, Any], where: str) -> Tree:
    """Return the language model's configuration without what it has no effect on segments that it is made for.

    Raises:
        UserError: it is a model that is not known here.
    """
    kind = text.get("model_type")
    architecture = (text.get("architectures") or [None])[0]
    if kind not in _LANGUAGES:
        raise UserError(
            f"{where}: the language model is {kind or architecture!r} ({architecture}); of InternVL those on"
            f" {', '.join(_LANGUAGES)} are supported, not those on InternLM2.5, InternLM3 or GPT-OSS"
        )
    # Dynamic NTK changes nothing up to max_position_embeddings.
    tree = dict(text)
    for key in ("rope_scaling", "rope_parameters"):
        rope = tree.get(key)
        if isinstance(rope, Mapping) and rope.get("rope_type", rope.get("type")) == "dynamic":
            base = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
            tree[key] = {**base, "rope_type": "default"} if base else None
    return tree


def _language(text: Tree, where: str) -> Tree:
    if text["model_type"] == QWEN3_MOE.model_type:
        return QWEN3_MOE.branch({**QWEN3_MOE.defaults, **text}, where)
    return llama_language(text, where)


def _text_config(model: ModelConfig) -> Tree:
    dense = model.language.num_moe_experts is None
    config = llama_config(model.language) if dense else QWEN3_MOE.write(model.language)
    if model.language.rope_scaling is None:
        # Beside rope_theta they would say nothing, and take the place of a dynamic scaling that came along.
        del config["rope_scaling"], config["rope_parameters"]
    return config


def _added_token(source: Source) -> int | None:
    """Return the id of the token of an image's slots, by the tokenizer's files."""
    for name in ("added_tokens.json", "tokenizer_config.json"):
        path = source.directory / name
        tree = read_json(path) if path.is_file() else {}
        if isinstance(tree.get(IMAGE_TOKEN), int):
            return int(tree[IMAGE_TOKEN])
        for key, token in (tree.get("added_tokens_decoder") or {}).items():
            if isinstance(token, Mapping) and token.get("content") == IMAGE_TOKEN and key.isdigit():
                return int(key)
    return None
