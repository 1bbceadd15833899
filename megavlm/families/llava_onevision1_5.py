"""LLaVA-OneVision-1.5 (arXiv 2509.23661), as its authors publish it: code beside the weights, no class of Transformers.

Facts are those of EvolvingLMMs-Lab/LLaVA-OneVision-1.5 (``ds/llavaonevision1_5/{configuration,modeling}_*.py``, which
lie beside the weights on the hub, and ``ds/merge_model.py``). That code takes class tokens of several pictures out at
the wrong places: the features of the second picture start with its class token, and its last patch is missing. Its
authors' training (``rice_vision_model.py``) and NVIDIA-NeMo/Automodel take out the class tokens, as is done here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from megavlm.architectures.connectors.patch_merger.tables import PATCH_MERGER
from megavlm.architectures.decoders.decoder.tables import LLAMA_LANGUAGE
from megavlm.architectures.towers.packed_vit.tables import RICE_VISION
from megavlm.config.errors import UserError
from megavlm.config.schema import ModelConfig
from megavlm.families.common import expect, expect_kinds, flag, need
from megavlm.families.decoders import llama_config, llama_language
from megavlm.families.family import Tree, config_file
from megavlm.families.llama import no_llama
from megavlm.families.native_pictures import native_pictures
from megavlm.families.qwen2_vl import Qwen2VLFamily
from megavlm.weights.rules import Table
from megavlm.weights.source import Source

_EPSILON = 1e-5
"""Of the layers' norms, for which its code has no key."""
_CODE = "llavaonevision1_5"


class LlavaOnevision15Family(Qwen2VLFamily):
    """``LLaVAOneVision1_5_ForConditionalGeneration``: RICE, and Qwen3 with one position per token."""

    name = "llava_onevision1_5"
    title = "LLaVA-OneVision-1.5 (LLaVAOneVision1_5_ForConditionalGeneration)"
    finds = None
    styles: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "modules": {"tower": "model.visual.", "model": "model.language_model.", "head": "lm_head."}
    }
    own_rotary = False
    model_class: ClassVar[str] = "LLaVAOneVision1_5_ForConditionalGeneration"
    tower: ClassVar[Table] = RICE_VISION
    fixed: ClassVar[Tree] = {
        **Qwen2VLFamily.fixed, "activation": "gelu", "class_token": True, "pre_layernorm": True,
        "layernorm_epsilon": _EPSILON, "temporal_patch_size": 1,
    }  # fmt: skip

    def detect(self, source: Source) -> bool:
        """By ``model_type``."""
        return source.config.get("model_type") == _CODE

    def branches(self, source: Source) -> Tree:
        """Return all three branches, and what becomes of pictures."""
        config, where = source.config, config_file(source)
        text, visual = need(config, "text_config", where), need(config, "vision_config", where)
        expect_kinds(config, where, text_config=("LLaVAOneVision1_5", "qwen3"), vision_config=("rice_vit",))
        if not text.get("rope_parameters"):
            need(text, "rope_theta", where)  # the code beside either size has another default
        language = llama_language({**text, "model_type": "qwen3"}, where)
        self._no_windows(text, where)
        # The outer key is Transformers' default and says nothing: its code asks the language model's.
        tied = flag(text, "tie_word_embeddings", where, default=False)
        language["tie_word_embeddings"] = tied or "lm_head.weight" not in source
        vision = self._tower(visual, language["hidden_size"], where)
        image, pixels = native_pictures(source, vision)
        connector = {
            "preset": "patch_merger", "merge_size": vision["spatial_merge_size"], "layernorm_epsilon": _EPSILON,
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
        """Return a configuration in the form of the published ones."""
        image, vision, language = tokens.get("image", model.language.vocab_size - 1), model.vision, model.language
        text = llama_config(language)
        del text["architectures"]
        text |= {
            "attention_bias": False, "layer_types": ["full_attention"] * language.num_layers,
            "max_window_layers": language.num_layers, "model_type": "LLaVAOneVision1_5_text", "sliding_window": None,
            "use_sliding_window": False,
        }  # fmt: skip
        code = f"modeling_{_CODE}.{self.model_class}"
        return {
            "architectures": [self.model_class],
            "auto_map": {
                "AutoConfig": f"configuration_{_CODE}.Llavaonevision1_5Config",
                "AutoModel": code,
                "AutoModelForCausalLM": code,
            },
            "image_token_id": image,
            "model_type": _CODE,
            "text_config": text,
            "tie_word_embeddings": language.tie_word_embeddings,
            # Of the published tokenizers, whose ids lie beside each other.
            "video_token_id": image + 1,
            "vision_end_token_id": image - 2,
            "vision_start_token_id": image - 3,
            "vision_config": {
                "depth": vision.num_layers,
                "embed_dim": vision.hidden_size,
                "hidden_act": self._activation(),
                "hidden_size": vision.hidden_size,
                "in_channels": 3,
                "intermediate_size": vision.ffn_hidden_size,
                "layer_norm_eps": _EPSILON,
                "model_type": "rice_vit",
                "num_heads": vision.num_attention_heads,
                "patch_size": vision.patch_size,
                "spatial_merge_size": vision.spatial_merge_size,
                "temporal_patch_size": 1,
                "text_hidden_size": language.hidden_size,
            },
            "vocab_size": language.vocab_size,
        }

    def refuses(self, model: ModelConfig) -> str | None:
        """Tower, connector, positions and image plan must be its kinds."""
        language = model.language
        if language.add_qkv_bias or not language.qk_layernorm:
            return "the language model is no Qwen3: that has a norm on queries and keys, and no bias on them"
        return self._refuses_common(model) or no_llama(language)

    def _no_windows(self, text: Mapping[str, Any], where: str) -> None:
        """Raise UserError where layers have a window, which its code gives them whatever use_sliding_window says."""
        layers = need(text, "num_hidden_layers", where)
        kinds = text.get("layer_types")
        if kinds is None:
            windowed = text.get("sliding_window") is not None and text.get("max_window_layers", 36) < layers
        else:
            windowed = set(kinds) != {"full_attention"}
        if windowed:
            raise UserError(
                f"{where}: text_config has layers with a sliding window (layer_types, sliding_window), which is not "
                "supported here; take a checkpoint without"
            )

    def _tower(self, visual: Mapping[str, Any], embed: int, where: str) -> Tree:
        expect(visual, where, in_channels=3, hidden_act=self._activation(), temporal_patch_size=1)
        expect(visual, where, layer_norm_eps=_EPSILON)
        out = visual.get("text_hidden_size", embed)
        if out != embed:
            raise UserError(
                f"{where}: vision_config makes vectors of {out}, but the language model takes {embed}; correct one"
            )
        return {
            "preset": "rice_vit",
            "temporal_patch_size": 1,
            "patch_size": visual.get("patch_size", 14),
            "spatial_merge_size": visual.get("spatial_merge_size", 2),
            "hidden_size": visual.get("hidden_size", 1024),
            "ffn_hidden_size": visual.get("intermediate_size", 4096),
            "num_layers": visual.get("depth", 24),
            "num_attention_heads": visual.get("num_heads", 16),
        }

    def _activation(self) -> str:
        return "gelu"
