"""Vision towers: Qwen-VL's, and CLIP and SigLIP as Transformers writes them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from megavlm.config.errors import UserError
from megavlm.config.schema import VisionConfig
from megavlm.families.common import expect, need, number

Tree = dict[str, Any]

QWEN_EPSILON = 1e-6  # of the norms; Qwen-VL's code has it fixed
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
_ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh"}
_THEIR_ACTIVATIONS = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}


def qwen_vision(visual: Mapping[str, Any], rows: int, where: str) -> Tree:
    """Return the recipe's ``model.vision`` of Qwen-VL's ``visual`` settings.

    Args:
        visual: the settings.
        rows: rows of the positional table.
        where: the file, for messages.

    Raises:
        UserError: a key is missing, or the table is not that of a square grid.
    """
    width, grid = number(visual, "width", where), math.isqrt(rows)
    if grid**2 != rows:
        raise UserError(f"{where}: a positional table with {rows} rows, which is no square grid")
    return {
        "preset": "openclip_vit_bigg",
        "image_size": need(visual, "image_size", where),
        "patch_size": need(visual, "patch_size", where),
        "hidden_size": width,
        "num_layers": need(visual, "layers", where),
        "num_attention_heads": need(visual, "heads", where),
        "ffn_hidden_size": int(width * number(visual, "mlp_ratio", where)),
        "positional_grid": grid,
        "layernorm_epsilon": QWEN_EPSILON,
    }


def qwen_visual(vision: VisionConfig) -> Tree:
    """Return Qwen-VL's ``visual`` settings of a tower, without those of the resampler."""
    ratio = vision.ffn_hidden_size / vision.hidden_size
    # The original cuts off: int(width * ratio) must give the width of the MLP again.
    for digits in range(1, 17):
        rounded = round(ratio, digits)
        if int(vision.hidden_size * rounded) == vision.ffn_hidden_size:
            ratio = rounded
            break
    return {
        "heads": vision.num_attention_heads,
        "image_size": vision.image_size,
        "layers": vision.num_layers,
        "mlp_ratio": ratio,
        "patch_size": vision.patch_size,
        "width": vision.hidden_size,
    }


LAST_HIDDEN_STATE = "last_hidden_state"
"""A feature layer: the last one, behind the norm that follows it (SigLIP; CLIP norms its pooled output alone)."""


FeatureLayer = int | str | Sequence[int]
"""Whose outputs are the features: an index of Transformers' ``hidden_states`` (-1 the last layer, -2 the one before),
several of them, whose features lie side by side, or LAST_HIDDEN_STATE."""


def transformers_vision(config: Mapping[str, Any], feature_layer: FeatureLayer, where: str) -> Tree:
    """Return the recipe's ``model.vision`` of a CLIP or SigLIP vision configuration.

    Args:
        config: a ``CLIPVisionConfig`` or ``SiglipVisionConfig``.
        feature_layer: whose output is taken.
        where: the file, for messages.

    Raises:
        UserError: a key is missing, or has a value that the model here does not know.
    """
    kind = config.get("model_type", "clip_vision_model")
    clip = kind.startswith("clip")
    expect(config, where, model_type=("clip_vision_model", "siglip_vision_model"), num_channels=3)
    defaults: Tree = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    defaults |= {"image_size": 224, "patch_size": 32 if clip else 16}
    config = {**defaults, **config}
    activation = config.get("hidden_act", "quick_gelu" if clip else "gelu_pytorch_tanh")
    expect({"hidden_act": activation}, where, hidden_act=tuple(_ACTIVATIONS))
    size, patch = config["image_size"], config["patch_size"]
    last = feature_layer == LAST_HIDDEN_STATE
    layers = taken_layers(config["num_hidden_layers"], -1 if last else feature_layer, where)
    return {
        "preset": "clip_vit" if clip else "siglip_vit",
        "image_size": size,
        "patch_size": patch,
        "hidden_size": config["hidden_size"],
        "num_layers": max(layers),
        "num_attention_heads": config["num_attention_heads"],
        "ffn_hidden_size": config["intermediate_size"],
        "positional_grid": size // patch,
        "layernorm_epsilon": config.get("layer_norm_eps", 1e-5 if clip else 1e-6),
        "activation": _ACTIVATIONS[activation],
        "class_token": clip,
        "conv_bias": not clip,
        "pre_layernorm": clip,
        "post_layernorm": not clip and last,
        "feature_layers": layers if len(layers) > 1 else None,
        "image_mean": CLIP_MEAN if clip else [0.5] * 3,
        "image_std": CLIP_STD if clip else [0.5] * 3,
    }


def taken_layers(layers: int, feature_layer: Any, where: str) -> list[int]:
    """Return the layers whose outputs are the features, counted from 1; 0 is what goes into the first.

    Args:
        layers: of the tower.
        feature_layer: an index of Transformers' ``hidden_states``, or a list of them.
        where: the file, for messages.

    Raises:
        UserError: ``feature_layer`` is neither, or outside of the tower.
    """
    wanted = feature_layer if isinstance(feature_layer, list | tuple) else [feature_layer]
    if not wanted or not all(isinstance(one, int) and not isinstance(one, bool) for one in wanted):
        raise UserError(
            f"{where}: vision_feature_layer {str(feature_layer)[:60]!r} is neither a number nor a list of numbers"
        )
    found = [one if one >= 0 else layers + 1 + one for one in wanted]
    for one, number_ in zip(wanted, found, strict=True):
        if not 0 <= number_ <= layers or (len(found) == 1 and number_ == 0):
            raise UserError(f"{where}: vision_feature_layer {one} is outside of the tower's {layers} layers")
    if max(found) == 0:
        raise UserError(f"{where}: vision_feature_layer {wanted} takes what goes into the first layer alone")
    return found


def transformers_vision_config(vision: VisionConfig) -> Tree:
    """Return the vision configuration of a CLIP or SigLIP tower that ends where its features are taken."""
    clip = vision.class_token
    config: Tree = {
        "attention_dropout": 0.0,
        "hidden_act": _THEIR_ACTIVATIONS[vision.activation],
        "hidden_size": vision.hidden_size,
        "image_size": vision.image_size,
        "intermediate_size": vision.ffn_hidden_size,
        "layer_norm_eps": vision.layernorm_epsilon,
        "model_type": "clip_vision_model" if clip else "siglip_vision_model",
        "num_attention_heads": vision.num_attention_heads,
        "num_channels": 3,
        "num_hidden_layers": vision.num_layers,
        "patch_size": vision.patch_size,
    }
    if not clip:
        config["vision_use_head"] = False
    return config
