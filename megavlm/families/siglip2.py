"""SigLIP 2's NaFlex towers (arXiv 2502.14786) as Transformers writes them: pictures keep their proportions.

Those of one resolution are SigLIP's, in weights and in ``config.json`` (``model_type: siglip``).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from megavlm.architectures.towers.packed_vit.tables import SIGLIP2_VISION
from megavlm.config.errors import UserError
from megavlm.config.schema import ModelConfig
from megavlm.data.media import plan_of
from megavlm.data.plans_native import NaflexPlan
from megavlm.families.common import expect, need
from megavlm.families.family import Constants, Family, Tree, config_file
from megavlm.families.preprocessor import normalisation, processor_files, resampling
from megavlm.families.towers import LAST_HIDDEN_STATE, taken_layers
from megavlm.families.vit import OTHER_HALF
from megavlm.weights.rules import Table
from megavlm.weights.source import Source

PROCESSORS = ("Siglip2ImageProcessor", "Siglip2ImageProcessorFast", "Siglip2ImageProcessorPil")
_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
_DEFAULTS = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "patch_size": 16,
    "num_patches": 256, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh",
}  # fmt: skip
"""Of a ``Siglip2VisionConfig``."""


class Siglip2Family(Family):
    """A dual encoder, or its vision half."""

    name = "siglip2"
    title = "SigLIP 2's NaFlex towers in Transformers' layout"
    parts: ClassVar[tuple[str, ...]] = ("vision",)
    architectures: ClassVar[Mapping[str, tuple[str, ...]]] = {"vision": ("packed_vit",)}
    image_plan = "naflex"
    preprocesses = True
    styles: ClassVar = {"vision_model.": {}, "": {}}

    def detect(self, source: Source) -> bool:
        """By ``model_type``."""
        return source.config.get("model_type") in ("siglip2", "siglip2_vision_model")

    def probe(self, style: str) -> str:
        """Return the name of the patch embedding."""
        return style + "embeddings.patch_embedding.weight"

    def branches(self, source: Source) -> Tree:
        """Return the vision branch, and the image plan."""
        half, where = source.config.get("vision_config", source.config), config_file(source)
        vision = naflex_tower(half, source.feature_layer, where)
        return {"vision": vision | normalisation(source, None), "image": naflex_pictures(source, vision)}

    def tables(self, model: ModelConfig, style: str) -> Sequence[Table]:
        """Return the table."""
        aside = (*SIGLIP2_VISION.aside, OTHER_HALF)
        return [dataclasses.replace(SIGLIP2_VISION, prefix=style, aside=aside, names={"top": ""})]

    def config(self, model: ModelConfig, tokens: Mapping[str, int]) -> Tree:
        """Return the configuration of a vision half whose last layer is the last that runs."""
        vision = model.vision
        return {
            "architectures": ["Siglip2VisionModel"],
            "attention_dropout": 0.0,
            "hidden_act": {ours: theirs for theirs, ours in _ACTIVATIONS.items()}[vision.activation],
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.ffn_hidden_size,
            "layer_norm_eps": vision.layernorm_epsilon,
            "model_type": "siglip2_vision_model",
            "num_attention_heads": vision.num_attention_heads,
            "num_channels": 3,
            "num_hidden_layers": vision.num_layers,
            "num_patches": vision.positional_grid**2,
            "patch_size": vision.patch_size,
            "vision_use_head": False,
        }

    def constants(self, model: ModelConfig, style: str) -> Constants:
        """Return the norm behind the layers, where the features are taken in front of it."""
        if model.vision.post_layernorm:
            return {}
        prefix, shape = style + "post_layernorm.", (model.vision.hidden_size,)
        return {prefix + "weight": (shape, 1.0), prefix + "bias": (shape, 0.0)}

    def feature_layer(self, model: ModelConfig) -> Any:
        """Return the last layer, with which the tower ends here."""
        return LAST_HIDDEN_STATE if model.vision.post_layernorm else -1

    def refuses(self, model: ModelConfig) -> str | None:
        """Its layers are SigLIP's, its patches those of single pictures, its table is interpolated as pictures are."""
        vision = model.vision
        here = (vision.normalization, vision.activation in _ACTIVATIONS.values(), vision.gated_mlp, vision.conv_bias)
        same = here == ("LayerNorm", True, False, True) and vision.add_bias_linear and vision.add_qkv_bias
        own = (vision.rotary_base, vision.class_token, vision.pre_layernorm, vision.window_size, vision.deepstack)
        table = vision.positional_grid is not None and vision.positional_interpolation == "antialias"
        if not same or own != (None, False, False, None, 0) or not table or vision.temporal_patch_size != 1:
            return "the vision tower is not SigLIP 2's: that has SigLIP's layers and one table, resized as pictures are"
        return None

    def trained_pictures(self, model: ModelConfig, old: Mapping[str, Any]) -> Tree | None:
        """Return the number of patches."""
        plan = plan_of(model)
        if not isinstance(plan, NaflexPlan) or plan.merge != 1:
            raise UserError(
                f"model.image.kind: {model.image.kind} makes pictures that SigLIP 2's processor does not; set it to"
                " naflex, with model.vision.spatial_merge_size 1"
            )
        kind = old.get("image_processor_type")
        return {
            "image_processor_type": kind if kind in PROCESSORS else PROCESSORS[0],
            "max_num_patches": plan.max_num_patches,
            "patch_size": plan.patch,
        }


def naflex_tower(config: Mapping[str, Any], feature_layer: Any, where: str) -> Tree:
    """Return the recipe's ``model.vision`` of a ``Siglip2VisionConfig``.

    Raises:
        UserError: a key has a value that the model here does not know, or features of several layers are asked for.
    """
    expect(config, where, model_type="siglip2_vision_model", num_channels=3, hidden_act=tuple(_ACTIVATIONS))
    config = {**_DEFAULTS, **config}
    last = feature_layer == LAST_HIDDEN_STATE
    layers = taken_layers(config["num_hidden_layers"], -1 if last else feature_layer, where)
    if len(layers) > 1:
        raise UserError(f"{where}: of a tower for pictures of any size one layer is taken, not {layers}; name one")
    grid = math.isqrt(config["num_patches"])
    if grid**2 != need(config, "num_patches", where):
        raise UserError(f"{where}: num_patches is {config['num_patches']!r}, which is no square grid; correct it")
    return {
        "preset": "siglip2_naflex_vit",
        "patch_size": config["patch_size"],
        "hidden_size": config["hidden_size"],
        "num_layers": layers[0],
        "num_attention_heads": config["num_attention_heads"],
        "ffn_hidden_size": config["intermediate_size"],
        "layernorm_epsilon": config["layer_norm_eps"],
        "activation": _ACTIVATIONS[config["hidden_act"]],
        "positional_grid": grid,
        "post_layernorm": last,
        "conv_bias": True,
        "image_size": grid * config["patch_size"],
    }


def naflex_pictures(source: Source, vision: Mapping[str, Any]) -> Tree:
    """Return ``model.image`` as the image processor's file says it, or as its class does without one.

    Raises:
        UserError: pictures are treated in a way that is not done here.
    """
    found: Tree = {"kind": "naflex", "resample": "bilinear"}
    for path, tree in processor_files(source, areas=True):
        if not tree:
            continue
        where = str(path)
        expect(tree, where, do_resize=True, do_convert_rgb=True, do_center_crop=False, do_pad=False)
        expect(tree, where, image_processor_type=PROCESSORS, patch_size=vision["patch_size"])
        most = tree.get("max_num_patches", 256)
        if not isinstance(most, int) or isinstance(most, bool) or most < 1:
            raise UserError(
                f"{where}: max_num_patches is {str(most)[:40]!r}, which is no number of patches; correct it"
            )
        found |= {"max_num_patches": most, "resample": resampling({"resample": 2, **tree}, where)}
    return found
