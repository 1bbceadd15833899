"""DINOv2's towers, with registers (arXiv 2309.16588) and without (2304.07193), as Transformers writes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from megavlm.architectures.towers.vit.tables import DINOV2_VISION
from megavlm.config.errors import UserError
from megavlm.config.schema import ModelConfig, VisionConfig
from megavlm.families.common import expect, flag, number
from megavlm.families.family import Constants, Family, Tree, config_file
from megavlm.families.preprocessor import normalisation
from megavlm.families.towers import LAST_HIDDEN_STATE, taken_layers
from megavlm.weights.rules import Table
from megavlm.weights.source import Source

_REGISTERS = "dinov2_with_registers"
_ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}
_DEFAULTS: Tree = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "mlp_ratio": 4, "hidden_act": "gelu",
    "image_size": 224, "patch_size": 16,
}  # fmt: skip
"""Of both configurations. Published towers have 518 and 14."""
_MLP = {False: {"fc1": "fc1", "fc2": "fc2"}, True: {"fc1": "weights_in", "fc2": "weights_out"}}
"""Names of the MLP's layers, without and with a gate."""
_RATIOS = range(1, 65)


class Dinov2Family(Family):
    """``Dinov2Model`` and ``Dinov2WithRegistersModel``."""

    name = "dinov2"
    title = "DINOv2 towers, with registers and without, in Transformers' layout"
    parts: ClassVar[tuple[str, ...]] = ("vision",)
    architectures: ClassVar[Mapping[str, tuple[str, ...]]] = {"vision": ("vit",)}

    def detect(self, source: Source) -> bool:
        """By ``model_type``."""
        return source.config.get("model_type") in ("dinov2", _REGISTERS)

    def branches(self, source: Source) -> Tree:
        """Return the vision branch; pictures are as large as the table, unless a recipe says else."""
        vision = dinov2_tower(source.config, source.feature_layer, config_file(source))
        return {"vision": vision | normalisation(source, None)}

    def tables(self, model: ModelConfig, style: str) -> Sequence[Table]:
        """Return the table."""
        return [dataclasses.replace(DINOV2_VISION, names=_MLP[model.vision.gated_mlp])]

    def config(self, model: ModelConfig, tokens: Mapping[str, int]) -> Tree:
        """Return the configuration of a tower whose last layer is the last that runs."""
        vision, registers = model.vision, model.vision.register_tokens
        config: Tree = {
            "architectures": ["Dinov2WithRegistersModel" if registers else "Dinov2Model"],
            "attention_probs_dropout_prob": 0.0,
            "drop_path_rate": 0.0,
            "hidden_act": "gelu" if vision.gated_mlp else _theirs(vision.activation),
            "hidden_dropout_prob": 0.0,
            "hidden_size": vision.hidden_size,
            "image_size": vision.positional_grid * vision.patch_size,
            "layer_norm_eps": vision.layernorm_epsilon,
            "layerscale_value": vision.layer_scale_init,
            "mlp_ratio": _ratio(vision),
            "model_type": _REGISTERS if registers else "dinov2",
            "num_attention_heads": vision.num_attention_heads,
            "num_channels": 3,
            "num_hidden_layers": vision.num_layers,
            "patch_size": vision.patch_size,
            "qkv_bias": vision.add_qkv_bias,
            "use_swiglu_ffn": vision.gated_mlp,
        }
        return config | ({"num_register_tokens": registers} if registers else {})

    def constants(self, model: ModelConfig, style: str) -> Constants:
        """Return the mask of the tower's own training, and the norm behind layers that are not its last ones."""
        width = model.vision.hidden_size
        found: Constants = {"embeddings.mask_token": ((1, width), 0.0)}
        if not model.vision.post_layernorm:
            found |= {"layernorm.weight": ((width,), 1.0), "layernorm.bias": ((width,), 0.0)}
        return found

    def feature_layer(self, model: ModelConfig) -> Any:
        """Return the last layer, with which the tower ends here, or several."""
        if model.vision.feature_layers is not None:
            return list(model.vision.feature_layers)
        return LAST_HIDDEN_STATE if model.vision.post_layernorm else -1

    def refuses(self, model: ModelConfig) -> str | None:
        """It is DINOv2 or it is not."""
        vision = model.vision
        parts = (vision.class_token, vision.conv_bias, vision.layer_scale, vision.key_bias)
        others = (vision.pre_layernorm, vision.qk_norm, vision.mlp_norm, vision.attention_norm, vision.s2_scales)
        if not all(parts) or any(others) or vision.rotary_base is not None or vision.normalization != "LayerNorm":
            return "the vision tower is not DINOv2's, which has a class token, layer scale and a table of positions"
        if vision.positional_antialias != bool(vision.register_tokens):
            return (
                f"the table is interpolated {'with' if vision.positional_antialias else 'without'} a filter "
                "(model.vision.positional_antialias), which DINOv2's code does with registers and not without"
            )
        if _ratio(vision) is None:
            return f"no mlp_ratio of DINOv2's gives an MLP of {vision.ffn_hidden_size} (model.vision.ffn_hidden_size)"
        return None


def dinov2_tower(config: Mapping[str, Any], feature_layer: Any, where: str) -> Tree:
    """Return the recipe's ``model.vision`` of one of the two configurations.

    Raises:
        UserError: a key has a value that the model here does not know.
    """
    registers = config.get("model_type") == _REGISTERS
    expect(config, where, num_channels=3, hidden_act=tuple(_ACTIVATIONS))
    config = {**_DEFAULTS, **{key: value for key, value in config.items() if value is not None}}
    size, patch = (_side(config, key, where) for key in ("image_size", "patch_size"))
    gated = flag(config, "use_swiglu_ffn", where, default=False)
    width, ratio = config["hidden_size"], number(config, "mlp_ratio", where)
    last = feature_layer == LAST_HIDDEN_STATE
    layers = taken_layers(config["num_hidden_layers"], -1 if last else feature_layer, where)
    return {
        "preset": "dinov2_vit",
        "image_size": size,
        "patch_size": patch,
        "hidden_size": width,
        "num_layers": max(layers),
        "num_attention_heads": config["num_attention_heads"],
        "ffn_hidden_size": _ffn(width, ratio, gated=gated),
        "positional_grid": size // patch,
        "positional_antialias": registers,
        "layernorm_epsilon": number(config, "layer_norm_eps", where, 1e-6),
        "activation": "silu" if gated else _ACTIVATIONS[config["hidden_act"]],
        "gated_mlp": gated,
        "class_token": True,
        "register_tokens": int(number(config, "num_register_tokens", where, 4)) if registers else 0,
        "add_qkv_bias": flag(config, "qkv_bias", where, default=True),
        "layer_scale_init": number(config, "layerscale_value", where, 1.0) or 1.0,
        "post_layernorm": last,
        "feature_layers": layers if len(layers) > 1 else None,
    }


def _ffn(width: int, ratio: float, *, gated: bool) -> int:
    """Return the width of the MLP; with a gate two thirds of it, up to a multiple of 8."""
    ffn = int(width * ratio)
    return (int(ffn * 2 / 3) + 7) // 8 * 8 if gated else ffn


def _ratio(vision: VisionConfig) -> int | None:
    """Return ``mlp_ratio``, a whole number in its configuration; None where none gives this MLP."""
    found = (one for one in _RATIOS if _ffn(vision.hidden_size, one, gated=vision.gated_mlp) == vision.ffn_hidden_size)
    return next(found, None)


def _theirs(activation: str) -> str:
    return {ours: theirs for theirs, ours in _ACTIVATIONS.items()}[activation]


def _side(config: Mapping[str, Any], key: str, where: str) -> int:
    """Return the side of a square, which may be written twice."""
    value = config[key]
    sides = value if isinstance(value, list | tuple) else [value]
    if len(set(sides)) != 1 or not isinstance(sides[0], int) or sides[0] <= 0:
        raise UserError(f"{where}: {key} is {value!r}; only squares are supported")
    return int(sides[0])
