"""Gemma 3 with pictures, as Transformers has it (arXiv 2503.19786): SigLIP at 896, 256 means of its features, Gemma 3.

The features of a picture see each other both ways, as far as a layer's window reaches
(``model.language.attention_mask``: images). Pan and scan, which shows a picture's crops beside it, is not built: it is
off unless a caller of Transformers' processor asks for it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from megavlm.architectures.connectors.patch_reducer.tables import GEMMA3_PROJECTOR
from megavlm.architectures.towers.vit.tables import TRANSFORMERS_VISION
from megavlm.config.errors import UserError
from megavlm.config.schema import ModelConfig
from megavlm.families.common import expect, need, number
from megavlm.families.family import Tree, config_file
from megavlm.families.gemma3 import GEMMA3
from megavlm.families.llava import LlavaFamily
from megavlm.families.preprocessor import image_branch, normalisation, processor_files
from megavlm.families.siglip_last import SiglipLastFamily, no_siglip_last, siglip_last
from megavlm.families.text import text_branch
from megavlm.families.towers import LAST_HIDDEN_STATE, transformers_vision_config
from megavlm.weights.rules import Table
from megavlm.weights.source import Source

_POOL = "gemma3_pool"


class Gemma3Family(SiglipLastFamily):
    """``Gemma3ForConditionalGeneration``."""

    name = "gemma3"
    title = "Gemma 3 with pictures (Gemma3ForConditionalGeneration: 4B, 12B, 27B)"
    # No place was found where its authors ask for boxes in a form of their own.
    parts = ("vision", "connector", "language")
    architectures: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "vision": ("vit",), "connector": ("patch_reducer",), "language": ("decoder",),
    }  # fmt: skip
    styles: ClassVar = LlavaFamily.styles  # the modules have the same names
    modules = "modules5"
    preprocesses = own_rotary = own_norms = True
    two_way = "images"
    template = "gemma3"
    image_plan = "squash"

    def branches(self, source: Source) -> Tree:
        """Return all three branches, and what becomes of pictures."""
        config, where = source.config, config_file(source)
        _no_pan_and_scan(source)
        vision = siglip_last(need(config, "vision_config", where), LAST_HIDDEN_STATE, where)
        vision |= normalisation(source, vision["image_size"])
        text = need(config, "text_config", where)
        expect(text, where, model_type=GEMMA3.model_type)
        text = {**text, "model_type": GEMMA3.model_type}
        language = text_branch(source, text, self.styles[self.style_of(source)]["head"], where)
        return {
            "vision": vision,
            "connector": {
                "preset": _POOL,
                "patches": _patches(vision, number(config, "mm_tokens_per_image", where, 256), where),
                "layernorm_epsilon": vision["layernorm_epsilon"],
            },
            "language": {**language, "attention_mask": self.two_way},
            "image": image_branch(source, vision["image_size"], clip=False),
        }

    def tables(self, model: ModelConfig, style: str) -> Sequence[Table]:
        """Return the three tables."""
        names = self.styles[style]
        return [
            dataclasses.replace(TRANSFORMERS_VISION, prefix=names["tower"]),
            dataclasses.replace(GEMMA3_PROJECTOR, prefix=names["projector"]),
            dataclasses.replace(GEMMA3.table, names={"model": names["model"], "head": names["head"]}),
        ]

    def config(self, model: ModelConfig, tokens: Mapping[str, int]) -> Tree:
        """Return the configuration."""
        image = tokens.get("image", model.language.vocab_size - 1)
        start = tokens.get("image_start")
        marks = {} if start is None else {"boi_token_index": start, "eoi_token_index": start + 1}
        return {
            "architectures": ["Gemma3ForConditionalGeneration"],
            **marks,
            "image_token_index": image,
            "mm_tokens_per_image": model.tokens_per_view,
            "model_type": self.name,
            "text_config": GEMMA3.write(model.language),
            "tie_word_embeddings": model.language.tie_word_embeddings,
            "vision_config": transformers_vision_config(model.vision),
        }

    def processor(self, model: ModelConfig, image_token: str) -> Tree:
        """Return its class, and how many slots it writes."""
        return {"image_seq_length": model.tokens_per_view, "processor_class": "Gemma3Processor"}

    def trained_pictures(self, model: ModelConfig, old: Mapping[str, Any]) -> Tree:
        """Return the keys of a square."""
        square = {"height": model.vision.image_size, "width": model.vision.image_size}
        return {"do_pan_and_scan": None, "image_processor_type": "Gemma3ImageProcessor",
                "image_seq_length": model.tokens_per_view, "size": square}  # fmt: skip

    def named_tokens(self, image_token: str, known: Any) -> dict[str, str]:
        """Return the names that its processor has for the tokens around pictures."""
        return {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": image_token}

    def refuses(self, model: ModelConfig) -> str | None:
        """Tower, connector, language model and image plan must be Gemma 3's kinds."""
        connector, vision = model.connector, model.vision
        own = {
            "merge": "mean", "depth": 1, "add_bias_linear": False, "normalization": "RMSNorm",
            "layernorm_zero_centered_gamma": True, "layernorm_epsilon": vision.layernorm_epsilon,
        }  # fmt: skip
        for key, wanted in own.items():
            if getattr(connector, key) != wanted:
                return f"the connector's {key} is {getattr(connector, key)!r}, Gemma 3's is {wanted!r}"
        if model.image.kind != "squash":
            return f"the image plan is {model.image.kind}, Gemma 3 squashes pictures"
        return no_siglip_last(vision) or GEMMA3.refuses(model.language)

    def templates(self, source: Source) -> tuple[str, ...]:
        """Its chat template writes one token for a picture, and its processor what stands around: the row has both."""
        return (self.template,)

    def tokens(self, source: Source) -> dict[str, int]:
        """``image_token_index`` and ``boi_token_index``, or their newer names."""
        found = {}
        for ours, theirs in (("image", "image"), ("image_start", "boi")):
            token = source.config.get(f"{theirs}_token_id", source.config.get(f"{theirs}_token_index"))
            if isinstance(token, int):
                found[ours] = token
        return found


def _patches(vision: Mapping[str, Any], tokens: float, where: str) -> int:
    """Return the patches whose mean is a token.

    Raises:
        UserError: they are no square, or do not fill the grid.
    """
    side = vision["positional_grid"]
    across = math.isqrt(int(tokens))
    if tokens != across**2 or not across or side % across:
        raise UserError(
            f"{where}: mm_tokens_per_image is {tokens:g}, and the tower makes {side} x {side} patches; squares of them"
            " must give as many tokens"
        )
    return int(side // across) ** 2


def _no_pan_and_scan(source: Source) -> None:
    """Check that a picture is one view.

    Raises:
        UserError: its processor's file asks for crops.
    """
    for path, tree in processor_files(source):
        if tree.get("do_pan_and_scan"):
            raise UserError(
                f"{path}: do_pan_and_scan is true; crops beside a picture are not supported: set it to false"
            )
