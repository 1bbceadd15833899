"""EVA02's towers (arXiv 2303.11331, 2303.15389): in timm's layout, and in that of EVA-CLIP's authors.

Neither is in Transformers. timm writes a ``config.json`` with the name of the architecture; the authors' checkpoint has
none, and the text tower beside it (QuanSun/EVA-CLIP, ``EVA02_CLIP_L_336_psz14_s6B.pt``; Bunny reads that file). Shapes
are those of the tensors.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from megavlm.architectures.towers.vit.tables import EVA02_VISION
from megavlm.config.errors import UserError
from megavlm.config.schema import ModelConfig, VisionConfig
from megavlm.families.family import Constants, Family, Tree, config_file
from megavlm.families.towers import CLIP_MEAN, CLIP_STD, LAST_HIDDEN_STATE, taken_layers
from megavlm.weights.rules import Table
from megavlm.weights.source import Source

_HEAD = 64
"""Width of a head, of all sizes (timm's ``eva02_*``)."""
_GRID = 16
"""Side of the grid that the rotary angles were learned on (``ref_feat_shape``, ``pt_hw_seq_len``)."""
_EPSILON = 1e-6
_TIMM = {
    "query": "q_proj.bias", "value": "v_proj.bias", "inner": "norm", "gate": "fc1_g", "up": "fc1_x", "inside": "norm",
    "down": "fc2",
}  # fmt: skip
AUTHORS = {
    "query": "q_bias", "value": "v_bias", "inner": "inner_attn_ln", "gate": "w1", "up": "w2", "inside": "ffn_ln",
    "down": "w3",
}  # fmt: skip
"""Words of the authors' naming."""


class Eva02Family(Family):
    """A tower alone, or with the text tower beside it."""

    name = "eva02"
    title = "EVA02 towers in timm's layout or their authors'"
    parts: ClassVar[tuple[str, ...]] = ("vision",)
    architectures: ClassVar[Mapping[str, tuple[str, ...]]] = {"vision": ("vit",)}
    styles: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "timm": {"top": "", **_TIMM},
        "timm in open_clip": {"top": "visual.trunk.", **_TIMM},
        "authors": {"top": "visual.", **AUTHORS},
        "authors, the tower alone": {"top": "", **AUTHORS},
    }

    def detect(self, source: Source) -> bool:
        """By its names; a ``config.json`` beside the authors' file is of something else."""
        return any(
            self.probe(style) in source and words["top"] + "pos_embed" in source for style, words in self.styles.items()
        )

    def probe(self, style: str) -> str:
        """Return the name of the first gate."""
        return _gate(self.styles[style])

    def branches(self, source: Source) -> Tree:
        """Return the vision branch."""
        vision = eva02_tower(source, self.styles[self.style_of(source)], source.feature_layer)
        return {"vision": vision | _normalisation(source)}

    def tables(self, model: ModelConfig, style: str) -> Sequence[Table]:
        """Return the table."""
        return [eva02_table(self.styles[style])]

    def config(self, model: ModelConfig, tokens: Mapping[str, int]) -> Tree:
        """Return timm's configuration of a tower whose last layer is the last that runs."""
        vision = model.vision
        size, mean, std = vision.positional_grid * vision.patch_size, vision.image_mean, vision.image_std
        return {
            "architecture": "eva02_large_patch14_clip_336",
            "global_pool": "",
            "model_args": {
                "depth": vision.num_layers, "embed_dim": vision.hidden_size, "img_size": size,
                "mlp_ratio": vision.ffn_hidden_size / vision.hidden_size + 1e-6,  # which is cut off
                "num_heads": vision.num_attention_heads, "patch_size": vision.patch_size,
                "scale_attn_inner": vision.attention_norm, "scale_mlp": vision.mlp_norm,
            },
            "num_classes": 0,
            "num_features": vision.hidden_size,
            "pretrained_cfg": {
                "crop_mode": "center", "crop_pct": 1.0, "fixed_input_size": True, "input_size": [3, size, size],
                "interpolation": "bicubic", "mean": list(mean), "num_classes": 0, "std": list(std),
            },
        }  # fmt: skip

    def constants(self, model: ModelConfig, style: str) -> Constants:
        """Return the norm behind the layers, where the features are taken in front of it."""
        if model.vision.post_layernorm:
            return {}
        top, shape = self.styles[style]["top"], (model.vision.hidden_size,)
        return {f"{top}norm.weight": (shape, 1.0), f"{top}norm.bias": (shape, 0.0)}

    def feature_layer(self, model: ModelConfig) -> Any:
        """Return the last layer, with which the tower ends here, or several."""
        if model.vision.feature_layers is not None:
            return list(model.vision.feature_layers)
        return LAST_HIDDEN_STATE if model.vision.post_layernorm else -1

    def refuses(self, model: ModelConfig) -> str | None:
        """It is EVA02 or it is not."""
        return no_eva02(model.vision)


def eva02_tower(source: Source, words: Mapping[str, str], feature_layer: Any) -> Tree:
    """Return the recipe's ``model.vision`` of a tower's tensors.

    Args:
        source: holds them.
        words: of the naming (``Eva02Family.styles``), with what stands in front of all names (``top``).
        feature_layer: whose output is taken.

    Raises:
        UserError: they make no tower that is known here.
    """
    top, where, first = words["top"], str(source.path), f"{words['top']}blocks.0."
    rows, width = source.shape(top + "pos_embed")[-2:]
    patch, ffn = source.shape(top + "patch_embed.proj.weight")[-1], source.shape(_gate(words))[0]
    grid = math.isqrt(rows - 1)
    if grid**2 + 1 != rows:
        raise UserError(f"{where}: {top}pos_embed has {rows} rows, which are no square grid and a class token")
    if first + "attn.q_proj.weight" not in source:
        raise UserError(f"{where}: has no {first}attn.q_proj.weight; EVA02's small towers (fused qkv) are not read")
    numbers = [re.match(re.escape(top) + r"blocks\.(\d+)\.", name) for name in source.tensors]
    count = 1 + max(int(found[1]) for found in numbers if found)
    last = feature_layer == LAST_HIDDEN_STATE
    layers = taken_layers(count, -1 if last else feature_layer, where)
    return {
        "preset": "eva02_vit",
        "image_size": grid * patch,
        "patch_size": patch,
        "hidden_size": width,
        "num_layers": max(layers),
        "num_attention_heads": width // _HEAD,
        "ffn_hidden_size": ffn,
        "positional_grid": grid,
        "class_token": True,
        "attention_norm": f"{first}attn.{words['inner']}.weight" in source,
        "mlp_norm": f"{first}mlp.{words['inside']}.weight" in source,
        "post_layernorm": last,
        "feature_layers": layers if len(layers) > 1 else None,
    }


def eva02_table(words: Mapping[str, str]) -> Table:
    """Return the table of a naming, see :func:`eva02_tower`."""
    return dataclasses.replace(EVA02_VISION, prefix=words["top"], names={**words, "whole": ""})


def no_eva02(vision: VisionConfig) -> str | None:
    """Return why a tower is not EVA02, or None."""
    parts = (vision.class_token, vision.conv_bias, vision.gated_mlp, vision.mlp_norm, vision.add_qkv_bias)
    others = (vision.pre_layernorm, vision.qk_norm, vision.layer_scale, vision.key_bias, vision.register_tokens)
    numbers = (vision.rotary_base, vision.rotary_grid, vision.layernorm_epsilon, vision.normalization)
    if not all(parts) or any(others) or numbers != (10000.0, _GRID, _EPSILON, "LayerNorm"):
        return "the vision tower is not EVA02's"
    if vision.s2_scales is not None:
        return "the tower sees pictures at several sizes (model.vision.s2_scales), for which this layout has no word"
    if vision.positional_grid != vision.image_size // vision.patch_size:
        return f"the tower's positional table is {vision.positional_grid} wide, for images of another size"
    if vision.hidden_size != _HEAD * vision.num_attention_heads:
        return f"its heads are {vision.hidden_size // vision.num_attention_heads} wide; EVA02's have {_HEAD}"
    return None


def _gate(words: Mapping[str, str]) -> str:
    return f"{words['top']}blocks.0.mlp.{words['gate']}.weight"


def _normalisation(source: Source) -> Tree:
    """Return mean and standard deviation of timm's configuration, or CLIP's, which its authors' code has fixed.

    Raises:
        UserError: the tower is for pictures of another number of colours, or a value is none.
    """
    told = source.config.get("pretrained_cfg") or {}
    found: Tree = {"image_mean": told.get("mean", CLIP_MEAN), "image_std": told.get("std", CLIP_STD)}
    for key, value in found.items():
        if not (isinstance(value, list) and len(value) == 3 and all(isinstance(one, int | float) for one in value)):
            name = f"pretrained_cfg.{key.removeprefix('image_')}"
            raise UserError(f"{config_file(source)}: {name} is {str(value)[:60]}; it must be three numbers")
    return found
