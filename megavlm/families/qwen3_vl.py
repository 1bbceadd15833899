"""Qwen3-VL, dense and with experts (arXiv 2511.21631), as Transformers has it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from megavlm.architectures.connectors.patch_merger.tables import DEEP_PATCH_MERGER
from megavlm.architectures.decoders.decoder.tables import (
    LLAMA_LANGUAGE,
    QWEN3_VL_MOE_LANGUAGE,
    STACKED_MOE_LANGUAGE,
)
from megavlm.architectures.towers.packed_vit.tables import QWEN3_VL_VISION
from megavlm.config.errors import UserError
from megavlm.config.schema import LanguageConfig, ModelConfig
from megavlm.families.common import expect_kinds, flag, need
from megavlm.families.decoders import llama_config, llama_language, with_numbers
from megavlm.families.experts import QWEN3_MOE, experts_branch, experts_config
from megavlm.families.family import Tree, config_file
from megavlm.families.llama import no_llama
from megavlm.families.native_pictures import native_pictures
from megavlm.families.qwen2_vl import Qwen2VLFamily
from megavlm.weights.rules import Table
from megavlm.weights.source import Source

_SECTIONS = (24, 20, 20)
"""Where a configuration does not say it, as Transformers has it."""


_OWN = ("positional_grid", "deepstack_layers")
"""What its tower has and Qwen2-VL's has not."""


class Qwen3VLFamily(Qwen2VLFamily):
    """``Qwen3VLForConditionalGeneration``: interleaved sections, and a deepstack."""

    name = "qwen3_vl"
    title = "Qwen3-VL, dense (Qwen3VLForConditionalGeneration)"
    # Of the cookbook of Qwen2.5-VL; its own (2d_grounding.ipynb) asks for categories in the same notation.
    finds = "Locate {thing}, output its bbox coordinates using JSON format."
    styles: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "modules": {"tower": "model.visual.", "model": "model.language_model.", "head": "lm_head."}
    }
    template: ClassVar[str | None] = "qwen3_vl"
    film_plans: ClassVar[tuple[str, ...]] = ("qwen3_vl",)
    own_levels = True
    model_class = "Qwen3VLForConditionalGeneration"
    tower: ClassVar[Table] = QWEN3_VL_VISION
    text_tables: ClassVar[Mapping[str, Table]] = {"modules": LLAMA_LANGUAGE}
    fixed: ClassVar[Tree] = {
        **{key: value for key, value in Qwen2VLFamily.fixed.items() if key not in _OWN},
        "activation": "gelu_tanh", "conv_bias": True, "positional_interpolation": "bilinear",
    }  # fmt: skip

    def branches(self, source: Source) -> Tree:
        """Return all three branches, and what becomes of pictures."""
        config, where = source.config, config_file(source)
        text, visual = need(config, "text_config", where), need(config, "vision_config", where)
        expect_kinds(config, where, text_config=(self.name, "qwen3"), vision_config=(self.name,))
        language = self._language(text, where)
        language["rotary_sections"] = language.get("rotary_sections") or _SECTIONS
        language["rotary_sections_interleaved"] = True  # whatever mrope_interleaved says: its code does not ask
        # The outer key is asked; that of text_config, true with experts in what Transformers 5 writes, only without it.
        tree = text if config.get("tie_word_embeddings") is None else config
        tied = flag(tree, "tie_word_embeddings", where, default=False)
        language["tie_word_embeddings"] = tied or "lm_head.weight" not in source
        vision = self._tower({"patch_size": 16, **visual}, language["hidden_size"], where)
        image, pixels = native_pictures(source, vision)
        connector = {"preset": "patch_merger", "merge_size": vision["spatial_merge_size"]}
        video = self._films(source, visual, vision | pixels, where)
        return {"vision": vision | pixels, "connector": connector, "language": language, "image": image, "video": video}

    def tables(self, model: ModelConfig, style: str) -> Sequence[Table]:
        """Return the three tables."""
        names = self.styles[style]
        return [
            dataclasses.replace(self.tower, prefix=names["tower"]),
            dataclasses.replace(DEEP_PATCH_MERGER, prefix=names["tower"]),
            dataclasses.replace(self.text_tables[style], names={"model": names["model"], "head": names["head"]}),
        ]

    def config(self, model: ModelConfig, tokens: Mapping[str, int]) -> Tree:
        """Return a configuration in the form of the published ones."""
        image, vision = tokens.get("image", model.language.vocab_size - 1), model.vision
        text = self._text_config(model.language)
        return {
            "architectures": [self.model_class],
            "image_token_id": image,
            "model_type": self.name,
            "text_config": text,
            "tie_word_embeddings": model.language.tie_word_embeddings,
            # Of the published tokenizers, whose ids lie beside each other.
            "video_token_id": image + 1,
            "vision_end_token_id": image - 2,
            "vision_start_token_id": image - 3,
            "vision_config": {
                "deepstack_visual_indexes": list(vision.deepstack_layers),
                "depth": vision.num_layers,
                "hidden_act": self._activation(),
                "hidden_size": vision.hidden_size,
                "in_channels": 3,
                "intermediate_size": vision.ffn_hidden_size,
                "model_type": self.name,
                "num_heads": vision.num_attention_heads,
                "num_position_embeddings": vision.positional_grid**2,
                "out_hidden_size": model.language.hidden_size,
                "patch_size": vision.patch_size,
                "spatial_merge_size": vision.spatial_merge_size,
                "temporal_patch_size": vision.temporal_patch_size,
            },
        }

    def refuses(self, model: ModelConfig) -> str | None:
        """Tower, connector, positions and image plan must be Qwen3-VL's kinds."""
        language, vision = model.language, model.vision
        if vision.positional_grid is None:
            return "the tower has no positional table, Qwen3-VL's has"
        if language.add_qkv_bias or not language.qk_layernorm:
            return "the language model is no Qwen3: that has a norm on queries and keys, and no bias on them"
        if not language.rotary_sections_interleaved:
            return "the language model's positions are not in interleaved sections, as Qwen3-VL's are"
        if len(set(vision.deepstack_layers)) < vision.deepstack or sorted(vision.deepstack_layers) != list(
            vision.deepstack_layers
        ):
            return f"the tower's deepstack_layers {list(vision.deepstack_layers)} do not rise, as Qwen3-VL's do"
        return self._refuses_common(model) or self._no_text(language)

    def templates(self, source: Source) -> tuple[str, ...]:
        """Its own ``chat_template``, else the form that it has."""
        return ("checkpoint", "qwen3_vl")

    def _language(self, text: Mapping[str, Any], where: str) -> Tree:
        """Return ``model.language`` of a ``text_config``, but how positions are turned and whether the head is tied."""
        return llama_language({**with_numbers(text, where), "model_type": "qwen3"}, where)

    def _text_config(self, language: LanguageConfig) -> Tree:
        """Return the ``text_config``."""
        text = llama_config(language)
        del text["architectures"]
        return text | {"attention_bias": False, "model_type": f"{self.name}_text"}

    def _no_text(self, language: LanguageConfig) -> str | None:
        """Return why a language model, whose norms and positions are Qwen3-VL's, is not the family's."""
        return no_llama(language)

    def _activation(self) -> str:
        return "gelu_pytorch_tanh"

    def _sizes(self, visual: Mapping[str, Any], where: str) -> Tree:
        rows = visual.get("num_position_embeddings", 2304)
        if math.isqrt(rows) ** 2 != rows:
            raise UserError(f"{where}: num_position_embeddings {rows} is no square, as a table of positions is")
        levels = tuple(visual.get("deepstack_visual_indexes", (8, 16, 24)))
        if len(set(levels)) < len(levels) or list(levels) != sorted(levels):
            # Its code gives a layer's features to the connector of the first place where it stands.
            raise UserError(f"{where}: deepstack_visual_indexes {list(levels)} do not rise; correct them")
        out = {"out": visual["out_hidden_size"]} if "out_hidden_size" in visual else {}
        return {
            "hidden_size": need(visual, "hidden_size", where),
            "ffn_hidden_size": need(visual, "intermediate_size", where),
            "positional_grid": math.isqrt(rows),
            "deepstack_layers": levels,
            **out,
        }


class Qwen3VLMoeFamily(Qwen3VLFamily):
    """``Qwen3VLMoeForConditionalGeneration``: the same with experts, those of a layer in one tensor."""

    name = "qwen3_vl_moe"
    title = "Qwen3-VL with experts (Qwen3VLMoeForConditionalGeneration)"
    model_class = "Qwen3VLMoeForConditionalGeneration"
    tower_preset = "qwen3_vl_vit"
    # Of experts, outputs first is what Transformers 5 writes of a model that it has not read.
    styles: ClassVar[Mapping[str, Mapping[str, str]]] = dict.fromkeys(
        ("hub", "outputs_first"), Qwen3VLFamily.styles["modules"]
    )
    modules: ClassVar[str | None] = "outputs_first"
    text_tables: ClassVar[Mapping[str, Table]] = {"hub": QWEN3_VL_MOE_LANGUAGE, "outputs_first": STACKED_MOE_LANGUAGE}

    def style_of(self, source: Source) -> str:
        """By the shape of a tensor of experts: [experts, in, out] on the hub."""
        text = source.config.get("text_config") or {}
        hidden, width = text.get("hidden_size"), text.get("moe_intermediate_size")
        shapes = {name: info.shape[1:] for name, info in source.tensors.items() if ".mlp.experts." in name}
        # A square one says nothing; where it is one, the other is none.
        outputs_first = {"down_proj": (hidden, width), "gate_up_proj": (2 * (width or 0), hidden)}
        found = any(
            name.endswith(ending) and shape == there and shape[0] != shape[1]
            for name, shape in shapes.items()
            for ending, there in outputs_first.items()
        )
        return "outputs_first" if found else "hub"

    def style_for(self, model: ModelConfig) -> str:
        """As on the hub; but Transformers turns no tensor whose sides are alike."""
        width = model.language.expert_width
        return "outputs_first" if model.language.hidden_size in (width, 2 * width) else "hub"

    def _language(self, text: Mapping[str, Any], where: str) -> Tree:
        heads, hidden = need(text, "num_attention_heads", where), need(text, "hidden_size", where)
        own = {**text, "head_dim": text.get("head_dim") or hidden // heads}  # of the dense ones' class: 128
        # Its router's scores add up to 1, whatever norm_topk_prob says: its code does not ask.
        return {**super()._language(own, where), **experts_branch(text, where, normalised=True)}

    def _text_config(self, language: LanguageConfig) -> Tree:
        return {**super()._text_config(language), **experts_config(language), "norm_topk_prob": True}

    def _no_text(self, language: LanguageConfig) -> str | None:
        if language.num_moe_experts is not None and language.moe_router_pre_softmax:
            return "the language model's scores are those of a softmax over all experts, which do not add up to 1"
        plain: Any = {"rotary_sections": ()}
        return QWEN3_MOE.refuses(dataclasses.replace(language, **plain))
