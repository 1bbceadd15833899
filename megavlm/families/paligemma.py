"""PaliGemma as Transformers has it (arXiv 2407.07726): SigLIP, one linear layer, Gemma, and attention on prefixes.

A picture's features and the words in front of an answer see each other both ways; the answer is causal
(``model.language.attention_mask``). Of PaliGemma 2 the language model, Gemma 2, is not built.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from megavlm.architectures.connectors.mlp.tables import LINEAR_PROJECTOR
from megavlm.architectures.towers.vit.tables import TRANSFORMERS_VISION
from megavlm.config.schema import ModelConfig
from megavlm.families.common import expect, need
from megavlm.families.family import Tree, config_file
from megavlm.families.gemma import GEMMA
from megavlm.families.llava import LlavaFamily
from megavlm.families.preprocessor import image_branch, normalisation
from megavlm.families.siglip_last import SiglipLastFamily, no_siglip_last, siglip_last
from megavlm.families.text import text_branch
from megavlm.families.towers import LAST_HIDDEN_STATE, transformers_vision_config
from megavlm.weights.rules import Table
from megavlm.weights.source import Source


class PaliGemmaFamily(SiglipLastFamily):
    """``PaliGemmaForConditionalGeneration``."""

    name = "paligemma"
    title = "PaliGemma (PaliGemmaForConditionalGeneration)"
    # The task that its mixtures are trained on (2407.07726, appendix B); top, left, bottom, right as location tokens.
    finds = "detect {thing}"
    parts = ("vision", "connector", "language")
    architectures: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "vision": ("vit",), "connector": ("mlp",), "language": ("decoder",),
    }  # fmt: skip
    styles: ClassVar = LlavaFamily.styles  # the modules have the same names
    modules = "modules5"
    preprocesses = True
    two_way = "prefix"
    template = "paligemma"
    image_plan = "squash"

    def branches(self, source: Source) -> Tree:
        """Return all three branches, and what becomes of pictures."""
        config, where = source.config, config_file(source)
        vision = siglip_last(need(config, "vision_config", where), LAST_HIDDEN_STATE, where)
        vision |= normalisation(source, vision["image_size"])
        text = need(config, "text_config", where)
        expect(text, where, model_type=GEMMA.model_type, use_bidirectional_attention=True)
        # Whether it is set or left out, this class takes its masks for prefixes.
        text = {**text, "model_type": GEMMA.model_type, "use_bidirectional_attention": None}
        expect(config, where, projection_dim=text.get("hidden_size", GEMMA.defaults["hidden_size"]))
        language = text_branch(source, text, self.styles[self.style_of(source)]["head"], where)
        return {
            "vision": vision,
            "connector": {"preset": "linear"},
            "language": {**language, "attention_mask": self.two_way},
            "image": image_branch(source, vision["image_size"], clip=False),
        }

    def tables(self, model: ModelConfig, style: str) -> Sequence[Table]:
        """Return the three tables."""
        names = self.styles[style]
        return [
            dataclasses.replace(TRANSFORMERS_VISION, prefix=names["tower"]),
            dataclasses.replace(LINEAR_PROJECTOR, names={"linear": names["projector"] + "linear"}),
            dataclasses.replace(GEMMA.table, names={"model": names["model"], "head": names["head"]}),
        ]

    def config(self, model: ModelConfig, tokens: Mapping[str, int]) -> Tree:
        """Return the configuration."""
        language, tokens_per_view = model.language, model.tokens_per_view
        return {
            "architectures": ["PaliGemmaForConditionalGeneration"],
            "bos_token_id": 2,  # Gemma's; a tokenizer with another is asked for it (trained.py). vLLM reads it here
            "hidden_size": language.hidden_size,
            "image_token_index": tokens.get("image", language.vocab_size - 1),
            "model_type": self.name,
            "projection_dim": language.hidden_size,
            "text_config": {
                **GEMMA.write(language),
                "num_image_tokens": tokens_per_view,
                "use_bidirectional_attention": True,
            },
            "tie_word_embeddings": language.tie_word_embeddings,
            "vision_config": {
                **transformers_vision_config(model.vision),
                "num_image_tokens": tokens_per_view,
                "projection_dim": language.hidden_size,
            },
            "vocab_size": language.vocab_size,
        }

    def processor(self, model: ModelConfig, image_token: str) -> Tree:
        """Return its class; it takes the number of slots from the image processor's file."""
        return {"processor_class": "PaliGemmaProcessor"}

    def trained_pictures(self, model: ModelConfig, old: Mapping[str, Any]) -> Tree:
        """Return the keys of a square, and how many slots it has."""
        square = {"height": model.vision.image_size, "width": model.vision.image_size}
        return {"image_processor_type": "SiglipImageProcessor", "image_seq_length": model.tokens_per_view,
                "size": square}  # fmt: skip

    def refuses(self, model: ModelConfig) -> str | None:
        """Tower, connector, language model and image plan must be PaliGemma's kinds."""
        if model.connector.preset != "linear":
            return f"the connector is {model.connector.preset}, PaliGemma's is linear"
        if model.image.kind != "squash":
            return f"the image plan is {model.image.kind}, PaliGemma squashes pictures"
        return no_siglip_last(model.vision) or GEMMA.refuses(model.language)

    def templates(self, source: Source) -> tuple[str, ...]:
        """It is published without a chat template."""
        return (self.template,)

    def tokens(self, source: Source) -> dict[str, int]:
        """``image_token_index``, or its newer name."""
        token = source.config.get("image_token_id", source.config.get("image_token_index"))
        return {"image": token} if isinstance(token, int) else {}
