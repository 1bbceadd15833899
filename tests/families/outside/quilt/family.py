"""Quilt checkpoints: names, shapes, ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megavlm.config.schema import ModelConfig
from megavlm.families.common import need
from megavlm.families.family import Family, config_file
from megavlm.weights.rules import CONCAT, QKV, Aside, Table, both, row
from megavlm.weights.source import Source

Tree = dict[str, Any]

_VISION = ("image_size", "patch_size", "hidden_size", "num_layers")
_TEXT = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
    "vocab_size", "max_position_embeddings", "logits_scaling",
)  # fmt: skip
TOWER = Table(
    part="vision",
    rest=(row("position", "places"), *(one for n in range(32) for one in both(f"layers.{n}", f"step.{n}"))),
    prefix="eyes.",
    aside=(Aside("counter", "steps of the original training"),),
)
CONNECTOR = Table(part="connector", rest=both("project", "bridge"))
LANGUAGE = Table(
    part="language",
    ours="decoder.layers.{}.",
    theirs="blocks.{}.",
    layer=(
        row("input_layernorm.weight", "norm1.scale"),
        row("self_attention.linear_qkv.weight", "attn.q.weight attn.k.weight attn.v.weight", QKV),
        row("self_attention.linear_proj.weight", "attn.o.weight"),
        row("pre_mlp_layernorm.weight", "norm2.scale"),
        row("mlp.linear_fc1.weight", "ffn.gate.weight ffn.up.weight", CONCAT),
        row("mlp.linear_fc2.weight", "ffn.down.weight"),
        row("mlp.gain.weight", "ffn.gain"),
    ),
    rest=(
        row("embedding.word_embeddings.weight", "words.weight"),
        row("decoder.final_layernorm.weight", "norm.scale"),
        row("output_layer.weight", "head.weight"),
    ),
)


class QuiltFamily(Family):
    """The whole model."""

    name = "quilt"
    title = "Quilt"
    parts = ("vision", "connector", "language")
    template = "quilt"
    image_plan = "top"

    def detect(self, source: Source) -> bool:
        """By ``model_type``."""
        return source.config.get("model_type") == "quilt"

    def branches(self, source: Source) -> Tree:
        """Return all three branches."""
        config, where = source.config, config_file(source)
        vision, text = need(config, "vision", where), need(config, "text", where)
        return {
            "vision": {"preset": "patchwork", **{key: need(vision, key, where) for key in _VISION}},
            "connector": {"preset": "pool", "side": need(config, "pool", where)},
            "language": {"preset": "scaled", **{key: need(text, key, where) for key in _TEXT}},
        }

    def tables(self, model: ModelConfig, style: str) -> Sequence[Table]:
        """Return the three tables."""
        return [TOWER, CONNECTOR, LANGUAGE]

    def config(self, model: ModelConfig, tokens: Mapping[str, int]) -> Tree:
        """Return the ``config.json``."""
        return {
            "model_type": "quilt",
            "vision": {key: getattr(model.vision, key) for key in _VISION},
            "pool": model.connector.side,
            "text": {key: getattr(model.language, key) for key in _TEXT},
        }

    def refuses(self, model: ModelConfig) -> str | None:
        """Quilts alone."""
        presets = (model.vision.preset, model.connector.preset, model.language.preset)
        return None if presets == ("patchwork", "pool", "scaled") else f"{' + '.join(presets)} is not a quilt"
