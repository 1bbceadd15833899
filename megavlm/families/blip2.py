"""BLIP-2 as Transformers has it (arXiv 2301.12597): EVA01-g, a Q-Former and one linear layer, on a decoder.

MiniGPT-4 (arXiv 2304.10592) is such a model on Vicuna, and this is how its parts lie in one directory; its authors
publish the linear layer alone. Salesforce's own BLIP-2 stand on OPT and FLAN-T5, which are not built here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from megavlm.architectures.connectors.q_former.tables import BLIP2_Q_FORMER
from megavlm.architectures.towers.vit.tables import BLIP2_VISION
from megavlm.config.schema import ModelConfig, VisionConfig
from megavlm.families.common import expect, expect_kinds, need, number
from megavlm.families.family import Family, Tower, Tree, config_file
from megavlm.families.preprocessor import image_branch, normalisation
from megavlm.families.text import no_half, text_branch, text_config, text_table
from megavlm.families.towers import CLIP_MEAN, CLIP_STD, LAST_HIDDEN_STATE
from megavlm.weights.rules import Table
from megavlm.weights.source import CONFIG, Source

_VISION: Tree = {
    "hidden_size": 1408, "intermediate_size": 6144, "num_hidden_layers": 39, "num_attention_heads": 16,
    "image_size": 224, "patch_size": 14, "layer_norm_eps": 1e-6,
}  # fmt: skip
_Q_FORMER: Tree = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "cross_attention_frequency": 2, "layer_norm_eps": 1e-12,
}  # fmt: skip
"""What the classes take where ``config.json`` says nothing."""
_HEAD = "language_model.lm_head."


class Blip2Family(Family):
    """``Blip2ForConditionalGeneration`` on a decoder."""

    name = "blip2"
    title = "BLIP-2 on a decoder, as MiniGPT-4 (Blip2ForConditionalGeneration)"
    parts = ("vision", "connector", "language")
    architectures: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "vision": ("vit",), "connector": ("q_former",), "language": ("decoder",),
    }  # fmt: skip
    class_feature = preprocesses = own_rotary = own_norms = True
    image_plan = "squash"

    def detect(self, source: Source) -> bool:
        """By ``model_type``."""
        return source.config.get("model_type") == "blip-2"

    def branches(self, source: Source) -> Tree:
        """Return all three branches, and what becomes of pictures."""
        config, where = source.config, config_file(source)
        kinds = {"vision_config": ("blip_2_vision_model",), "qformer_config": ("blip_2_qformer",)}
        expect_kinds(config, where, **kinds)
        vision = _vision(need(config, "vision_config", where), where)
        vision |= normalisation(source, vision["image_size"])
        connector = _q_former(config.get("qformer_config") or {}, where)
        connector["num_queries"] = config.get("num_query_tokens", 32)
        text = {"model_type": "opt", **need(config, "text_config", where)}  # its class's own, which is refused
        return {
            "vision": vision,
            "connector": connector,
            "language": text_branch(source, text, _HEAD, where),
            "image": image_branch(source, vision["image_size"], clip=False),
        }

    def tables(self, model: ModelConfig, style: str) -> Sequence[Table]:
        """Return the three tables."""
        return [
            BLIP2_VISION,
            BLIP2_Q_FORMER,
            text_table(model.language, model="language_model.model.", head=_HEAD),
        ]

    def config(self, model: ModelConfig, tokens: Mapping[str, int]) -> Tree:
        """Return the configuration."""
        vision, connector = model.vision, model.connector
        return {
            "architectures": ["Blip2ForConditionalGeneration"],
            "image_token_index": tokens.get("image", model.language.vocab_size - 1),
            "model_type": "blip-2",
            "num_query_tokens": connector.num_queries,
            "qformer_config": {
                "cross_attention_frequency": connector.cross_attention_frequency,
                "encoder_hidden_size": vision.hidden_size, "hidden_act": "gelu", "hidden_size": connector.hidden_size,
                "intermediate_size": connector.ffn_hidden_size, "layer_norm_eps": connector.layernorm_epsilon,
                "model_type": "blip_2_qformer", "num_attention_heads": connector.num_attention_heads,
                "num_hidden_layers": connector.num_layers,
            },
            "text_config": text_config(model.language),
            "tie_word_embeddings": model.language.tie_word_embeddings,
            "use_decoder_only_language_model": True,
            "vision_config": {
                "hidden_act": "gelu", "hidden_size": vision.hidden_size, "image_size": vision.image_size,
                "intermediate_size": vision.ffn_hidden_size, "layer_norm_eps": vision.layernorm_epsilon,
                "model_type": "blip_2_vision_model", "num_attention_heads": vision.num_attention_heads,
                "num_hidden_layers": vision.num_layers, "patch_size": vision.patch_size, "qkv_bias": True,
            },
        }  # fmt: skip

    def tower_of(self, config: Mapping[str, Any], directory: Path) -> Tower:
        """The last layer's features, behind the norm."""
        return need(config, "vision_config", str(directory / CONFIG)), LAST_HIDDEN_STATE

    def with_tower(self, config: Tree, vision_config: Tree, layer: Any) -> Tree:
        """Put it into the configuration."""
        return {**config, "vision_config": vision_config}

    def processor(self, model: ModelConfig, image_token: str) -> Tree:
        """Return its class, and how many slots a picture has."""
        return {"num_query_tokens": model.connector.num_queries, "processor_class": "Blip2Processor"}

    def trained_pictures(self, model: ModelConfig, old: Mapping[str, Any]) -> Tree:
        """Return the keys of a square."""
        square = {"height": model.vision.image_size, "width": model.vision.image_size}
        return {"image_processor_type": "BlipImageProcessor", "size": square}

    def refuses(self, model: ModelConfig) -> str | None:
        """Tower, connector, language model and image plan must be BLIP-2's kinds."""
        if model.image.kind != "squash":
            return f"the image plan is {model.image.kind}, BLIP-2 squashes pictures"
        # The half is a class with a head of its own, which has a bias where that of the kind alone has one.
        if getattr(model.language, "add_bias_linear", False) and not model.language.lm_head_bias:
            return "the output layer has no bias (model.language.lm_head_bias), which Phi's class has"
        return no_blip2_tower(model.vision) or no_half(model.language, head_bias=True)

    def tokens(self, source: Source) -> dict[str, int]:
        """``image_token_index``, or its newer name."""
        token = source.config.get("image_token_id", source.config.get("image_token_index"))
        return {"image": token} if isinstance(token, int) else {}


def no_blip2_tower(vision: VisionConfig) -> str | None:
    """Return why a tower is not BLIP-2's, or None."""
    parts = (vision.class_token, vision.conv_bias, vision.post_layernorm, vision.add_qkv_bias)
    others = (
        vision.pre_layernorm, vision.qk_norm, vision.layer_scale, vision.gated_mlp, vision.mlp_norm,
        vision.attention_norm, vision.register_tokens, vision.rotary_base, vision.positional_antialias,
        vision.feature_layers, vision.deepstack_layers, vision.s2_scales,
    )  # fmt: skip
    if not all(parts) or any(others) or (vision.normalization, vision.activation) != ("LayerNorm", "gelu"):
        return "the vision tower is not BLIP-2's, a plain one with a class token and a norm behind it"
    if not vision.key_bias:
        return "keys have no bias (model.vision.key_bias), for which its class has a parameter"
    if vision.positional_grid != vision.image_size // vision.patch_size:
        return f"the tower's positional table is {vision.positional_grid} wide, for images of another size"
    return None


def _vision(told: Mapping[str, Any], where: str) -> Tree:
    """Return ``model.vision`` of a ``Blip2VisionConfig``."""
    expect(told, where, hidden_act="gelu", qkv_bias=True)
    config = {**_VISION, **told}
    side, patch = config["image_size"], config["patch_size"]
    return {
        "preset": "eva01_vit",
        "image_size": side,
        "patch_size": patch,
        "hidden_size": config["hidden_size"],
        "num_layers": config["num_hidden_layers"],
        "num_attention_heads": config["num_attention_heads"],
        "ffn_hidden_size": config["intermediate_size"],
        "positional_grid": side // patch,
        "layernorm_epsilon": number(config, "layer_norm_eps", where),
        "key_bias": True,  # it lies there, and moves nothing
        "class_feature": True,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
    }


def _q_former(told: Mapping[str, Any], where: str) -> Tree:
    """Return ``model.connector`` of a ``Blip2QFormerConfig``."""
    expect(told, where, hidden_act="gelu", use_qformer_text_input=False)
    config = {**_Q_FORMER, **told}
    return {
        "preset": "q_former",
        "hidden_size": config["hidden_size"],
        "num_layers": config["num_hidden_layers"],
        "num_attention_heads": config["num_attention_heads"],
        "ffn_hidden_size": config["intermediate_size"],
        "cross_attention_frequency": config["cross_attention_frequency"],
        "layernorm_epsilon": number(config, "layer_norm_eps", where),
    }
