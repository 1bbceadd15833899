"""Qwen2-VL (arXiv 2409.12191) and Qwen2.5-VL (2502.13923), as Transformers has them.

``config.json`` is flat on the hub, and has the language model's keys in ``text_config`` since Transformers 4.52: both
are read, and both are written, so that any version reads them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from megavlm.architectures.connectors.patch_merger.tables import PATCH_MERGER
from megavlm.architectures.decoders.decoder.tables import LLAMA_LANGUAGE
from megavlm.architectures.towers.packed_vit.tables import QWEN2_5_VL_VISION, QWEN2_VL_VISION
from megavlm.config.errors import UserError
from megavlm.config.schema import ModelConfig, VisionConfig
from megavlm.data.media import plan_of
from megavlm.families.common import expect, expect_kinds, flag, need, number
from megavlm.families.decoders import llama_config, llama_language, with_numbers
from megavlm.families.family import Family, Tree, config_file
from megavlm.families.films import film_branch
from megavlm.families.llama import no_llama
from megavlm.families.native_pictures import native_pictures, trained_native
from megavlm.weights.rules import Table
from megavlm.weights.source import Source

_EPSILON = 1e-6
"""Of all norms of tower and connector: their code has it, and no key."""
_PLAIN: Tree = {
    "conv_bias": False, "add_bias_linear": True, "add_qkv_bias": True, "class_token": False, "pre_layernorm": False,
    "post_layernorm": False, "positional_grid": None, "deepstack_layers": (), "rotary_base": 10000.0,
    "layernorm_epsilon": _EPSILON,
}  # fmt: skip
"""What the towers of both have one value for."""


class Qwen2VLFamily(Family):
    """``Qwen2VLForConditionalGeneration``."""

    name = "qwen2_vl"
    title = "Qwen2-VL (Qwen2VLForConditionalGeneration)"
    # Of tutorials that train it on; its authors publish no question for it.
    finds: ClassVar[str | None] = "Detect the bounding box of {thing}."
    parts: ClassVar[tuple[str, ...]] = ("vision", "connector", "language")
    architectures: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "vision": ("packed_vit",),
        "connector": ("patch_merger",),
        "language": ("decoder",),
    }
    styles: ClassVar[Mapping[str, Mapping[str, str]]] = {
        # As published on the hub, and read by every version of Transformers.
        "hub": {"tower": "visual.", "model": "model.", "head": "lm_head."},
        # Names of the modules since Transformers 4.52.
        "modules": {"tower": "model.visual.", "model": "model.language_model.", "head": "lm_head."},
    }
    modules: ClassVar[str | None] = "modules"
    template: ClassVar[str | None] = "qwen2_vl"
    image_plan: ClassVar[str | None] = "native"
    film_plans: ClassVar[tuple[str, ...]] = ("qwen2_vl",)
    own_rotary = True
    preprocesses = True
    model_class: ClassVar[str] = "Qwen2VLForConditionalGeneration"
    tower: ClassVar[Table] = QWEN2_VL_VISION
    tower_preset: ClassVar[str | None] = None
    """Of its tower; None where it has the family's name."""
    timed: ClassVar[bool] = False
    """Whether positions tell the time of a film's frames."""
    fixed: ClassVar[Tree] = {
        **_PLAIN, "normalization": "LayerNorm", "activation": "quick_gelu", "gated_mlp": False, "window_size": None,
    }  # fmt: skip
    """What the tower has one value for."""

    def detect(self, source: Source) -> bool:
        """By ``model_type``."""
        return source.config.get("model_type") == self.name

    def probe(self, style: str) -> str:
        """Return the name of the patch embedding."""
        return self.styles[style]["tower"] + "patch_embed.proj.weight"

    def branches(self, source: Source) -> Tree:
        """Return all three branches, and what becomes of pictures."""
        config, where = source.config, config_file(source)
        expect_kinds(config, where, text_config=(self.name, "qwen2"), vision_config=(self.name,))
        text = config.get("text_config") or config
        language = llama_language({**with_numbers(text, where), "model_type": "qwen2"}, where)
        # In the text's own configuration it was up to Transformers 4; a head that is not there is the embedding.
        head = self.styles[self.style_of(source)]["head"] + "weight"
        language["tie_word_embeddings"] = head not in source or any(
            flag(tree, "tie_word_embeddings", where, default=False) for tree in (config, text)
        )
        if not language.get("rotary_sections"):
            raise UserError(f"{where}: has no mrope_section (in rope_scaling), which positions follow from")
        visual = need(config, "vision_config", where)
        vision = self._tower(visual, language["hidden_size"], where)
        image, pixels = native_pictures(source, vision)
        connector = {
            "preset": "patch_merger", "merge_size": vision["spatial_merge_size"],
            "normalization": self.fixed["normalization"], "layernorm_epsilon": _EPSILON,
        }  # fmt: skip
        video = self._films(source, visual, vision | pixels, where)
        return {"vision": vision | pixels, "connector": connector, "language": language, "image": image, "video": video}

    def tables(self, model: ModelConfig, style: str) -> Sequence[Table]:
        """Return the three tables."""
        names = self.styles[style]
        return [
            dataclasses.replace(self.tower, prefix=names["tower"]),
            dataclasses.replace(PATCH_MERGER, prefix=names["tower"] + PATCH_MERGER.prefix),
            dataclasses.replace(LLAMA_LANGUAGE, names={"model": names["model"], "head": names["head"]}),
        ]

    def config(self, model: ModelConfig, tokens: Mapping[str, int]) -> Tree:
        """Return a configuration that old and new versions of Transformers read."""
        image, language = tokens.get("image", model.language.vocab_size - 1), model.language
        text = llama_config(language)
        for key in ("architectures", "model_type", "head_dim", "rope_parameters"):
            del text[key]
        text["rope_scaling"] = {"type": "mrope", "mrope_section": list(language.rotary_sections)}
        text |= {"use_sliding_window": False, "sliding_window": language.max_position_embeddings}
        text["max_window_layers"] = language.num_layers
        return {
            **text,
            "architectures": [self.model_class],
            "image_token_id": image,
            "model_type": self.name,
            "text_config": {**text, "model_type": f"{self.name}_text"},
            # Of the published tokenizers, whose ids lie beside each other.
            "video_token_id": image + 1,
            "vision_end_token_id": image - 2,
            "vision_start_token_id": image - 3,
            "vision_config": {
                "depth": model.vision.num_layers,
                "in_channels": 3,
                "model_type": self.name,
                "num_heads": model.vision.num_attention_heads,
                "patch_size": model.vision.patch_size,
                "spatial_merge_size": model.vision.spatial_merge_size,
                "spatial_patch_size": model.vision.patch_size,
                "temporal_patch_size": model.vision.temporal_patch_size,
                **self._tower_config(model.vision, language.hidden_size),
            },
        }

    def refuses(self, model: ModelConfig) -> str | None:
        """Tower, connector, positions and image plan must be Qwen2-VL's kinds."""
        language = model.language
        if not language.rotary_sections or language.rotary_sections_interleaved:
            return "the language model's positions are not in sections (rotary_sections), as Qwen2-VL's are"
        if not language.add_qkv_bias:
            return "the language model has no bias on queries, keys and values, which Qwen2-VL's has"
        if language.kv_channels * language.num_attention_heads != language.hidden_size:
            return "the heads of the language model are not as wide as it is, for which its configuration has no key"
        parts = self._refuses_common(model) or self._refuses_tower(model.vision) or no_llama(language)
        return parts or self._refuses_times(model)

    def _refuses_times(self, model: ModelConfig) -> str | None:
        timed = model.video.tokens_per_second is not None
        if model.video.kind not in self.film_plans or timed == self.timed:
            return None
        there, here = ("tell", "do not") if timed else ("do not tell", "do")
        return f"positions {there} the time of frames (model.video.tokens_per_second), those of {self.title} {here}"

    def trained_pictures(self, model: ModelConfig, old: Mapping[str, Any]) -> Tree | None:
        """Pictures keep sizes of their own."""
        return trained_native(model, old)

    def _refuses_common(self, model: ModelConfig) -> str | None:
        """Return what is against a model in all families of this form, or None."""
        for key, value in self.fixed.items():
            if getattr(model.vision, key) != value:
                return f"the tower has {key} {getattr(model.vision, key)!r}, {self.title} has {value!r}"
        connector, language = model.connector, model.language
        norm, epsilon = self.fixed["normalization"], self.fixed["layernorm_epsilon"]
        if connector.normalization != norm or connector.layernorm_epsilon != epsilon:
            return f"the connector has another norm than the tower ({norm}, epsilon {epsilon})"
        if connector.norm_after_merge:
            return "the connector has its norm behind the merge (norm_after_merge), the family's in front of it"
        stretched = self.own_rotary and language.rope_scaling is not None
        if stretched or language.rotary_percent != 1 or language.rotary_interleaved:
            return "the language model's rotary positions are stretched, or turn a part of a head or neighbouring pairs"
        try:
            plan_of(model)
        except UserError as error:
            return str(error)
        return None

    def templates(self, source: Source) -> tuple[str, ...]:
        """Its own ``chat_template``, else the form that it has."""
        return ("checkpoint", "qwen2_vl")

    def tokens(self, source: Source) -> dict[str, int]:
        """``image_token_id``."""
        token = source.config.get("image_token_id")
        return {"image": token} if isinstance(token, int) else {}

    def _tower(self, visual: Mapping[str, Any], embed: int, where: str) -> Tree:
        """Return ``model.vision``.

        Raises:
            UserError: a key is missing, or has a value that there is none for here.
        """
        patch = visual.get("patch_size", 14)
        expect(visual, where, in_channels=3, in_chans=3, spatial_patch_size=patch, hidden_act=self._activation())
        own = self._sizes(visual, where)
        out = own.pop("out", embed)
        if out != embed:
            raise UserError(
                f"{where}: vision_config makes vectors of {out}, but the language model takes {embed}; correct one"
            )
        rope = visual.get("rope_parameters") or {}
        expect(rope, where, rope_type=("axial", "default"), rope_theta=10000)
        return {
            "preset": self.tower_preset or f"{self.name}_vit",
            "patch_size": patch,
            "temporal_patch_size": visual.get("temporal_patch_size", 2),
            "spatial_merge_size": visual.get("spatial_merge_size", 2),
            "num_layers": need(visual, "depth", where),
            "num_attention_heads": need(visual, "num_heads", where),
            **own,
        }

    def _films(self, source: Source, visual: Mapping[str, Any], vision: Tree, where: str) -> Tree:
        """Return ``model.video``."""
        return film_branch(source, vision, self.film_plans[0])

    def _activation(self) -> str:
        """Return what Transformers calls the tower's activation."""
        return "quick_gelu"

    def _sizes(self, visual: Mapping[str, Any], where: str) -> Tree:
        """Return the widths; ``out`` is that of the language model."""
        width, ratio = need(visual, "embed_dim", where), number(visual, "mlp_ratio", where, 4)
        out = {"out": visual["hidden_size"]} if "hidden_size" in visual else {}
        return {"hidden_size": width, "ffn_hidden_size": int(width * ratio), **out}

    def _tower_config(self, vision: VisionConfig, embed: int) -> Tree:
        """Return the keys of ``vision_config`` that the two have under other names."""
        ratio = vision.ffn_hidden_size / vision.hidden_size
        return {
            "embed_dim": vision.hidden_size, "hidden_act": "quick_gelu", "hidden_size": embed,
            "mlp_ratio": int(ratio) if ratio == int(ratio) else ratio,
        }  # fmt: skip

    def _refuses_tower(self, vision: VisionConfig) -> str | None:
        if vision.ffn_hidden_size % vision.hidden_size:
            return (
                f"the tower's MLP ({vision.ffn_hidden_size}) is no whole number of times as wide as the tower "
                f"({vision.hidden_size}), as mlp_ratio has it"
            )
        return None


class Qwen25VLFamily(Qwen2VLFamily):
    """``Qwen2_5_VLForConditionalGeneration``."""

    name = "qwen2_5_vl"
    title = "Qwen2.5-VL (Qwen2_5_VLForConditionalGeneration)"
    finds = "Locate {thing}, output its bbox coordinates using JSON format."  # cookbooks/spatial_understanding.ipynb
    box_pixels = True
    model_class = "Qwen2_5_VLForConditionalGeneration"
    tower: ClassVar[Table] = QWEN2_5_VL_VISION
    timed: ClassVar[bool] = True
    fixed: ClassVar[Tree] = {**_PLAIN, "normalization": "RMSNorm", "activation": "silu", "gated_mlp": True}

    def _films(self, source: Source, visual: Mapping[str, Any], vision: Tree, where: str) -> Tree:
        rate = number(visual, "tokens_per_second", where, 4)
        return film_branch(source, vision, self.film_plans[0], tokens_per_second=float(rate))

    def config(self, model: ModelConfig, tokens: Mapping[str, int]) -> Tree:
        """Return a configuration that old and new versions of Transformers read."""
        config, rate = super().config(model, tokens), model.video.tokens_per_second
        if rate is not None:
            config["vision_config"]["tokens_per_second"] = int(rate) if rate == int(rate) else rate
        return config

    def _activation(self) -> str:
        return "silu"

    def _sizes(self, visual: Mapping[str, Any], where: str) -> Tree:
        out = {"out": visual["out_hidden_size"]} if "out_hidden_size" in visual else {}
        return {
            "hidden_size": need(visual, "hidden_size", where),
            "ffn_hidden_size": need(visual, "intermediate_size", where),
            "window_size": visual.get("window_size", 112),
            "full_attention_layers": tuple(visual.get("fullatt_block_indexes", (7, 15, 23, 31))),
            **out,
        }

    def _tower_config(self, vision: VisionConfig, embed: int) -> Tree:
        return {
            "fullatt_block_indexes": list(vision.full_attention_layers),
            "hidden_act": "silu",
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.ffn_hidden_size,
            "out_hidden_size": embed,
            "tokens_per_second": 2,
            "window_size": vision.window_size,
        }

    def _refuses_tower(self, vision: VisionConfig) -> str | None:
        if vision.window_size is None:
            return "the tower attends to whole pictures (window_size), Qwen2.5-VL's within windows in most layers"
        return None
