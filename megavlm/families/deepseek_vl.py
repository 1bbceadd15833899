"""DeepSeek-VL-1.3B (arXiv 2403.05525) as Transformers and its authors have it: SigLIP-L, two linear layers, a Llama.

Transformers: ``DeepseekVLForConditionalGeneration``. The authors: ``MultiModalityCausalLM`` of
github.com/deepseek-ai/DeepSeek-VL (``deepseek_vl/models`` @ d04d289c), whose tower has timm's names and erf GELU. The
7B, with a SAM tower beside this one, is ``deepseek_vl_hybrid``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from megavlm.architectures.connectors.mlp.tables import DEEPSEEK_ALIGNER, SEQUENTIAL_PROJECTOR
from megavlm.architectures.towers.vit.tables import TIMM_VISION, TRANSFORMERS_VISION
from megavlm.config.errors import UserError
from megavlm.config.schema import ModelConfig
from megavlm.data.media import plan_of
from megavlm.families.common import expect, need
from megavlm.families.decoders import llama_config, llama_language
from megavlm.families.family import Tower, Tree, config_file
from megavlm.families.llama import LLAMA
from megavlm.families.preprocessor import image_branch, normalisation, processor_files, resampling
from megavlm.families.siglip_last import SiglipLastFamily, no_siglip_last, siglip_last
from megavlm.families.text import no_half, text_branch, text_config, text_table
from megavlm.families.towers import LAST_HIDDEN_STATE, transformers_vision, transformers_vision_config
from megavlm.weights.rules import Table
from megavlm.weights.source import Source

IMAGE_TOKEN = "<image_placeholder>"
_MIN_SIZE = 14
"""Of both image processors, where their file does not say it."""


class DeepseekVLFamily(SiglipLastFamily):
    """``DeepseekVLForConditionalGeneration``."""

    name = "deepseek_vl"
    title = "DeepSeek-VL-1.3B (DeepseekVLForConditionalGeneration)"
    # No place was found where its authors ask for boxes.
    parts: ClassVar[tuple[str, ...]] = ("vision", "connector", "language")
    architectures: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "vision": ("vit",), "connector": ("mlp",), "language": ("decoder",),
    }  # fmt: skip
    styles: ClassVar[Mapping[str, Mapping[str, str]]] = {
        # As published on the hub (Transformers 4).
        "hub": {
            "tower": "model.vision_model.vision_model.",
            "projector": "model.aligner.",
            "model": "model.language_model.",
            "head": "lm_head.",
        },
        "modules5": {
            "tower": "model.vision_model.",
            "projector": "model.aligner.",
            "model": "model.language_model.",
            "head": "lm_head.",
        },
    }
    modules: ClassVar[str | None] = "modules5"
    preprocesses = own_rotary = own_norms = True
    template = "deepseek"
    image_plan = "fit"

    def branches(self, source: Source) -> Tree:
        """Return all three branches, and what becomes of pictures."""
        config, where = source.config, config_file(source)
        vision = siglip_last(need(config, "vision_config", where), LAST_HIDDEN_STATE, where)
        vision |= normalisation(source, vision["image_size"])
        head = self.styles[self.style_of(source)]["head"]
        language = text_branch(source, need(config, "text_config", where), head, where)
        return {
            "vision": vision,
            "connector": {"preset": "mlp2x_gelu"},
            "language": language | {"tie_word_embeddings": head + "weight" not in source},
            "image": _pictures(source, vision["image_size"]),
        }

    def tables(self, model: ModelConfig, style: str) -> Sequence[Table]:
        """Return the three tables."""
        names = self.styles[style]
        return [
            dataclasses.replace(TRANSFORMERS_VISION, prefix=names["tower"]),
            dataclasses.replace(DEEPSEEK_ALIGNER, prefix=names["projector"]),
            text_table(model.language, model=names["model"], head=names["head"]),
        ]

    def config(self, model: ModelConfig, tokens: Mapping[str, int]) -> Tree:
        """Return the configuration."""
        return {
            "architectures": ["DeepseekVLForConditionalGeneration"],
            "image_token_id": tokens.get("image", model.language.vocab_size - 1),
            "model_type": self.name,
            "text_config": text_config(model.language),
            "tie_word_embeddings": model.language.tie_word_embeddings,
            "vision_config": transformers_vision_config(model.vision),
        }

    def processor(self, model: ModelConfig, image_token: str) -> Tree:
        """Return its class, and how many slots it writes."""
        return {"num_image_tokens": model.tokens_per_view, "processor_class": "DeepseekVLProcessor"}

    def named_tokens(self, image_token: str, known: Any) -> dict[str, str]:
        """Return the name that its processor has for the token of an image's slots."""
        return {"image_token": image_token}

    def trained_pictures(self, model: ModelConfig, old: Mapping[str, Any]) -> Tree | None:
        """Return the keys of its own image processor, where pictures are fitted to the square."""
        image, side = model.image, model.vision.image_size
        if image.kind != "fit":
            return None
        if image.fill not in (None, "mean"):
            raise UserError(
                f"model.image.fill: {image.fill}; DeepSeek-VL's image processor fills with model.vision.image_mean: "
                "choose mean"
            )
        return {
            "do_pad": True,
            "image_processor_type": "DeepseekVLImageProcessor",
            "min_size": _MIN_SIZE if image.min_side is None else image.min_side,
            "size": {"height": side, "width": side},
        }

    def refuses(self, model: ModelConfig) -> str | None:
        """Tower, connector, language model and image plan must be DeepSeek-VL's kinds."""
        return _no_deepseek(model) or no_half(model.language)

    def templates(self, source: Source) -> tuple[str, ...]:
        """Its own ``chat_template``, which writes nothing behind a picture; else the row of its authors' code."""
        return ("checkpoint", self.template)

    def tokens(self, source: Source) -> dict[str, int]:
        """``image_token_id``."""
        token = source.config.get("image_token_id")
        return {"image": token} if isinstance(token, int) else {}


TOWERS: dict[str, Tree] = {
    # SigLIP_MODEL_CONFIG of siglip_vit.py. The so400m has an MLP of int(1152 * 3.7362), which is 4304.
    "siglip_large_patch16_384": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "patch_size": 16,
    },
    "siglip_so400m_patch14_384": {
        "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
        "patch_size": 14,
    },
    "siglip_so400m_patch14_224": {
        "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
        "patch_size": 14,
    },
}  # fmt: skip
"""Shapes of the towers that its authors' code can make, by the name that it gives them."""


class DeepseekVLOriginalFamily(DeepseekVLFamily):
    """``MultiModalityCausalLM``, in the authors' layout."""

    name = "deepseek_vl_original"
    title = "DeepSeek-VL-1.3B in its authors' layout (MultiModalityCausalLM)"
    styles: ClassVar = {
        "published": {
            "tower": "vision_model.vision_tower.",
            "projector": "aligner.layers.",
            "model": "language_model.model.",
            "head": "language_model.lm_head.",
        },
    }
    modules: ClassVar[str | None] = None
    read_as = "deepseek_vl"

    def detect(self, source: Source) -> bool:
        """By ``model_type``, which Janus has too, with parts that make pictures."""
        config = source.config
        return config.get("model_type") == "multi_modality" and "gen_vision_config" not in config

    def probe(self, style: str) -> str:
        """Return the name of the patch embedding."""
        return self.styles[style]["tower"] + "patch_embed.proj.weight"

    def branches(self, source: Source) -> Tree:
        """Return all three branches, and what becomes of pictures."""
        config, where = source.config, config_file(source)
        vision = _original_tower(need(config, "vision_config", where), where)
        vision |= normalisation(source, vision["image_size"])
        _check_aligner(need(config, "aligner_config", where), vision, where)
        text = {"model_type": LLAMA.model_type, **need(config, "language_config", where)}
        head = self.styles["published"]["head"]
        return {
            "vision": vision,
            "connector": {"preset": "mlp2x_gelu"},
            "language": llama_language({**LLAMA.defaults, **text}, where)
            | {"tie_word_embeddings": head + "weight" not in source},
            "image": _pictures(source, vision["image_size"]),
        }

    def tables(self, model: ModelConfig, style: str) -> Sequence[Table]:
        """Return the three tables."""
        names = self.styles[style]
        return [
            dataclasses.replace(TIMM_VISION, names={"tower": names["tower"]}),
            dataclasses.replace(SEQUENTIAL_PROJECTOR, prefix=names["projector"]),
            text_table(model.language, model=names["model"], head=names["head"]),
        ]

    def config(self, model: ModelConfig, tokens: Mapping[str, int]) -> Tree:
        """Return the configuration."""
        params = {
            "image_size": model.vision.image_size, "model_name": _tower_name(model), "select_feature": "same",
            "select_layer": -1,
        }  # fmt: skip
        aligner = {
            "depth": 2, "input_dim": model.vision.hidden_size, "n_embed": model.language.hidden_size,
            "projector_type": "mlp_gelu",
        }  # fmt: skip
        return {
            "aligner_config": {"cls": "MlpProjector", "model_type": "aligner", "params": aligner},
            "architectures": ["MultiModalityCausalLM"],
            "language_config": llama_config(model.language),
            "model_type": "multi_modality",
            "tie_word_embeddings": model.language.tie_word_embeddings,
            "vision_config": {"cls": "CLIPVisionTower", "model_type": "vision", "params": params},
        }

    def tower_of(self, config: Mapping[str, Any], directory: Path) -> Tower | None:
        """It has none in Transformers' form."""
        return None

    def with_tower(self, config: Tree, vision_config: Tree, layer: Any) -> Tree:
        """Its configuration names the tower, and has no place for another's."""
        return config

    def processor(self, model: ModelConfig, image_token: str) -> Tree:
        """Return what the authors' processor reads."""
        return {
            "add_special_token": False, "ignore_id": -100, "image_tag": image_token, "mask_prompt": True,
            "num_image_tokens": model.tokens_per_view, "processor_class": "VLChatProcessor", "sft_format": "deepseek",
        }  # fmt: skip

    def trained_pictures(self, model: ModelConfig, old: Mapping[str, Any]) -> Tree | None:
        """Return the keys of the authors' image processor, which has no others."""
        found = super().trained_pictures(model, old)
        if found is None:
            return None
        least = found["min_size"]
        return {
            "image_processor_type": "VLMImageProcessor", "image_size": model.vision.image_size, "min_size": least,
            "processor_class": "VLChatProcessor",
        }  # fmt: skip

    def refuses(self, model: ModelConfig) -> str | None:
        """The tower must be one that the code knows by name, the language model a Llama."""
        if model.image.kind != "fit":
            return f"the image plan is {model.image.kind}, that of DeepSeek-VL's own code is fit"
        if model.image.resample != "bicubic":
            return f"pictures are resized {model.image.resample}; DeepSeek-VL's own code has bicubic"
        if _tower_name(model) is None:
            return f"DeepSeek-VL's own code knows the towers {', '.join(TOWERS)}, and the tower is none of them"
        return _no_deepseek(model) or LLAMA.refuses(model.language)

    def templates(self, source: Source) -> tuple[str, ...]:
        """Its code has the form, and no ``chat_template``."""
        return ("deepseek",)

    def tokens(self, source: Source) -> dict[str, int]:
        """Its configuration does not say it; the tokenizer has the template's."""
        return {}


def _no_deepseek(model: ModelConfig) -> str | None:
    """Return why tower, connector or image plan are not DeepSeek-VL's, or None."""
    if model.connector.preset != "mlp2x_gelu":
        return f"the connector is {model.connector.preset}, DeepSeek-VL's is mlp2x_gelu"
    if not plan_of(model).fixed:
        return f"the image plan is {model.image.kind}, DeepSeek-VL has one view of a picture"
    return no_siglip_last(model.vision)


def _original_tower(config: Mapping[str, Any], where: str) -> Tree:
    """Return ``model.vision`` of the authors' ``vision_config``.

    Raises:
        UserError: it is a tower that is not known here.
    """
    kind = str(config.get("cls", ""))
    expect(config, f"{where}: vision_config", model_type="vision")
    if "HybridVisionTower" in kind:
        raise UserError(
            f"{where}: vision_config.cls is {kind!r}, a SAM tower beside a SigLIP (DeepSeek-VL-7B), which "
            "is read in Transformers' layout alone (deepseek-community/deepseek-vl-7b-*); take that"
        )
    params = config.get("params") or {}
    name, layer = params.get("model_name", "siglip_large_patch16_384"), params.get("select_layer", -2)
    if "CLIPVisionTower" not in kind or name not in TOWERS:
        raise UserError(
            f"{where}: vision_config has the class {kind!r} and the tower {name!r}; CLIPVisionTower with "
            f"{' or '.join(TOWERS)} is supported"
        )
    # select_feature is not looked at: for a SigLIP clip_encoder.py sets it to "same".
    expect(params, f"{where}: vision_config.params", pixel_mean=None, pixel_std=None, ignore_head=True)
    if not isinstance(layer, int) or isinstance(layer, bool):
        raise UserError(f"{where}: vision_config.params.select_layer is {str(layer)[:40]!r}, which is no layer")
    shape = TOWERS[name]
    layers = shape["num_hidden_layers"]
    # As siglip_vit.py builds it: all layers up to that one, and the norm behind them.
    taken = min(layers, layers + layer + 1 if layer <= 0 else layer)
    tree = {
        **shape, "model_type": "siglip_vision_model", "hidden_act": "gelu", "num_hidden_layers": taken,
        "image_size": params.get("image_size", 336),
    }  # fmt: skip
    return transformers_vision(tree, LAST_HIDDEN_STATE, where)


def _tower_name(model: ModelConfig) -> str | None:
    """Return what the authors' code calls a model's tower; None where it knows none such."""
    own = transformers_vision_config(model.vision)
    if own["hidden_act"] != "gelu" or own["layer_norm_eps"] != 1e-6:
        return None
    return next(
        (name for name, shape in TOWERS.items() if all(own[key] == value for key, value in shape.items())), None
    )


def _check_aligner(config: Mapping[str, Any], vision: Tree, where: str) -> None:
    """Check that the connector is two layers on the tower's features.

    Raises:
        UserError: it is another, or for features of another width.
    """
    params = config.get("params") or {}
    expect(params, f"{where}: aligner_config.params", projector_type="mlp_gelu", depth=2)
    expect(
        config, f"{where}: aligner_config", cls=("MlpProjector", "deepseek_vl.models.projector.MlpProjector"),
        model_type="aligner",
    )  # fmt: skip
    width = params.get("input_dim", vision["hidden_size"])
    if width != vision["hidden_size"]:
        raise UserError(
            f"{where}: aligner_config.params.input_dim is {width!r}, but the tower of vision_config gives features "
            f"{vision['hidden_size']} wide; correct one"
        )


def _pictures(source: Source, side: int) -> Tree:
    """Return ``model.image`` by the image processor's file; empty where there is none.

    Raises:
        UserError: pictures are treated in a way that is not done here.
    """
    for path, tree in processor_files(source):
        kind = str(tree.get("image_processor_type", ""))
        if not tree or not kind.startswith(("DeepseekVLImageProcessor", "VLMImageProcessor")):
            continue
        where = str(path)
        if tree.get("do_pad") is False or tree.get("do_resize") is False:
            raise UserError(
                f"{where}: do_pad or do_resize is false, so that pictures are not brought to the tower's square; set "
                "both to true"
            )
        least = tree.get("min_size", _MIN_SIZE)
        if not isinstance(least, int) or isinstance(least, bool) or not 0 < least <= side:
            raise UserError(f"{where}: min_size is {str(least)[:40]!r}; it must be a length from 1 to {side} pixels")
        own = tree.get("image_size")
        if own is not None and own != side:
            raise UserError(
                f"{where}: image_size is {own!r}, but config.json's tower is for {side} x {side}; correct one"
            )
        return {"kind": "fit", "fill": "mean", "min_side": least, "resample": resampling(tree, where)}
    return image_branch(source, side, clip=False)
