"""Qwen v1, Qwen-VL and Belle-VL, and CodeFuse-VLM with its parts (facts from the two public repositories)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from megavlm.architectures.connectors.resampler.tables import RESAMPLER
from megavlm.architectures.decoders.decoder.tables import QWEN_LANGUAGE
from megavlm.architectures.towers.vit.tables import QWEN_VISION
from megavlm.config.errors import UserError
from megavlm.config.schema import ConnectorConfig, ImageConfig, ModelConfig, VisionConfig
from megavlm.families.common import expect, need
from megavlm.families.decoders import qwen_config, qwen_language
from megavlm.families.family import Family, Tree, config_file
from megavlm.families.projector import HEAD_DIM, PROJECTOR, projector_branch, projector_table, resampler_branch
from megavlm.families.text_kinds import PLAIN
from megavlm.families.towers import CLIP_MEAN, CLIP_STD, QWEN_EPSILON, qwen_vision, qwen_visual
from megavlm.families.vit import plain_layers
from megavlm.weights.rules import Aside, Table
from megavlm.weights.source import Source

_TABLE_ROWS = 256  # and its towers a positional table of 256 rows
_CODEFUSE_TOWER = "transformer.vision_tower.vision_tower."


class QwenFamily(Family):
    """Qwen v1, the language model alone."""

    name = "qwen"
    title = "Qwen v1 language models"
    template = "qwen_vl"
    parts: ClassVar[tuple[str, ...]] = ("language",)
    architectures: ClassVar[Mapping[str, tuple[str, ...]]] = {"language": ("decoder",)}

    def detect(self, source: Source) -> bool:
        """By ``model_type``; CodeFuse-VLM's language model may have its own."""
        return source.config.get("model_type") in ("qwen", "llava_qwen") and "visual" not in source.config

    def branches(self, source: Source) -> Tree:
        """Return the language branch."""
        return {"language": qwen_language(source.config, config_file(source))}

    def tables(self, model: ModelConfig, style: str) -> Sequence[Table]:
        """Return the table."""
        return [QWEN_LANGUAGE]

    def config(self, model: ModelConfig, tokens: Mapping[str, int]) -> Tree:
        """Return a Qwen v1 configuration."""
        return qwen_config(model.language)

    def refuses(self, model: ModelConfig) -> str | None:
        """Qwen v1 has a bias on QKV, no grouped queries, and nothing else than a Llama."""
        language = model.language
        if not language.add_qkv_bias or language.qk_layernorm or language.rope_scaling is not None:
            return "the language model is no Qwen v1: that has a bias on QKV, no norm on it, and no stretched positions"
        for key, wanted in {**PLAIN, "add_qkv_bias": True}.items():
            if (there := getattr(language, key, wanted)) != wanted:
                return f"the language model's {key} is {there!r}, Qwen v1's is {wanted!r}"
        if language.num_query_groups != language.num_attention_heads:
            return "the language model has grouped queries, which Qwen v1 has not"
        return None


class QwenVLFamily(QwenFamily):
    """Qwen-VL, Qwen-VL-Chat, Belle-VL: tower and resampler under ``transformer.visual``."""

    name = "qwen_vl"
    title = "Qwen-VL, Qwen-VL-Chat, Belle-VL"
    finds = "Where is {thing}?"  # its authors ask in Chinese alone (TUTORIAL.md); this is how boxes are trained here
    parts = ("vision", "connector", "language")
    architectures: ClassVar[Mapping[str, tuple[str, ...]]] = {"vision": ("vit",), "language": ("decoder",)}

    def detect(self, source: Source) -> bool:
        """By ``model_type`` and the ``visual`` settings."""
        return source.config.get("model_type") == "qwen" and "visual" in source.config

    def branches(self, source: Source) -> Tree:
        """Return all three branches."""
        where, visual = config_file(source), source.config["visual"]
        rows = source.shape(QWEN_VISION.prefix + "positional_embedding")[0]
        language = qwen_language(source.config, where)
        vision = qwen_vision(visual, rows, where)
        connector = resampler_branch(source, RESAMPLER.prefix, visual.get("n_queries"))
        if visual.get("output_dim", language["hidden_size"]) != language["hidden_size"]:
            raise UserError(f"{where}: visual.output_dim is not hidden_size; the resampler ends in the language model")
        return {"vision": vision, "connector": connector, "language": language}

    def tables(self, model: ModelConfig, style: str) -> Sequence[Table]:
        """Return the three tables."""
        return [QWEN_VISION, RESAMPLER, QWEN_LANGUAGE]

    def config(self, model: ModelConfig, tokens: Mapping[str, int]) -> Tree:
        """Return a Qwen-VL configuration."""
        visual = {
            **qwen_visual(model.vision),
            "n_queries": model.connector.num_queries,
            "output_dim": model.language.hidden_size,
            "image_start_id": tokens.get("image_start", 151857),
        }
        return {**qwen_config(model.language), "visual": dict(sorted(visual.items()))}

    def refuses(self, model: ModelConfig) -> str | None:
        """The original code fixes the resampler's heads and the rows of the tower's table."""
        return (
            super().refuses(model)
            or no_qwen_tower(model.vision)
            or no_qwen_pictures(model.image)
            or no_qwen_resampler(model.connector)
        )

    def tokens(self, source: Source) -> dict[str, int]:
        """``</img>`` and ``<imgpad>`` follow ``<img>``."""
        start = source.config["visual"].get("image_start_id")
        return {"image_start": start, "image": start + 2} if isinstance(start, int) else {}


def no_qwen_tower(vision: VisionConfig) -> str | None:
    """Return why a tower is not Qwen-VL's, or None."""
    other = vision.class_token or vision.conv_bias or vision.post_layernorm or not vision.pre_layernorm
    other = other or vision.s2_scales is not None or vision.feature_layers is not None
    if other or vision.activation != "gelu" or not plain_layers(vision):
        return "the vision tower is not Qwen-VL's"
    if vision.layernorm_epsilon != QWEN_EPSILON:
        return f"the tower's norms have the epsilon {vision.layernorm_epsilon}; Qwen-VL's code has {QWEN_EPSILON}"
    if [*vision.image_mean, *vision.image_std] != CLIP_MEAN + CLIP_STD:
        return "pictures are normalised with other numbers than CLIP's, which Qwen-VL's code has fixed"
    if vision.positional_grid**2 != _TABLE_ROWS:
        return f"the tower's positional table has {vision.positional_grid**2} rows; Qwen-VL's code has {_TABLE_ROWS}"
    return None


def no_qwen_pictures(image: ImageConfig) -> str | None:
    """Return why pictures are not treated as Qwen-VL's code does, or None."""
    if (image.kind, image.resample) != ("squash", "bicubic"):
        return f"pictures are made by {image.kind} ({image.resample}); Qwen-VL's code squashes them (bicubic)"
    return None


def no_qwen_resampler(connector: ConnectorConfig) -> str | None:
    """Return why a connector is not Qwen-VL's, or None."""
    if connector.preset != "resampler":
        return f"the connector is {connector.preset}, not the resampler"
    if connector.head_dim != HEAD_DIM:
        return f"the resampler's heads are {connector.head_dim} wide; Qwen-VL's code makes them {HEAD_DIM} wide"
    return None


class CodeFuseFamily(QwenFamily):
    """CodeFuse-VLM-14B: a Qwen LLM with ``mm_projector`` and ``vision_tower`` beside it."""

    name = "codefuse_vlm"
    title = "CodeFuse-VLM-14B"
    own_files = ("visual_config.json",)
    parts = ("vision", "connector", "language")
    architectures: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "vision": ("vit",),
        "connector": ("mlp", "resampler"),
        "language": ("decoder",),
    }

    def detect(self, source: Source) -> bool:
        """By ``model_type`` and the tower's names."""
        return source.config.get("model_type") == "llava_qwen" and _CODEFUSE_TOWER + "conv1.weight" in source

    def branches(self, source: Source) -> Tree:
        """Return all three branches; the tower's shape lies in ``visual_config.json``."""
        where = config_file(source)
        visual = need(source.config, "visual_config", f"{source.directory}: without a visual_config.json, it")
        rows = source.shape(_CODEFUSE_TOWER + "positional_embedding")[0]
        connector = projector_branch(source, f"transformer.{PROJECTOR}")
        expect(source.config, where, mm_projector_type=_projector(connector["preset"]))
        return {
            "vision": qwen_vision(visual, rows, str(source.directory / "visual_config.json")),
            "connector": connector,
            "language": qwen_language(source.config, where),
        }

    def tables(self, model: ModelConfig, style: str) -> Sequence[Table]:
        """Return the three tables."""
        tower = dataclasses.replace(QWEN_VISION, prefix=_CODEFUSE_TOWER)
        return [tower, projector_table(model, f"transformer.{PROJECTOR}"), QWEN_LANGUAGE]

    def config(self, model: ModelConfig, tokens: Mapping[str, int]) -> Tree:
        """Return the configuration; the exporter writes ``visual_config`` to its own file."""
        visual = {**qwen_visual(model.vision), "output_dim": model.language.hidden_size}
        visual["image_start_id"] = tokens.get("image_start", 151857)
        return {
            **qwen_config(model.language),
            "architectures": ["LlavaQWenForCausalLM"],
            "model_type": "llava_qwen",
            "mm_hidden_size": model.vision.hidden_size,
            "mm_projector_type": _projector(model.connector.preset),
            "mm_vision_tower": "Qwen-VL-visual",
            "use_mm_proj": True,
            "visual_config.json": dict(sorted(visual.items())),
        }

    def refuses(self, model: ModelConfig) -> str | None:
        """The original code fixes 256 queries, their heads, and the rows of the tower's table."""
        connector = model.connector
        reason = super().refuses(model) or no_qwen_tower(model.vision) or no_qwen_pictures(model.image)
        if reason is None and connector.preset == "resampler":
            reason = no_qwen_resampler(connector)
            if reason is None and connector.num_queries != 256:
                reason = f"the resampler has {connector.num_queries} queries; CodeFuse-VLM's code has 256"
        return reason

    def tokens(self, source: Source) -> dict[str, int]:
        """As in Qwen-VL."""
        start = source.config.get("visual_config", {}).get("image_start_id")
        return {"image_start": start, "image": start + 2} if isinstance(start, int) else {}

    def scattered(self, directory: Path) -> dict[str, Path]:
        """Return where the parts lie in CodeFuse-VLM-14B as it is published.

        The language model is in the directory itself, ``visual.bin`` in ``Qwen-VL-visual`` and ``mm_projector.bin`` in
        ``mm_projector``.
        """
        parts = {
            "language": directory,
            "vision": directory / "Qwen-VL-visual",
            "connector": directory / "mm_projector" / "mm_projector.bin",
        }
        if not (parts["vision"] / "visual.bin").is_file() or not parts["connector"].is_file():
            return {}
        merged = _CODEFUSE_TOWER + "conv1.weight" in Source(directory)
        return {} if merged else parts


def _projector(preset: str) -> str:
    """Return what CodeFuse-VLM's code calls a connector."""
    return "cross_attn" if preset == "resampler" else preset


class QwenTowerFamily(Family):
    """``visual.bin`` with ``visual_config.json``: Qwen-VL's tower as CodeFuse-VLM keeps it."""

    name = "qwen_visual"
    title = "Qwen-VL's tower alone: visual.bin and visual_config.json"
    own_files = ("visual_config.json",)
    parts = ("vision",)
    architectures: ClassVar[Mapping[str, tuple[str, ...]]] = {"vision": ("vit",)}

    def detect(self, source: Source) -> bool:
        """By its names."""
        return "conv1.weight" in source and "positional_embedding" in source

    def branches(self, source: Source) -> Tree:
        """Return the vision branch."""
        visual = need(source.config, "visual_config", f"{source.directory}: without a visual_config.json, it")
        rows = source.shape("positional_embedding")[0]
        return {"vision": qwen_vision(visual, rows, str(source.directory / "visual_config.json"))}

    def tables(self, model: ModelConfig, style: str) -> Sequence[Table]:
        """Return the table."""
        aside = Aside(r"attn_pool\..*|ln_post\..*|proj", "resampler of another language model", carried=True)
        return [dataclasses.replace(QWEN_VISION, prefix="", aside=(aside,))]

    def config(self, model: ModelConfig, tokens: Mapping[str, int]) -> Tree:
        """Return what goes into ``visual_config.json``."""
        visual = {**qwen_visual(model.vision), "output_dim": model.language.hidden_size}
        visual["image_start_id"] = tokens.get("image_start", 151857)
        return {"visual_config.json": dict(sorted(visual.items()))}

    def refuses(self, model: ModelConfig) -> str | None:
        """It is Qwen-VL's tower or it is not."""
        return no_qwen_tower(model.vision) or no_qwen_pictures(model.image)
