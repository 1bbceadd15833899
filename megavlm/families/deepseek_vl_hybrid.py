"""DeepSeek-VL-7B (arXiv 2403.05525) as Transformers has it: SigLIP-L beside SAM-B, a layer for each, a Llama.

``DeepseekVLHybridForConditionalGeneration``. Its authors' own layout (``HybridVisionTower``) is not read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from megavlm.architectures.connectors.hybrid_split.tables import HYBRID_ALIGNER
from megavlm.architectures.pair_tables import LOW_TRANSFORMERS_VISION
from megavlm.architectures.towers.sam.tables import sam_table
from megavlm.config.errors import UserError
from megavlm.config.schema import ModelConfig
from megavlm.families.common import expect, need
from megavlm.families.deepseek_vl import DeepseekVLFamily
from megavlm.families.family import Tower, Tree, config_file
from megavlm.families.preprocessor import normalisation, processor_files, resampling
from megavlm.families.siglip_last import no_siglip_last, siglip_last
from megavlm.families.text import no_half, text_branch, text_config, text_table
from megavlm.families.towers import CLIP_MEAN, CLIP_STD, LAST_HIDDEN_STATE, transformers_vision_config
from megavlm.weights.rules import Table
from megavlm.weights.source import Source

_MIN_SIZE = 14
_PROCESSOR = "DeepseekVLHybridImageProcessor"
_SAM: Tree = {
    "hidden_size": 768, "output_channels": 256, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 1024,
    "patch_size": 16, "layer_norm_eps": 1e-6, "mlp_ratio": 4.0, "window_size": 14, "global_attn_indexes": (2, 5, 8, 11),
}  # fmt: skip
"""Of a ``SamVisionConfig``."""


class DeepseekVLHybridFamily(DeepseekVLFamily):
    """``DeepseekVLHybridForConditionalGeneration``."""

    name = "deepseek_vl_hybrid"
    title = "DeepSeek-VL-7B (DeepseekVLHybridForConditionalGeneration)"
    architectures: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "vision": ("vit_sam",), "connector": ("hybrid_split",), "language": ("decoder",),
    }  # fmt: skip
    image_plan = "fit_pair"

    def branches(self, source: Source) -> Tree:
        """Return all three branches, and what becomes of pictures."""
        config, where = source.config, config_file(source)
        low = siglip_last(need(config, "vision_config", where), LAST_HIDDEN_STATE, where)
        low |= normalisation(source, low["image_size"])
        side = low["image_size"] // low["patch_size"]
        high = _sam(need(config, "high_res_vision_config", where), side, f"{where}: high_res_vision_config")
        pictures, colours = _pictures(source, low["image_size"], high["image_size"])
        head = self.styles[self.style_of(source)]["head"]
        language = text_branch(source, need(config, "text_config", where), head, where)
        return {
            "vision": {
                **low, "preset": "siglip_sam", **{f"high_{key}": value for key, value in {**high, **colours}.items()}
            },
            "connector": {"preset": "hybrid_split"},
            "language": language | {"tie_word_embeddings": head + "weight" not in source},
            "image": pictures,
        }  # fmt: skip

    def tables(self, model: ModelConfig, style: str) -> Sequence[Table]:
        """Return the tables of both towers, the connector and the language model."""
        names = self.styles[style]
        sam = sam_table(
            model.vision.high, ours="high.", tower="model.high_res_vision_model.vision_encoder.", top="model."
        )
        return [
            dataclasses.replace(LOW_TRANSFORMERS_VISION, prefix=names["tower"]),
            sam,
            dataclasses.replace(HYBRID_ALIGNER, prefix=names["projector"]),
            text_table(model.language, model=names["model"], head=names["head"]),
        ]

    def config(self, model: ModelConfig, tokens: Mapping[str, int]) -> Tree:
        """Return the configuration."""
        return {
            "architectures": ["DeepseekVLHybridForConditionalGeneration"],
            "high_res_vision_config": _sam_config(model.vision.high),
            "image_token_id": tokens.get("image", model.language.vocab_size - 1),
            "model_type": self.name,
            "text_config": text_config(model.language),
            "tie_word_embeddings": model.language.tie_word_embeddings,
            "vision_config": transformers_vision_config(model.vision.low),
        }

    def tower_of(self, config: Mapping[str, Any], directory: Path) -> Tower | None:
        """It has two."""
        return None

    def with_tower(self, config: Tree, vision_config: Tree, layer: Any) -> Tree:
        """Another family's tower is one."""
        return config

    def processor(self, model: ModelConfig, image_token: str) -> Tree:
        """Return its class, and how many slots it writes."""
        return {"num_image_tokens": model.tokens_per_view, "processor_class": "DeepseekVLHybridProcessor"}

    def trained_pictures(self, model: ModelConfig, old: Mapping[str, Any]) -> Tree | None:
        """Return the keys of its own image processor."""
        image, vision = model.image, model.vision
        if image.fill not in (None, "mean"):
            raise UserError(
                f"model.image.fill: {image.fill}; DeepSeek-VL's image processor fills with model.vision.high_image_mean"
                ": choose mean"
            )
        return {
            "do_pad": True,
            "high_res_image_mean": list(vision.high_image_mean),
            "high_res_image_std": list(vision.high_image_std),
            "high_res_resample": {"lanczos": 1, "bilinear": 2, "bicubic": 3}[image.resample],
            "high_res_size": {"height": vision.high_image_size, "width": vision.high_image_size},
            "image_processor_type": _PROCESSOR,
            "min_size": _MIN_SIZE if image.min_side is None else image.min_side,
            "size": {"height": vision.image_size, "width": vision.image_size},
        }

    def refuses(self, model: ModelConfig) -> str | None:
        """Towers, connector, language model and image plan must be DeepSeek-VL-7B's kinds."""
        vision = model.vision
        if model.image.kind != self.image_plan:
            return f"the image plan is {model.image.kind}, DeepSeek-VL-7B's is {self.image_plan}"
        if vision.low_tiles != 1 or vision.low_whole:
            return "the first tower sees tiles (model.vision.low_tiles, low_whole), DeepSeek-VL-7B's the whole picture"
        if vision.ratio != 1:
            return "the second tower makes several features of a place, DeepSeek-VL-7B's one (model.vision)"
        whole = vision.high_global_layers
        if vision.high_second_neck_layer is None or not whole or whole[0] != vision.high_second_neck_layer:
            return (
                "the second neck is not that of the first global layer (model.vision.high_second_neck_layer), as"
                " DeepSeek-VL-7B's"
            )
        if vision.high_output_grid != vision.image_size // vision.patch_size:
            return "the second tower's map is not stretched to the first's patches (model.vision.high_output_grid)"
        return no_siglip_last(vision.low) or no_half(model.language)


def _sam(config: Mapping[str, Any], side: int, where: str) -> Tree:
    """Return the keys of the second tower, as a tower has them, of a ``SamVisionConfig``.

    Raises:
        UserError: a key has a value that the model here does not know.
    """
    expect(
        config, where, model_type="sam_vision_model", num_channels=3, hidden_act="gelu", qkv_bias=True,
        use_abs_pos=True, use_rel_pos=True,
    )  # fmt: skip
    tree = {**_SAM, **{key: value for key, value in config.items() if value is not None}}
    whole = list(tree["global_attn_indexes"])
    if not whole or not all(isinstance(one, int) and 0 <= one < tree["num_hidden_layers"] for one in whole):
        raise UserError(f"{where}.global_attn_indexes: {str(whole)[:60]} names no layer whose map a second neck takes")
    for key in ("image_size", "patch_size"):
        if not isinstance(tree[key], int):
            raise UserError(f"{where}.{key} is {tree[key]!r}; only squares are supported")
    ffn = tree.get("mlp_dim")
    return {
        "image_size": tree["image_size"],
        "patch_size": tree["patch_size"],
        "hidden_size": tree["hidden_size"],
        "num_layers": tree["num_hidden_layers"],
        "num_attention_heads": tree["num_attention_heads"],
        "ffn_hidden_size": int(tree["hidden_size"] * tree["mlp_ratio"]) if ffn is None else ffn,
        "window_size": tree["window_size"],
        "global_layers": whole,
        "neck_size": tree["output_channels"],
        "output_grid": side,
        "second_neck_layer": whole[0],
        "layernorm_epsilon": float(tree["layer_norm_eps"]),
    }


def _sam_config(vision: Any) -> Tree:
    return {
        "global_attn_indexes": list(vision.global_layers),
        "hidden_act": "gelu",
        "hidden_size": vision.hidden_size,
        "image_size": vision.image_size,
        "layer_norm_eps": vision.layernorm_epsilon,
        "mlp_dim": vision.ffn_hidden_size,
        "mlp_ratio": vision.ffn_hidden_size / vision.hidden_size,
        "model_type": "sam_vision_model",
        "num_attention_heads": vision.num_attention_heads,
        "num_channels": 3,
        "num_hidden_layers": vision.num_layers,
        "output_channels": vision.neck_size,
        "patch_size": vision.patch_size,
        "qkv_bias": True,
        "use_abs_pos": True,
        "use_rel_pos": True,
        "window_size": vision.window_size,
    }


def _pictures(source: Source, small: int, large: int) -> tuple[Tree, Tree]:
    """Return ``model.image`` (empty where no file says it), and the second tower's mean and deviation.

    Raises:
        UserError: pictures are treated in a way that is not done here, or one of the two renderings is missing.
    """
    colours: Tree = {"image_mean": CLIP_MEAN, "image_std": CLIP_STD}
    for path, tree in processor_files(source):
        if not tree:
            continue
        where, kind = str(path), str(tree.get("image_processor_type", _PROCESSOR))
        if not kind.startswith(_PROCESSOR):
            raise UserError(
                f"{where}: image_processor_type is {kind[:40]!r}, which makes one rendering of a picture, and "
                f"DeepSeek-VL-7B takes two; set it to {_PROCESSOR}"
            )
        if tree.get("do_pad") is False or tree.get("do_resize") is False:
            raise UserError(
                f"{where}: do_pad or do_resize is false, so that pictures are not brought to the towers' squares; set "
                "both to true"
            )
        size = tree.get("high_res_size", {"height": large, "width": large})
        if size != {"height": large, "width": large}:
            raise UserError(
                f"{where}: high_res_size is {str(size)[:60]}, but config.json's high_res_vision_config is for {large} x"
                f" {large}; correct one"
            )
        least = tree.get("min_size", _MIN_SIZE)
        if not isinstance(least, int) or isinstance(least, bool) or not 0 < least <= large:
            raise UserError(f"{where}: min_size is {str(least)[:40]!r}; it must be a length from 1 to {large} pixels")
        resample = resampling(tree, where)
        other = resampling({"resample": tree.get("high_res_resample", 3)}, where)
        if other != resample:
            raise UserError(
                f"{where}: resample is {resample} and high_res_resample {other}; one filter for both renderings is"
                " supported: set them alike"
            )
        for key in colours:
            value = tree.get(f"high_res_{key}", colours[key])
            if not isinstance(value, list) or len(value) != 3 or not all(isinstance(one, int | float) for one in value):
                raise UserError(
                    f"{where}: high_res_{key} is {str(value)[:60]}; it must be three numbers, one per colour"
                )
            colours[key] = [float(one) for one in value]
        if tree.get("do_normalize") is False:
            colours = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
        return {"kind": "fit_pair", "fill": "mean", "min_side": least, "resample": resample}, colours
    return {}, colours
