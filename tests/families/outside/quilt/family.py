"""Quilt checkpoints: names, shapes, ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from megavlm.config.schema import ModelConfig
from megavlm.families.common import need
from megavlm.families.family import Family, config_file
from megavlm.weights.rules import Table
from megavlm.weights.source import Source
from quilt.tables import CONNECTOR, LANGUAGE, TOWER

Tree = dict[str, Any]

_VISION = ("image_size", "patch_size", "hidden_size", "num_layers")
_TEXT = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
    "vocab_size", "max_position_embeddings", "logits_scaling",
)  # fmt: skip


class QuiltFamily(Family):
    """The whole model."""

    name = "quilt"
    title = "Quilt"
    parts = ("vision", "connector", "language")
    architectures: ClassVar = {"vision": ("patchwork",), "connector": ("pool",), "language": ("scaled_decoder",)}
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
