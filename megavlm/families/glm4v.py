"""GLM-4.1V, dense, and GLM-4.5V and 4.6V with experts (arXiv 2507.01006), as Transformers has them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from megavlm.architectures.connectors.downsample_merger.tables import downsample_merger
from megavlm.architectures.towers.packed_vit.tables import GLM4V_VISION
from megavlm.config.errors import UserError
from megavlm.config.json_object import read_json
from megavlm.config.schema import LanguageConfig, ModelConfig
from megavlm.data.films.plan import NO_FILMS
from megavlm.data.media import plan_of
from megavlm.families.common import expect, expect_kinds, flag, need, number
from megavlm.families.family import Tree, config_file
from megavlm.families.films import VIDEO_PREPROCESSOR
from megavlm.families.glm4 import GLM4
from megavlm.families.glm4_moe import GLM4_MOE
from megavlm.families.native_pictures import native_pictures, trained_native
from megavlm.families.preprocessor import PREPROCESSOR, native_sizes
from megavlm.families.qwen2_vl import Qwen2VLFamily
from megavlm.families.text_kinds import TextKind, odd_heads
from megavlm.weights.rules import Table
from megavlm.weights.source import Source

_SECTIONS = (8, 12, 12)
"""Where a configuration does not say it, as Transformers has it."""
_PROCESSORS = tuple(f"{one}ImageProcessor{form}" for one in ("Glm4v", "Glm46V") for form in ("", "Fast", "Pil"))
"""GLM-4.6V's makes the same pixels."""
_EDGES = {"shortest_edge": 112 * 112, "longest_edge": 28 * 28 * 15000}
"""Pixels of the least and the largest picture, where a file does not say it."""
_MERGER_EPSILON = 1e-5
"""Its code has it, and no key."""


class Glm4vFamily(Qwen2VLFamily):
    """``Glm4vForConditionalGeneration``."""

    name = "glm4v"
    title = "GLM-4.1V, dense (Glm4vForConditionalGeneration)"
    finds = "Help me to locate {thing} in the image and give me its bounding boxes."  # README of zai-org/GLM-V
    architectures: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "vision": ("packed_vit",),
        "connector": ("downsample_merger",),
        "language": ("decoder",),
    }
    styles: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "modules": {"tower": "model.visual.", "model": "model.language_model.", "head": "lm_head."}
    }
    template: ClassVar[str | None] = "glm4v"
    film_plans: ClassVar[tuple[str, ...]] = ("glm4v",)
    model_class = "Glm4vForConditionalGeneration"
    own_norms = True
    tower_preset = "glm4v_vit"
    kind: ClassVar[TextKind] = GLM4
    """Of its language model."""
    marks_before: ClassVar[int] = 4
    """How far the first of four marks stands before the slot of pictures, where no tokenizer says it."""
    tower: ClassVar[Table] = GLM4V_VISION
    fixed: ClassVar[Tree] = {
        "normalization": "RMSNorm", "activation": "silu", "gated_mlp": True, "window_size": None, "conv_bias": True,
        "add_bias_linear": False, "class_token": False, "pre_layernorm": True, "post_layernorm": True,
        "positional_interpolation": "bicubic", "deepstack_layers": (), "rotary_base": 10000.0,
    }  # fmt: skip

    def branches(self, source: Source) -> Tree:
        """Return all three branches, and what becomes of pictures."""
        config, where = source.config, config_file(source)
        text, visual = config.get("text_config") or config, need(config, "vision_config", where)
        expect_kinds(config, where, text_config=(self.name, self.kind.model_type), vision_config=(self.name,))
        language = self._language(text, where)
        language["tie_word_embeddings"] = "lm_head.weight" not in source or any(
            flag(tree, "tie_word_embeddings", where, default=False) for tree in (config, text)
        )
        vision = self._tower(visual, language["hidden_size"], where)
        image, pixels = native_pictures(source, vision, _PROCESSORS, self._sizes_of_pictures)
        connector = {
            "preset": "downsample_merger", "merge_size": vision["spatial_merge_size"],
            "ffn_hidden_size": visual.get("intermediate_size", 13696),
        }  # fmt: skip
        video = self._films(source, visual, vision | pixels, where)
        return {"vision": vision | pixels, "connector": connector, "language": language, "image": image, "video": video}

    def tables(self, model: ModelConfig, style: str) -> Sequence[Table]:
        """Return the three tables."""
        names = self.styles[style]
        return [
            dataclasses.replace(self.tower, prefix=names["tower"]),
            dataclasses.replace(downsample_merger(model.connector.merge_size), prefix=names["tower"]),
            dataclasses.replace(self.kind.table, names={"model": names["model"], "head": names["head"]}),
        ]

    def config(self, model: ModelConfig, tokens: Mapping[str, int]) -> Tree:
        """Return a configuration in the form of the published ones."""
        # Of the published tokenizers: the slots of films are the next one, and the four marks lie beside each other.
        image, language, vision = tokens.get("image", model.language.vocab_size - 2), model.language, model.vision
        start = tokens.get("image_start", image - self.marks_before)
        text = self._text_config(language)
        sections = {"mrope_section": list(language.rotary_sections)}
        text["rope_parameters"] |= sections
        text |= {"model_type": f"{self.name}_text", "rope_scaling": {"rope_type": "default", **sections}}
        return {
            "architectures": [self.model_class],
            "image_end_token_id": start + 1,
            "image_start_token_id": start,
            "image_token_id": image,
            "model_type": self.name,
            "text_config": text,
            "tie_word_embeddings": language.tie_word_embeddings,
            "video_end_token_id": start + 3,
            "video_start_token_id": start + 2,
            "video_token_id": image + 1,
            "vision_config": {
                "attention_bias": vision.add_qkv_bias,
                "depth": vision.num_layers,
                "hidden_act": self._activation(),
                "hidden_size": vision.hidden_size,
                "image_size": vision.positional_grid * vision.patch_size,
                "in_channels": 3,
                "intermediate_size": model.connector.ffn_hidden_size,
                "model_type": f"{self.name}_vision",
                "num_heads": vision.num_attention_heads,
                "out_hidden_size": language.hidden_size,
                "patch_size": vision.patch_size,
                "rms_norm_eps": vision.layernorm_epsilon,
                "spatial_merge_size": vision.spatial_merge_size,
                "temporal_patch_size": vision.temporal_patch_size,
            },
        }

    def refuses(self, model: ModelConfig) -> str | None:
        """Tower, connector, positions and image plan must be GLM-4.1V's kinds."""
        language, vision = model.language, model.vision
        for key, value in self.fixed.items():
            if getattr(vision, key) != value:
                return f"the tower has {key} {getattr(vision, key)!r}, {self.title} has {value!r}"
        if vision.positional_grid is None:
            return "the tower has no positional table, GLM-4.1V's has"
        if vision.ffn_hidden_size != language.hidden_size:
            return (
                f"the tower's MLP ({vision.ffn_hidden_size}) is not as wide as the language model "
                f"({language.hidden_size}), for which its configuration has one key (out_hidden_size)"
            )
        if model.connector.layernorm_epsilon != _MERGER_EPSILON:
            return f"the connector's norm has another epsilon than {_MERGER_EPSILON}, for which there is no key"
        if not language.rotary_sections or language.rotary_sections_interleaved:
            return "the language model's positions are not in sections (rotary_sections), as GLM-4.1V's are"
        if language.rope_scaling is not None:
            return "the language model's rotary positions are stretched (rope_scaling), for which there is no key"
        if not model.image.enlarge_to_block:
            return "small pictures are not enlarged first (model.image.enlarge_to_block), as GLM-4.1V's are"
        try:
            plan_of(model)
        except UserError as error:
            return str(error)
        whole: Tree = {"rotary_sections": ()}  # of a language model alone, which has none
        return self.kind.refuses(dataclasses.replace(language, **whole)) or self._no_text(language)

    def templates(self, source: Source) -> tuple[str, ...]:
        """Its own ``chat_template``, else the form that it has."""
        assert self.template is not None
        return ("checkpoint", self.template)

    def _language(self, text: Mapping[str, Any], where: str) -> Tree:
        """Return ``model.language``.

        Raises:
            UserError: a key is missing, or has a value that there is none for here.
        """
        width = need(text, "hidden_size", where) // need(text, "num_attention_heads", where)
        expect(text, where, head_dim=(None, width), attention_bias=True)
        # Its class has no key for the width of a head, and turns whole heads where nothing is said.
        rope = text.get("rope_parameters") or {}
        part = number(rope, "partial_rotary_factor", where, number(text, "partial_rotary_factor", where, 1.0))
        own = {"model_type": "glm4", "head_dim": width, "rms_norm_eps": 1e-5, "max_position_embeddings": 32768}
        known = {key: value for key, value in text.items() if key not in ("model_type", "head_dim")}
        language = GLM4.branch({**own, **known, "partial_rotary_factor": part}, where)
        return {**language, "rotary_sections": language.get("rotary_sections") or _SECTIONS}

    def _text_config(self, language: LanguageConfig) -> Tree:
        """Return the ``text_config``, but what positions have of their own."""
        text = self.kind.write(language)
        return {key: value for key, value in text.items() if key not in ("architectures", "head_dim")}

    def _no_text(self, language: LanguageConfig) -> str | None:
        """Return why a language model of the family's kind is not the family's, or None."""
        if not language.add_qkv_bias:
            return "the language model has no bias on queries, keys and values, which GLM-4.1V's has"
        return odd_heads(language)

    def trained_pictures(self, model: ModelConfig, old: Mapping[str, Any]) -> Tree | None:
        """Sizes are counted once for each frame of a patch, and stand under one key."""
        own = trained_native(model, old, _PROCESSORS)
        least, most, frames = own.pop("min_pixels"), own.pop("max_pixels"), own["temporal_patch_size"]
        return {**own, "size": {"longest_edge": most * frames, "shortest_edge": least * frames}}

    def _activation(self) -> str:
        return "silu"

    def _sizes(self, visual: Mapping[str, Any], where: str) -> Tree:
        side, patch = visual.get("image_size", 336), visual.get("patch_size", 14)
        out = need(visual, "out_hidden_size", where)
        if not isinstance(side, int) or not isinstance(patch, int) or side % patch:
            raise UserError(
                f"{where}: image_size {side} is no multiple of patch_size ({patch}), which the table of positions is "
                "made for; correct it"
            )
        return {
            "hidden_size": need(visual, "hidden_size", where),
            "ffn_hidden_size": out,
            "positional_grid": side // patch,
            "image_size": side,
            "add_qkv_bias": flag(visual, "attention_bias", where, default=False),
            "layernorm_epsilon": number(visual, "rms_norm_eps", where, 1e-5),
            "out": out,
        }

    def _sizes_of_pictures(self, tree: Tree, where: str) -> Tree:
        """Return ``min_pixels`` and ``max_pixels`` of one picture; the file counts each frame of a patch.

        Raises:
            UserError: a number is none, or no multiple of the frames.
        """
        frames = tree.get("temporal_patch_size", 2)
        found = native_sizes({"size": {**_EDGES, **(tree.get("size") or {})}}, where)
        for key, value in found.items():
            if math.gcd(value, frames) != frames:
                raise UserError(f"{where}: size: {value} is no multiple of temporal_patch_size ({frames}); correct one")
            found[key] = value // frames
        return {**found, "enlarge_to_block": True}


class Glm4vMoeFamily(Glm4vFamily):
    """``Glm4vMoeForConditionalGeneration``: GLM-4.1V's tower and merger, GLM-4.5-Air's language model."""

    name = "glm4v_moe"
    title = "GLM-4.5V and GLM-4.6V, with experts (Glm4vMoeForConditionalGeneration)"
    template: ClassVar[str | None] = "glm4_5v"
    model_class = "Glm4vMoeForConditionalGeneration"
    own_norms = False
    kind = GLM4_MOE
    marks_before = 24

    def _films(self, source: Source, visual: Mapping[str, Any], vision: Tree, where: str) -> Tree:
        """Return none for GLM-4.6V, which chooses frames and writes their times otherwise."""
        for name, key in ((VIDEO_PREPROCESSOR, "video_processor_type"), (PREPROCESSOR, "image_processor_type")):
            path = source.directory / name
            if path.is_file() and str(read_json(path).get(key)).startswith("Glm46V"):
                return {"kind": NO_FILMS}
        return super()._films(source, visual, vision, where)

    def _language(self, text: Mapping[str, Any], where: str) -> Tree:
        expect(text, where, use_qk_norm=False, qk_layernorm=False)  # its class has no such norm, whatever is said
        # What its class has where nothing is said: heads as wide as fit, and half of each turned.
        width = need(text, "hidden_size", where) // need(text, "num_attention_heads", where)
        own = {
            "head_dim": width, "rms_norm_eps": 1e-5, "max_position_embeddings": 65536, "attention_bias": True,
            "n_routed_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 1408, "n_shared_experts": 1,
            "first_k_dense_replace": 1,
        }  # fmt: skip
        language = self.kind.branch({**own, **text, "model_type": "glm4_moe"}, where)
        return {**language, "rotary_sections": language.get("rotary_sections") or _SECTIONS}

    def _text_config(self, language: LanguageConfig) -> Tree:
        return {key: value for key, value in self.kind.write(language).items() if key != "architectures"}

    def _no_text(self, language: LanguageConfig) -> str | None:
        if language.qk_layernorm:
            return "the language model has a norm on queries and keys, for which GLM-4.5V has no place"
        return None
