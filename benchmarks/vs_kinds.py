"""Both systems of ``vs_transformers`` with other kinds of language models, on the mixes of its plain one.

``phi``: CLIP's tower, LLaVA's connector, and Phi, whose attention and MLP lie side by side behind one norm.
``paligemma``: SigLIP's tower, one linear layer, and Gemma, in which pictures and questions see each other both ways.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from mixes import IMAGE_SIZE, IMAGE_TOKEN, VOCABULARY, Sample
from vs_worker import CLIP, LANGUAGE, LEARNING_RATE, VISION, Megavlm, Transformers, Work

from megavlm.data.batch import IGNORE_INDEX


class PhiTransformers(Transformers):
    """The same as the plain one, with Phi."""

    def language_model(self) -> Any:
        """Return Phi."""
        from transformers import PhiConfig, PhiForCausalLM

        config = PhiConfig(
            vocab_size=VOCABULARY, hidden_size=LANGUAGE["hidden_size"], intermediate_size=LANGUAGE["ffn"],
            num_hidden_layers=LANGUAGE["layers"], num_attention_heads=LANGUAGE["heads"], partial_rotary_factor=0.5,
            tie_word_embeddings=False, use_cache=False, attn_implementation="sdpa",
        )  # fmt: skip
        return PhiForCausalLM(config)


class PhiMegavlm(Megavlm):
    """The same as the plain one, with Phi."""

    language: ClassVar[dict[str, Any]] = {"preset": "phi", "init_method_std": 0.02}


class PrefixTransformers(Transformers):
    """PaliGemma, whose class is told with ``token_type_ids`` what is answer."""

    def __init__(self, pack_length: int) -> None:
        self.pack_length = pack_length
        from transformers import GemmaConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration, SiglipVisionConfig

        hidden = LANGUAGE["hidden_size"]
        text = GemmaConfig(
            vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=LANGUAGE["ffn"],
            num_hidden_layers=LANGUAGE["layers"], num_attention_heads=LANGUAGE["heads"], num_key_value_heads=1,
            head_dim=hidden // LANGUAGE["heads"], use_cache=False,
        )  # fmt: skip
        vision = SiglipVisionConfig(
            hidden_size=VISION["hidden_size"], intermediate_size=VISION["ffn"], num_hidden_layers=VISION["layers"],
            num_attention_heads=VISION["heads"], image_size=IMAGE_SIZE, patch_size=VISION["patch"],
            vision_use_head=False,
        )  # fmt: skip
        config = PaliGemmaConfig(
            vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, projection_dim=hidden,
            hidden_size=hidden, attn_implementation="sdpa",
        )  # fmt: skip
        self.model: Any = PaliGemmaForConditionalGeneration(config).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, weight_decay=0.1, fused=True)
        self.parameters = sum(p.numel() for p in self.model.parameters())

    def _collate(self, samples: list[Sample]) -> tuple[Any, Work]:
        (tokens, labels, mask, pixels), work = super()._collate(samples)
        # From the first answer on, as here; what is padded is masked anyway.
        kinds = (labels != IGNORE_INDEX).long().cummax(dim=1).values
        given = {"input_ids": tokens, "labels": labels, "attention_mask": mask, "token_type_ids": kinds}
        return {**given, **({"pixel_values": pixels} if len(pixels) else {})}, work

    def step(self, batch: Any) -> float:
        """Forward, backward, clip, update."""
        loss = self.model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss)


class PrefixMegavlm(Megavlm):
    """PaliGemma's shape."""

    language: ClassVar[dict[str, Any]] = {
        "preset": "gemma", "attention_mask": "prefix", "num_query_groups": 1, "init_method_std": 0.02,
        "embedding_multiplier": math.sqrt(LANGUAGE["hidden_size"]),
    }  # fmt: skip
    vision: ClassVar[dict[str, Any]] = {
        "conv_bias": True, "pre_layernorm": False, "post_layernorm": True, "activation": "gelu_tanh",
    }  # fmt: skip
    connector = "linear"
