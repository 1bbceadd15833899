"""LLaVA as its authors' code writes it (github.com/haotian-liu/LLaVA, ``llava/model``; and LLaVA-NeXT's on Qwen2).

One flat ``config.json``: the language model's keys and ``mm_*``. The tower is named there (``mm_vision_tower``) and
lies in the checkpoint, or apart. Its shape is that of a known name, of the directory that is named, or of
``vision_config.json`` beside, which an export writes for towers that have no public name.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from megavlm.architectures.decoders.decoder.tables import LLAMA_LANGUAGE
from megavlm.architectures.towers.vit.tables import TRANSFORMERS_VISION
from megavlm.config.errors import UserError
from megavlm.config.json_object import read_json
from megavlm.config.schema import ModelConfig
from megavlm.data.media import plan_of
from megavlm.families.common import expect, need
from megavlm.families.decoders import llama_config, llama_language
from megavlm.families.family import Family, Tower, Tree, config_file
from megavlm.families.llama import no_llama
from megavlm.families.preprocessor import image_branch, llava_processor, normalisation
from megavlm.families.projector import projector_branch, projector_table
from megavlm.families.towers import transformers_vision, transformers_vision_config
from megavlm.families.vit import no_llava_tower
from megavlm.weights.rules import Table
from megavlm.weights.source import CONFIG, Source

VISION_CONFIG = "vision_config.json"
_PROJECTOR = "model.mm_projector."
_LANGUAGES = {"llama": "LlavaLlama", "mistral": "LlavaMistral", "qwen2": "LlavaQwen"}
_KINDS = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}
_OTHERS = ("llava_mpt", "llava_mixtral", "llava_gemma", "llava_baichuan")


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
    "google/siglip-large-patch16-256": _siglip(1024, 4096, 24, 16, 256, 16),
    "google/siglip-base-patch16-224": _siglip(768, 3072, 12, 12, 224, 16),
    "google/siglip-base-patch16-384": _siglip(768, 3072, 12, 12, 384, 16),
    "google/siglip2-base-patch16-384": _siglip(768, 3072, 12, 12, 384, 16),
    "google/siglip2-large-patch16-512": _siglip(1024, 4096, 24, 16, 512, 16),
    "google/siglip2-so400m-patch16-384": _siglip(1152, 4304, 27, 16, 384, 16),
    "google/siglip2-so400m-patch16-512": _siglip(1152, 4304, 27, 16, 512, 16),
    "google/siglip2-giant-opt-patch16-384": _siglip(1536, 6144, 40, 16, 384, 16),
}
"""Shapes of public towers, by the name that ``mm_vision_tower`` gives them."""


class LlavaOriginalFamily(Family):
    """Tower, projector and language model in one checkpoint."""

    name = "llava_original"
    title = "LLaVA in its authors' layout (mm_projector, mm_vision_tower)"
    # As its data asks (llava_v1_5_mix665k); what the numbers count: issue 606 of haotian-liu/LLaVA.
    finds = "Please provide the bounding box coordinate of the region this sentence describes: {thing}"
    box_plane = True
    parts: ClassVar[tuple[str, ...]] = ("vision", "connector", "language")
    architectures: ClassVar[Mapping[str, tuple[str, ...]]] = {"vision": ("vit",), "language": ("decoder",)}
    styles: ClassVar = {
        "published": {"tower": "model.vision_tower.vision_tower.vision_model."},
        "transformers5": {"tower": "model.vision_tower.vision_tower."},
    }
    preprocesses = True
    slotless = True
    own_files = (VISION_CONFIG,)
    read_as = "llava"
    # Else LLaVA's own code takes the tower from where mm_vision_tower says, and not from here.
    tower_keys: ClassVar = {"unfreeze_mm_vision_tower": True}

    def detect(self, source: Source) -> bool:
        """By the projector's type, the language model's names and whether the tower is there."""
        return _is_original(source) and self._holds_tower(source)

    def templates(self, source: Source) -> tuple[str, ...]:
        """By the language model: its authors' code has the forms, and no ``chat_template``."""
        rows = {"mistral": ("mistral",), "qwen2": ("qwen2",)}
        # Llama 3 and Yi have Llama's names, and tokens of their own.
        return rows.get(_KINDS.get(source.config.get("model_type", ""), ""), ("llama_3", "vicuna_v1", "chatml_direct"))

    def probe(self, style: str) -> str:
        """Return the name of the patch embedding."""
        return self.styles[style]["tower"] + "embeddings.patch_embedding.weight"

    def branches(self, source: Source) -> Tree:
        """Return all three branches."""
        config, where = source.config, config_file(source)
        _check_pictures(config, where)
        vision_config, layer = self.tower_of(config, source.directory)
        vision = transformers_vision(vision_config, layer, where)
        _check_width(config, vision, where)
        vision |= normalisation(source, vision["image_size"])
        return {"vision": vision, **self._rest(source), "image": pictures(source, source, vision)}

    def tables(self, model: ModelConfig, style: str) -> Sequence[Table]:
        """Return the three tables."""
        tower = dataclasses.replace(TRANSFORMERS_VISION, prefix=self.styles[style]["tower"])
        return [tower, projector_table(model, _PROJECTOR), LLAMA_LANGUAGE]

    def config(self, model: ModelConfig, tokens: Mapping[str, int]) -> Tree:
        """Return a flat configuration whose tower ends with the layer whose features are taken."""
        text = llama_config(model.language)
        kind = text["model_type"]
        config = {
            **text,
            "architectures": [f"{_LANGUAGES.get(kind, 'LlavaLlama')}ForCausalLM"],
            "freeze_mm_mlp_adapter": False,
            "image_aspect_ratio": "pad" if model.image.kind == "pad" else "square",
            "mm_hidden_size": model.vision.feature_size,
            "mm_projector_type": model.connector.preset,
            "mm_use_im_patch_token": False,
            "mm_use_im_start_end": False,
            "mm_vision_select_feature": "patch",
            "model_type": "llava_qwen" if kind == "qwen2" else "llava_llama",
            "tune_mm_mlp_adapter": False,
            **self.tower_keys,
            "use_mm_proj": True,
        }
        layers = model.vision.feature_layers
        return self.with_tower(config, transformers_vision_config(model.vision), list(layers) if layers else -1)

    def tower_of(self, config: Mapping[str, Any], directory: Path) -> Tower:
        """Return the tower's own configuration and the layer whose features are taken.

        Raises:
            UserError: nothing tells the shape of the tower that is named.
        """
        where = str(directory / CONFIG)
        name, layer = str(need(config, "mm_vision_tower", where)), config.get("mm_vision_select_layer", -2)
        for path in (directory / VISION_CONFIG, directory / name / CONFIG, Path(name) / CONFIG):
            if path.is_file():
                tree = read_json(path)
                return tree.get("vision_config", tree), layer
        known = {full.split("/")[1]: tree for full, tree in TOWERS.items()}
        shape = known.get(Path(name).name)
        if shape is None:
            raise UserError(
                f"{where}: mm_vision_tower is {name!r}, of whose shape nothing is known; put that tower's config.json "
                f"to {directory / VISION_CONFIG}"
            )
        return shape, layer

    def with_tower(self, config: Tree, vision_config: Tree, layer: Any) -> Tree:
        """Name a public tower where the shape is one's, else write its shape to a file beside."""
        wanted = transformers_vision(vision_config, layer, CONFIG)
        taken = wanted["feature_layers"] or [wanted["num_layers"]]
        for name, known in TOWERS.items():
            layers = known["num_hidden_layers"]
            there = [one - layers - 1 for one in taken]
            own = there[0] if len(there) == 1 else there
            if max(taken) <= layers and transformers_vision(known, own, CONFIG) == wanted:
                return {**config, "mm_vision_tower": name, "mm_vision_select_layer": own}
        own_file = {VISION_CONFIG: vision_config}
        return {**config, "mm_vision_tower": "vision_tower", "mm_vision_select_layer": layer, **own_file}

    def processor(self, model: ModelConfig, image_token: str) -> Tree:
        """Return what LLaVA's processor needs."""
        return llava_processor(model.vision, image_token)

    def refuses(self, model: ModelConfig) -> str | None:
        """Tower, connector and language model must be LLaVA's kinds."""
        if not re.fullmatch("linear|mlp[0-9]+x_gelu", model.connector.preset):
            return f"the connector is {model.connector.preset}, LLaVA's are linear and mlpNx_gelu"
        if model.language.qk_layernorm:
            return "the language model has a norm on queries and keys; LLaVA's are Llama, Mistral and Qwen2"
        if not plan_of(model).fixed:
            return f"the image plan is {model.image.kind}; of LLaVA's those with one view of a picture are written"
        return no_llava_tower(model.vision) or no_llama(model.language)

    def extra_files(self, source: Source) -> dict[str, Tree]:
        """Return the tower's shape, where it comes from a directory that need not be there for an export."""
        known = Path(str(source.config.get("mm_vision_tower"))).name in {name.split("/")[1] for name in TOWERS}
        if known or (source.directory / VISION_CONFIG).is_file():
            return {}
        return {VISION_CONFIG: self.tower_of(source.config, source.directory)[0]}

    def _holds_tower(self, source: Source) -> bool:
        return any(self.probe(style) in source for style in self.styles)

    def _rest(self, source: Source) -> Tree:
        """Return connector and language model."""
        config, where = source.config, config_file(source)
        connector, named = projector_branch(source, _PROJECTOR), config.get("mm_projector_type", "linear")
        if named != connector["preset"]:
            raise UserError(
                f"{where}: mm_projector_type is {named!r}, but the weights' names under {_PROJECTOR} are those of "
                f"{connector['preset']}; correct one"
            )
        kind = _KINDS[config["model_type"]]
        if kind == "mistral" and config.get("sliding_window") is not None:
            raise UserError(f"{where}: sliding_window is {config['sliding_window']!r}; only null is supported")
        # Mistral without its window is a Llama.
        text = {**config, "model_type": "llama" if kind == "mistral" else kind}
        return {"connector": connector, "language": llama_language(text, where)}


class LlavaApartFamily(LlavaOriginalFamily):
    """The same without the tower's weights: they are those that ``mm_vision_tower`` names."""

    name = "llava_original_apart"
    title = "LLaVA in its authors' layout, its tower apart"
    with_tower_trained = LlavaOriginalFamily.name
    parts = ("connector", "language")

    def detect(self, source: Source) -> bool:
        """As LLaVA in its authors' layout."""
        return _is_original(source) and not self._holds_tower(source)

    def branches(self, source: Source) -> Tree:
        """Return two branches."""
        _check_pictures(source.config, config_file(source))
        return self._rest(source)

    def style_of(self, source: Source) -> str:
        """There is no tower to tell."""
        return next(iter(self.styles))

    def extra_files(self, source: Source) -> dict[str, Tree]:
        """Return none: the tower goes home by itself."""
        return {}

    def tables(self, model: ModelConfig, style: str) -> Sequence[Table]:
        """Return two tables."""
        return super().tables(model, style)[1:]

    def tower_apart(self, source: Source, vision: Path | None) -> tuple[Path, Any]:
        """Return what the user says, or the directory that config.json names.

        Raises:
            UserError: the user does not say, and the name in config.json is no directory.
        """
        name, layer = str(source.config.get("mm_vision_tower")), source.config.get("mm_vision_select_layer", -2)
        if vision is not None:
            return vision, layer
        for path in (source.directory / name, Path(name)):
            if path.is_dir():
                return path, layer
        raise UserError(
            f"{source.path}: has no vision tower; config.json names it (mm_vision_tower {name!r}): give its directory "
            "with --vision DIR"
        )

    def pictures(self, source: Source, tower: Source, vision: Mapping[str, Any]) -> Tree:
        """As LLaVA in its authors' layout."""
        return pictures(source, tower, vision)


def pictures(source: Source, tower: Source, vision: Mapping[str, Any]) -> Tree:
    """Return ``model.image``: padded where config.json says so, else as the tower's own processor does.

    Args:
        source: the checkpoint.
        tower: where the processor's file lies, if there is one.
        vision: ``model.vision``.
    """
    clip = bool(vision["class_token"])
    if source.config.get("image_aspect_ratio") == "pad":
        return image_branch(source, vision["image_size"], clip=clip)
    own = image_branch(tower, vision["image_size"], clip=clip)
    return own or {"kind": "crop" if clip else "squash"}


def _is_original(source: Source) -> bool:
    config = source.config
    if "mm_projector_type" not in config and "mm_vision_tower" not in config:
        return False
    kind = config.get("model_type")
    if kind in _OTHERS:
        raise UserError(
            f"{config_file(source)}: model_type {kind!r}: of LLaVA's language models {', '.join(_LANGUAGES)} are known"
        )
    # CodeFuse-VLM has llava_qwen as well, on Qwen v1.
    return kind in _KINDS and any(name.startswith(("model.layers.", "model.embed_tokens.")) for name in source.tensors)


def _check_pictures(config: Mapping[str, Any], where: str) -> None:
    """Check what is asked of pictures.

    Raises:
        UserError: it is not done here.
    """
    expect(config, where, mm_use_im_start_end=False, image_aspect_ratio=("pad", "square"), s2=False)
    tower = str(config.get("mm_vision_tower"))
    if config.get("mm_vision_select_feature", "patch") != "patch":
        value = config["mm_vision_select_feature"]
        raise UserError(f"{where}: mm_vision_select_feature is {value!r}; of {tower} only 'patch' is supported")
    if config.get("mm_resampler_type") is not None:
        raise UserError(f"{where}: mm_resampler_type is {config['mm_resampler_type']!r}; only null is supported")


def _check_width(config: Mapping[str, Any], vision: Mapping[str, Any], where: str) -> None:
    """Check that projector and tower are of one width, by their configurations."""
    width = vision["hidden_size"] * len(vision["feature_layers"] or (0,))
    if config.get("mm_hidden_size", width) != width:
        raise UserError(
            f"{where}: mm_hidden_size is {config['mm_hidden_size']!r}, but the features of mm_vision_tower "
            f"{config['mm_vision_tower']!r} are {width} wide; correct one"
        )
