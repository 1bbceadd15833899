"""MiniGemini (MGM, arXiv 2403.18814): LLaVA's layout with a second tower, OpenCLIP's ConvNeXt, and patch-info mining.

Facts are from dvlab-research/MGM @ 769820cb (``mgm/model/mgm_arch.py``, ``multimodal_encoder/openclip_encoder.py``,
``mgm/train/train.py``). The second tower's pixels are those of the file; the first one's are these made smaller, in HD
(``image_grid``, ``image_global``) in tiles, and whole.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from megavlm.architectures.connectors.patch_mining.tables import MINING_PROJECTOR
from megavlm.architectures.pair_tables import LOW_TRANSFORMERS_VISION
from megavlm.architectures.towers.convnext.tables import timm_convnext
from megavlm.config.errors import UserError
from megavlm.config.schema import ModelConfig, VisionConfig
from megavlm.families.common import flag
from megavlm.families.family import Constants, Tree, config_file
from megavlm.families.llava_original import LlavaOriginalFamily, SystemLanguage
from megavlm.families.preprocessor import normalisation
from megavlm.families.public_towers import TOWERS, public_name
from megavlm.families.towers import CLIP_MEAN, CLIP_STD, transformers_vision_config
from megavlm.weights.rules import Table
from megavlm.weights.source import Source

_AUX = "model.vision_tower_aux."
_STEM, _STAGES = _AUX + "vision_stem", _AUX + "vision_stages"
_EPSILON = 1e-6
"""Of ConvNeXt's norms in timm."""
_PATCH = 4
"""Side of what its stem makes a position of, in pixels."""
_PUBLIC = {
    "model_zoo/OpenAI/openclip-convnext-large-d-320-laion2B-s29B-b131K-ft-soup": ((3, 3, 27, 3), (192, 384, 768, 1536)),
}
"""Blocks and channels of each stage, by the name that the published ``config.json`` gives the tower."""
_OTHER = "openclip-convnext"
"""What another one is called: its shape is that of its tensors."""
_PLANS = {"pad": "pad", "crop": "square"}
"""Image plans, and their ``image_aspect_ratio``."""


class MiniGeminiFamily(LlavaOriginalFamily):
    """MiniGemini on Gemma, Vicuna, Llama 3, Hermes-Yi and Mixtral; HD too."""

    name = "minigemini"
    title = "MiniGemini (MGM) in its authors' layout"
    finds = LlavaOriginalFamily.finds  # its data has LLaVA's
    architectures: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "vision": ("vit_convnext",), "connector": ("patch_mining",), "language": ("decoder",),
    }  # fmt: skip
    preprocesses = False  # the processor is that of the directory that mm_vision_tower names
    may_lack_tower = False
    read_as = None
    # Else its code takes the second tower from where mm_vision_tower_aux says.
    tower_keys: ClassVar = {"optimize_vision_tower": True, "optimize_vision_tower_aux": True}
    # Until April 2024 they were called mini_gemini. Gemma's class multiplies embeddings behind the place where pictures
    # come in.
    languages: ClassVar[tuple[SystemLanguage, ...]] = (
        SystemLanguage(
            "llama", ("mgm", "mini_gemini"), "MGMLlamaForCausalLM", ("mgm_llama_3", "vicuna_v1", "chatml_direct")
        ),
        SystemLanguage(
            "gemma", ("mgm_gemma", "mini_gemini_gemma"), "MGMGemmaForCausalLM", ("mgm_gemma",), multiplies_features=True
        ),
        SystemLanguage("mixtral", ("mgm_mixtral", "mini_gemini_mixtral"), "MGMMixtralForCausalLM", ("mgm_mistral",)),
    )
    others = "(mgm|mini_gemini)_.*"

    def check_pictures(self, config: Mapping[str, Any], where: str) -> None:
        """Check what is said of both renderings of a picture.

        Raises:
            UserError: one is missing, or is not made here.
        """
        super().check_pictures(config, where)
        for key, what in (("mm_vision_tower_aux", "the tower"), ("image_size_aux", "the side, in pixels,")):
            if config.get(key) is None:
                raise UserError(
                    f"{where}: has no {key}, {what} of the larger of two renderings of a picture, which {self.title} "
                    "cannot do without; put it there"
                )
        if "convnext" not in str(config["mm_vision_tower_aux"]).lower() or "xxlarge" in config["mm_vision_tower_aux"]:
            raise UserError(
                f"{where}: mm_vision_tower_aux is {config['mm_vision_tower_aux']!r}; OpenCLIP's ConvNeXt, base and "
                "large, are supported"
            )
        for key in ("image_size_aux", "image_grid"):
            value = config.get(key, 1)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"{where}: {key} is {str(value)[:40]!r}; it must be a whole number above 0")
        if flag(config, "image_global", where, default=False) and config.get("image_grid", 1) < 2:
            raise UserError(
                f"{where}: image_global is true, and image_grid {config.get('image_grid', 1)} makes no tiles for a "
                "whole picture to stand before; set it to false, or raise image_grid"
            )

    def vision_of(self, source: Source) -> Tree:
        """Return ``model.vision``.

        Raises:
            UserError: the tensors are of another second tower than the one that is named, or not those of one.
        """
        config, where = source.config, config_file(source)
        high = _convnext(source) | {"image_size": config["image_size_aux"]}
        named = next(
            (shape for name, shape in _PUBLIC.items() if _tail(name) == _tail(config["mm_vision_tower_aux"])), None
        )
        if named is not None and named != (high["depths"], high["widths"]):
            raise UserError(
                f"{where}: mm_vision_tower_aux is {config['mm_vision_tower_aux']!r}, with stages of {list(named[0])} "
                f"blocks and {list(named[1])} channels, but the weights under {_STAGES} have {list(high['depths'])} "
                f"and {list(high['widths'])}; correct the name"
            )
        for key, value in normalisation(source, config["image_size_aux"]).items():
            if list(value) != {"image_mean": CLIP_MEAN, "image_std": CLIP_STD}[key]:
                raise UserError(f"{where}: {key} of the file beside it is not CLIP's, which both towers take here")
        return {
            **self.tower_branch(source),
            "preset": "clip_convnext",
            "low_from": "high",
            "low_tiles": config.get("image_grid") or 1,
            "low_whole": flag(config, "image_global", where, default=False),
            **{f"high_{key}": value for key, value in high.items()},
        }

    def branches(self, source: Source) -> Tree:
        """Return all three branches, and what becomes of pictures."""
        found = super().branches(source)
        kind = "pad" if source.config.get("image_aspect_ratio") == "pad" else "crop"
        return {**found, "image": {"kind": kind, "resample": "bicubic"}}

    def constants(self, model: ModelConfig, style: str) -> Constants:
        """Return CLIP's norm, and its layers behind the features: its code loads the tower whole."""
        low, top = model.vision.low, self.styles[style]["tower"]
        width, inner = low.hidden_size, low.ffn_hidden_size
        named = public_name(self.vision_config(model.vision), -1)
        layers = int(TOWERS[named[0]]["num_hidden_layers"]) if named else low.num_layers
        shapes = {f"self_attn.{one}_proj": (width, width) for one in ("q", "k", "v", "out")}
        shapes |= {"mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}
        norms = [f"{top}post_layernorm."]
        found: Constants = {}
        for number in range(low.num_layers, layers):
            at = f"{top}encoder.layers.{number}."
            norms += [f"{at}layer_norm1.", f"{at}layer_norm2."]
            found |= {f"{at}{one}.weight": (shape, 0.0) for one, shape in shapes.items()}
            found |= {f"{at}{one}.bias": (shape[:1], 0.0) for one, shape in shapes.items()}
        for one in norms:
            found |= {f"{one}weight": ((width,), 1.0), f"{one}bias": ((width,), 0.0)}
        return found

    def tables(self, model: ModelConfig, style: str) -> Sequence[Table]:
        """Return the tables of both towers, connector and language model."""
        _, connector, language = super().tables(model, style)
        low = dataclasses.replace(LOW_TRANSFORMERS_VISION, prefix=self.styles[style]["tower"])
        high = timm_convnext(model.vision.high.depths, ours="high.", stem=_STEM, stages=_STAGES)
        return [low, high, connector, language]

    def connector_of(self, source: Source) -> Tree:
        """Return ``model.connector``: LLaVA's projector behind the mining."""
        preset = str(super().connector_of(source)["preset"])
        if not preset.startswith("mlp"):
            raise UserError(f"{config_file(source)}: mm_projector_type is {preset!r}; only mlpNx_gelu is supported")
        return {"preset": "patch_mining", "depth": int(preset.removeprefix("mlp").removesuffix("x_gelu"))}

    def connector_table(self, model: ModelConfig) -> Table:
        """Return the table of mining and projector."""
        return MINING_PROJECTOR

    def pictures_of(self, model: ModelConfig) -> Tree:
        """Return what its code does with pictures."""
        vision = model.vision
        return {
            "image_aspect_ratio": _PLANS[model.image.kind],
            "image_global": vision.low_whole,
            "image_grid": vision.low_tiles,
            "image_size_aux": vision.high_image_size,
        }

    def mm_config(self, model: ModelConfig) -> Tree:
        """Return the keys on projector and second tower."""
        vision = model.vision
        shape = tuple(vision.high_depths), tuple(vision.high_widths)
        return {
            "mm_hidden_size": vision.hidden_size,
            "mm_hidden_size_aux": vision.high.feature_size,
            "mm_projector_type": f"mlp{model.connector.depth}x_gelu",
            "mm_vision_select_feature": "patch",
            "mm_vision_tower_aux": next((name for name, there in _PUBLIC.items() if there == shape), _OTHER),
        }

    def vision_config(self, vision: VisionConfig) -> Tree:
        """Return the first tower's own configuration."""
        return transformers_vision_config(vision.low)

    def no_connector(self, model: ModelConfig) -> str | None:
        """Its norms have torch's epsilon."""
        if model.connector.layernorm_epsilon != 1e-5:
            return f"the connector's norms have an epsilon of {model.connector.layernorm_epsilon:g}, MiniGemini's 1e-5"
        own = self._written(model.language)
        wanted = getattr(model.language, "embedding_multiplier", 1.0) if own.multiplies_features else 1.0
        if model.connector.output_multiplier != wanted:
            there = model.connector.output_multiplier
            return f"image features are multiplied by {there} (model.connector.output_multiplier), here by {wanted}"
        return None

    def no_tower(self, vision: VisionConfig) -> str | None:
        """CLIP's, features of one layer, and all stages of a ConvNeXt that sees the file's pixels."""
        high = vision.high
        if vision.low_from != "high":
            return "the first tower has a rendering of its own (model.vision.low_from), MiniGemini's is the second's"
        if not vision.class_token:
            return "the first tower is not CLIP's, MiniGemini's is"
        if vision.feature_layers is not None:
            return "features of several layers are taken (model.vision.feature_layers), MiniGemini takes one layer's"
        if list(high.stages) != list(range(len(high.widths))):
            return "features of some stages are taken (model.vision.high_feature_stages), MiniGemini takes all"
        if high.patch_size != _PATCH:
            return f"the second tower's patches are of {high.patch_size} pixels, ConvNeXt's in timm of {_PATCH}"
        if high.layernorm_epsilon != _EPSILON:
            return f"the second tower's norms have an epsilon of {high.layernorm_epsilon:g}, timm's have {_EPSILON:g}"
        colours = {"image_mean": CLIP_MEAN, "image_std": CLIP_STD}
        if any(list(getattr(one, key)) != value for one in (vision, high) for key, value in colours.items()):
            return "pixels are normalised by others than CLIP's mean and deviation, which MiniGemini's code takes"
        return super().no_tower(vision.low)

    def refuses(self, model: ModelConfig) -> str | None:
        """Pictures are padded with their mean colour, or cut, by a bicubic filter."""
        image = model.image
        if image.kind not in _PLANS:
            return f"the image plan is {image.kind}, MiniGemini's are {' and '.join(_PLANS)}"
        if image.resample != "bicubic" or image.fill not in (None, "mean") or (image.kind == "crop" and image.fill):
            return "pictures are resized or filled otherwise than bicubic and with the mean colour (model.image)"
        if image.short_side not in (None, model.vision.high_image_size):
            return "a square is cut out of larger pictures (model.image.short_side), which MiniGemini's code does not"
        return super().refuses(model)

    def processor(self, model: ModelConfig, image_token: str) -> Tree:
        """Return none: Transformers has no class for it."""
        return {}

    def _check_width(self, source: Source, vision: Mapping[str, Any]) -> None:
        """Hold mining and projector against both towers.

        Raises:
            UserError: they are of other widths.
        """
        config, low, high = source.config, vision["hidden_size"], sum(vision["high_widths"])
        where, towers = config_file(source), (config["mm_vision_tower"], config["mm_vision_tower_aux"])
        if vision["feature_layers"] is not None:
            layers = config["mm_vision_select_layer"]
            raise UserError(f"{where}: mm_vision_select_layer is {layers!r}; MiniGemini takes one layer's features")
        for key, width, tower in (("mm_hidden_size", low, towers[0]), ("mm_hidden_size_aux", high, towers[1])):
            if config.get(key, width) != width:
                raise UserError(
                    f"{where}: {key} is {config[key]!r}, but the features of {tower!r} are {width} wide; correct one"
                )
        for name, width, tower in (
            ("model.vlm_uni_query_projector.1.weight", low, towers[0]),
            ("model.vlm_uni_aux_projector.1.weight", high, towers[1]),
            ("model.vlm_uni_val_projector.1.weight", high, towers[1]),
            ("model.mm_projector.0.weight", low, towers[0]),
        ):
            if (there := source.shape(name)[-1]) != width:
                raise UserError(
                    f"{source.path}: {name} is for features {there} wide, but those of {tower!r} are {width} wide; "
                    "name the tower that it was trained with"
                )


def _tail(name: Any) -> str:
    return str(name).rstrip("/").rpartition("/")[2]


def _convnext(source: Source) -> Tree:
    """Return the keys of the second tower, as a tower has them, by the shapes of its tensors.

    Raises:
        UserError: there are none, or some are missing.
    """
    pattern = re.compile(re.escape(_STAGES) + r"\.(\d+)\.blocks\.(\d+)\.gamma")
    places = sorted((int(found[1]), int(found[2])) for name in source.tensors if (found := pattern.fullmatch(name)))
    stages = sorted({stage for stage, _ in places})
    depths = tuple(sum(one == stage for one, _ in places) for stage in stages)
    wanted = [(stage, block) for stage, depth in enumerate(depths) for block in range(depth)]
    if not places or places != wanted:
        have = "none" if not places else f"blocks {depths} of the stages {stages}, not all in a row"
        raise UserError(
            f"{source.path}: has no whole second tower under {_AUX} ({have} there), and each picture is rendered for "
            f"two; put its weights, mm_vision_tower_aux {source.config['mm_vision_tower_aux']!r}, beside the others"
        )
    return {
        "patch_size": source.shape(f"{_STEM}.0.weight")[-1],
        "depths": depths,
        "widths": tuple(source.shape(f"{_STAGES}.{stage}.blocks.0.gamma")[0] for stage in stages),
        "feature_stages": tuple(range(1, len(stages) + 1)),
        "layernorm_epsilon": _EPSILON,
    }
