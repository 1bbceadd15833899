"""InternViT, the tower of InternVL: in Transformers' layout, in its authors', and alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from megavlm.config.errors import UserError
from megavlm.config.schema import ModelConfig, VisionConfig
from megavlm.families.common import expect, flag, number
from megavlm.families.family import Family, Tree, config_file
from megavlm.families.vit import beside_plain
from megavlm.weights.rules import ONE_AXIS, QKV, QKV_BLOCKS, TWO_AXES, Aside, Table, both, row
from megavlm.weights.source import Source

_NORMS = {"layer_norm": "LayerNorm", "rms_norm": "RMSNorm"}
_QK_EPSILON = 1e-6  # Transformers has it fixed
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's

_PATCHES, _LAYER_BEHIND = "transformer.layers.{}.", "layer behind the one whose features are taken"

TRANSFORMERS_TOWER = Table(
    part="vision",
    ours=_PATCHES,
    theirs="{tower}encoder.layer.{}.",
    layer=(
        *both("input_layernorm", "layernorm_before"),
        *both("self_attention.linear_qkv", "attention.q_proj attention.k_proj attention.v_proj", QKV),
        row("self_attention.query_norm.weight", "attention.q_norm.weight"),
        row("self_attention.key_norm.weight", "attention.k_norm.weight"),
        *both("self_attention.linear_proj", "attention.projection_layer"),
        row("self_attn_bda.weight", "lambda_1"),
        *both("pre_mlp_layernorm", "layernorm_after"),
        *both("mlp.linear_fc1", "mlp.fc1"),
        *both("mlp.linear_fc2", "mlp.fc2"),
        row("mlp_bda.weight", "lambda_2"),
    ),
    rest=(
        row("class_embedding", "{tower}embeddings.cls_token", TWO_AXES),
        row("positional_embedding", "{tower}embeddings.position_embeddings", ONE_AXIS),
        *both("conv1", "{tower}embeddings.patch_embeddings.projection"),
    ),
    aside=(
        Aside(r"{tower}embeddings\.mask_token", "mask token of the tower's own training", carried=True),
        Aside(r"{tower}encoder\.layer\.(\d+)\..*", _LAYER_BEHIND, carried=True, behind=True),
    ),
)
"""InternViT as Transformers writes it."""

ORIGINAL_TOWER = Table(
    part="vision",
    ours=_PATCHES,
    theirs="{tower}encoder.layers.{}.",
    layer=(
        *both("input_layernorm", "norm1"),
        *both("self_attention.linear_qkv", "attn.qkv", QKV_BLOCKS),
        row("self_attention.query_norm.weight", "attn.q_norm.weight"),
        row("self_attention.key_norm.weight", "attn.k_norm.weight"),
        *both("self_attention.linear_proj", "attn.proj"),
        row("self_attn_bda.weight", "ls1"),
        *both("pre_mlp_layernorm", "norm2"),
        *both("mlp.linear_fc1", "mlp.fc1"),
        *both("mlp.linear_fc2", "mlp.fc2"),
        row("mlp_bda.weight", "ls2"),
    ),
    rest=(
        row("class_embedding", "{tower}embeddings.class_embedding", TWO_AXES),
        row("positional_embedding", "{tower}embeddings.position_embedding", ONE_AXIS),
        *both("conv1", "{tower}embeddings.patch_embedding"),
    ),
    aside=(Aside(r"{tower}encoder\.layers\.(\d+)\..*", _LAYER_BEHIND, carried=True, behind=True),),
)
"""InternViT as its authors write it."""


class InternViTFamily(Family):
    """InternViT alone, in the authors' layout."""

    name = "intern_vit"
    title = "InternViT towers in their authors' layout"
    parts: ClassVar[tuple[str, ...]] = ("vision",)
    architectures: ClassVar[Mapping[str, tuple[str, ...]]] = {"vision": ("vit",)}

    def detect(self, source: Source) -> bool:
        """By ``model_type``."""
        return source.config.get("model_type") == "intern_vit_6b"

    def branches(self, source: Source) -> Tree:
        """Return the vision branch; features are those of the last layer, as InternVL takes them."""
        return {"vision": original_tower(source.config, -1, config_file(source))}

    def tables(self, model: ModelConfig, style: str) -> Sequence[Table]:
        """Return the table."""
        return [dataclasses.replace(ORIGINAL_TOWER, names={"tower": ""})]

    def config(self, model: ModelConfig, tokens: Mapping[str, int]) -> Tree:
        """Return the configuration of a tower that ends with the layer whose features are taken."""
        return original_config(model.vision)

    def refuses(self, model: ModelConfig) -> str | None:
        """It is InternViT or it is not."""
        return no_intern_vit(model)


def no_intern_vit(model: ModelConfig) -> str | None:
    """Return why a model's tower is not InternViT, or None."""
    vision = model.vision
    if vision.feature_layers is not None or vision.s2_scales is not None:
        return "the vision tower is no InternViT"
    kept = (vision.class_token, vision.conv_bias, vision.layer_scale, vision.activation == "gelu")
    if not all(kept) or vision.pre_layernorm or vision.post_layernorm or beside_plain(vision) is not None:
        return "the vision tower is no InternViT"
    if vision.qk_norm is not None and vision.layernorm_epsilon != _QK_EPSILON:
        return f"the tower's norms have the epsilon {vision.layernorm_epsilon}; InternViT's code has {_QK_EPSILON}"
    return None


def transformers_tower(config: Mapping[str, Any], layer: Any, where: str) -> Tree:
    """Return the recipe's ``model.vision`` of an ``InternVLVisionConfig``.

    Raises:
        UserError: a key has a value that the model here does not know.
    """
    expect(config, where, model_type="internvl_vision", use_absolute_position_embeddings=True, use_mean_pooling=True)
    qk_norm = flag(config, "use_qk_norm", where, default=False)
    if qk_norm:
        expect(config, where, layer_norm_eps=_QK_EPSILON)
    defaults = {
        "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096,
        "image_size": 448, "patch_size": 14, "norm_type": "layer_norm",
    }  # fmt: skip
    config = {**defaults, **config, "layer_scale": config.get("layer_scale_init_value", 0.1)}
    return _tower(config, layer, where, bias=flag(config, "attention_bias", where, default=False), qk_norm=qk_norm)


def original_tower(config: Mapping[str, Any], layer: Any, where: str) -> Tree:
    """Return the recipe's ``model.vision`` of an ``InternVisionConfig``.

    Raises:
        UserError: a key has a value that the model here does not know.
    """
    expect(config, where, model_type="intern_vit_6b", use_moe=False)
    defaults = {
        "hidden_size": 3200, "num_hidden_layers": 48, "num_attention_heads": 25, "intermediate_size": 12800,
        "image_size": 224, "patch_size": 14, "norm_type": "rms_norm",
    }  # fmt: skip
    qk_norm = flag(config, "qk_normalization", where, default=True)
    bias = flag(config, "qkv_bias", where, default=False)
    config = {**defaults, **config, "layer_scale": config.get("initializer_factor", 0.1)}
    return _tower(config, layer, where, bias=bias, qk_norm=qk_norm)


def _tower(config: Mapping[str, Any], layer: Any, where: str, *, bias: bool, qk_norm: bool) -> Tree:
    """Return ``model.vision`` of what both layouts call alike, ``layer_scale``, and the two keys that they do not."""
    expect(config, where, hidden_act="gelu", num_channels=3, norm_type=tuple(_NORMS))
    size, patch = _side(config, "image_size", where), _side(config, "patch_size", where)
    return {
        "preset": "intern_vit",
        "image_size": size,
        "patch_size": patch,
        "hidden_size": config["hidden_size"],
        "num_layers": _layers(config["num_hidden_layers"], layer, where),
        "num_attention_heads": config["num_attention_heads"],
        "ffn_hidden_size": config["intermediate_size"],
        "positional_grid": size // patch,
        "layernorm_epsilon": number(config, "layer_norm_eps", where, 1e-6),
        "normalization": _NORMS[config["norm_type"]],
        "add_qkv_bias": bias,
        "qk_norm": "width" if qk_norm else None,
        "layer_scale_init": number(config, "layer_scale", where) or 0.1,
        "image_mean": list(MEAN),
        "image_std": list(STD),
    }


def tower_config(vision: VisionConfig) -> Tree:
    """Return what both layouts call alike."""
    return {
        "attention_dropout": 0.0,
        "hidden_act": "gelu",
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.ffn_hidden_size,
        "layer_norm_eps": vision.layernorm_epsilon,
        "norm_type": {ours: theirs for theirs, ours in _NORMS.items()}[vision.normalization],
        "num_attention_heads": vision.num_attention_heads,
        "num_channels": 3,
        "num_hidden_layers": vision.num_layers,
    }


def original_config(vision: VisionConfig) -> Tree:
    """Return an ``InternVisionConfig``."""
    return {
        **tower_config(vision),
        "architectures": ["InternVisionModel"],
        "image_size": vision.positional_grid * vision.patch_size,
        "initializer_factor": vision.layer_scale_init,
        "model_type": "intern_vit_6b",  # of the 300M too
        "patch_size": vision.patch_size,
        "qk_normalization": vision.qk_norm is not None,
        "qkv_bias": vision.add_qkv_bias,
    }


def _side(config: Mapping[str, Any], key: str, where: str) -> int:
    """Return the side of a square; Transformers writes both of them."""
    value = config[key]
    sides = value if isinstance(value, list) else [value]
    if len(set(sides)) != 1 or not isinstance(sides[0], int) or sides[0] <= 0:
        raise UserError(f"{where}: {key} is {value!r}; only squares are supported")
    return sides[0]


def _layers(count: int, layer: Any, where: str) -> int:
    """Return how many layers lie below the features that are taken."""
    if not isinstance(layer, int):
        raise UserError(f"{where}: the feature layer is {layer!r}; of InternViT one layer is taken: give its number")
    taken = layer if layer >= 0 else count + 1 + layer
    if not 0 < taken <= count:
        raise UserError(f"{where}: the feature layer {layer} is outside of the tower's {count} layers; correct one")
    return taken
