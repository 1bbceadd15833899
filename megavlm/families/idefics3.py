"""Idefics3 (arXiv 2408.12637) and SmolVLM (2504.05299) as Transformers has them.

SigLIP's last layer behind its norm, squares of patches side by side through one matrix, and a Llama; pictures are cut
to tiles that each have a name. Transformers' tower knows pictures of any size and padding; its processors make whole
tiles alone, whose positions are those of the plain table. SmolVLM2's films are not read.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from megavlm.architectures.connectors.patch_reducer.tables import IDEFICS3_CONNECTOR
from megavlm.architectures.towers.vit.tables import TRANSFORMERS_VISION
from megavlm.config.errors import UserError
from megavlm.config.schema import ModelConfig
from megavlm.data.templates import is_checkpoint
from megavlm.families.common import expect, flag, need, number
from megavlm.families.family import Tower, Tree, config_file
from megavlm.families.preprocessor import normalisation, processor_files, resampling
from megavlm.families.siglip_last import SiglipLastFamily, no_siglip_last
from megavlm.families.text import no_half, text_branch, text_config, text_table
from megavlm.families.towers import LAST_HIDDEN_STATE, transformers_vision, transformers_vision_config
from megavlm.weights.rules import Table
from megavlm.weights.source import CONFIG, Source

# Idefics3VisionConfig's own defaults, which published files leave out; SmolVLM's are the same.
_VISION_DEFAULTS: Tree = {
    "hidden_size": 1152, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 16,
    "image_size": 224, "patch_size": 32,
}  # fmt: skip
_MOST_PIXELS = 4096
"""Longer sides are cut off there by the processors."""
_ROUNDED = frozenset({19, 25, 29, 31, 38, 40, 41, 43, 47, 49, 50, 54, 55, 58, 59, 61, 62, 67, 68})
"""Patches along a tile for which the classes' fractional positions, in fp32, give two patches one row of the table."""
_MOST_PATCHES = 70
"""The largest for which that was tried."""
# What the first files of the hub say of a language model that is a Llama all the same.
_PLAIN_TEXT = {"qk_layer_norms": False, "rope_interleaved": False, "use_resampler": False}


class Idefics3Family(SiglipLastFamily):
    """``Idefics3ForConditionalGeneration``."""

    name = "idefics3"
    title = "Idefics3 and SmolVLM 1 (Idefics3ForConditionalGeneration)"
    # No place was found where its authors ask for boxes.
    parts: ClassVar[tuple[str, ...]] = ("vision", "connector", "language")
    architectures: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "vision": ("vit",), "connector": ("patch_reducer",), "language": ("decoder",),
    }  # fmt: skip
    styles: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "modules": {
            "tower": "model.vision_model.",
            "projector": "model.connector.",
            "model": "model.text_model.",
            "head": "lm_head.",
        },
    }
    preprocesses = own_rotary = own_norms = plan_of_connector = True
    template = "idefics3"
    image_plan = "split_tiles"
    classes: ClassVar[str] = "Idefics3"
    """What the names of Transformers' classes begin with."""

    def branches(self, source: Source) -> Tree:
        """Return all three branches, and what becomes of pictures."""
        config, where = source.config, config_file(source)
        vision = transformers_vision(*self.tower_of(config, source.directory), where)
        vision |= normalisation(source, None)
        reason = _inexact(vision["positional_grid"])
        if reason is not None:
            raise UserError(f"{where}: {reason}; such a tower is not supported")
        text = need(config, "text_config", where)
        expect(text, where, **_PLAIN_TEXT)
        head = self.styles["modules"]["head"]
        language = text_branch(source, text, head, where)
        return {
            "vision": vision,
            "connector": {
                "preset": "concat_square",
                "patches": _factor(config, vision, where) ** 2,
                "add_bias_linear": False,
            },
            "language": language | {"tie_word_embeddings": head + "weight" not in source},
            "image": _pictures(source, vision["image_size"]),
        }

    def tables(self, model: ModelConfig, style: str) -> Sequence[Table]:
        """Return the three tables."""
        names = self.styles[style]
        return [
            dataclasses.replace(TRANSFORMERS_VISION, prefix=names["tower"]),
            dataclasses.replace(IDEFICS3_CONNECTOR, prefix=names["projector"]),
            text_table(model.language, model=names["model"], head=names["head"]),
        ]

    def config(self, model: ModelConfig, tokens: Mapping[str, int]) -> Tree:
        """Return the configuration."""
        language = model.language
        vision = {**transformers_vision_config(model.vision), "model_type": f"{self.name}_vision"}
        del vision["vision_use_head"]
        return {
            "architectures": [f"{self.classes}ForConditionalGeneration"],
            "image_token_id": tokens.get("image", language.vocab_size - 1),
            "model_type": self.name,
            "scale_factor": math.isqrt(model.connector.patches),
            "text_config": text_config(language),
            "tie_word_embeddings": language.tie_word_embeddings,
            "vision_config": vision,
        }

    def tower_of(self, config: Mapping[str, Any], directory: Path) -> Tower:
        """Return a SigLIP's configuration; the last layer's features, behind the norm."""
        where = str(directory / CONFIG)
        vision = need(config, "vision_config", where)
        expect(vision, where, model_type=(self.name, f"{self.name}_vision", "idefics3", "siglip_vision_model"))
        own = {**_VISION_DEFAULTS, **vision, "model_type": "siglip_vision_model", "vision_use_head": False}
        for key in ("image_size", "patch_size"):
            sides = own[key] if isinstance(own[key], list) else [own[key]]
            if len(set(sides)) != 1:
                raise UserError(f"{where}: {key} of vision_config is {own[key]!r}; only squares are supported")
            own[key] = sides[0]
        return own, LAST_HIDDEN_STATE

    def with_tower(self, config: Tree, vision_config: Tree, layer: Any) -> Tree:
        """Put it into the configuration."""
        own = {key: value for key, value in vision_config.items() if key != "vision_use_head"}
        return {**config, "vision_config": {**own, "model_type": f"{self.name}_vision"}}

    def processor(self, model: ModelConfig, image_token: str) -> Tree:
        """Return its class, and how many slots it writes for a tile."""
        return {"image_seq_len": model.tokens_per_view, "processor_class": f"{self.classes}Processor"}

    def trained_pictures(self, model: ModelConfig, old: Mapping[str, Any]) -> Tree | None:
        """Return the keys of its own image processor."""
        image, side = model.image, model.vision.image_size
        if image.kind != "split_tiles":
            return None
        return {
            "do_image_splitting": image.image_splitting,
            "do_pad": True,
            "image_processor_type": f"{self.classes}ImageProcessor",
            "max_image_size": {"longest_edge": side},
            "size": {"longest_edge": image.longest_edge or 4 * side},
        }

    def named_tokens(self, image_token: str, known: Any) -> dict[str, str]:
        """Return the names that SmolVLM's processor has for the tokens of pictures, and of an answer's end."""
        return {
            "end_of_utterance_token": "<end_of_utterance>", "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>", "image_token": image_token,
        }  # fmt: skip

    def refuses(self, model: ModelConfig) -> str | None:
        """Tower, connector, language model and image plan must be Idefics3's kinds."""
        connector = model.connector
        own = {"merge": "square", "depth": 1, "add_bias_linear": False, "normalization": None}
        for key, wanted in own.items():
            if getattr(connector, key) != wanted:
                return f"the connector's {key} is {getattr(connector, key)!r}, Idefics3's is {wanted!r}"
        if model.image.kind != "split_tiles":
            return f"the image plan is {model.image.kind}, Idefics3's is split_tiles"
        return no_siglip_last(model.vision) or _inexact(model.vision.positional_grid) or no_half(model.language)

    def templates(self, source: Source) -> tuple[str, ...]:
        """Its chat template writes one token for a picture, its processor what stands around: the rows have both."""
        return ("idefics3", "smolvlm")

    def unsaid(self, model: ModelConfig, template: str) -> list[str]:
        """Its processor writes tokens around tiles, which are words where a template does not know them."""
        if is_checkpoint(template) or template in ("idefics3", "smolvlm"):
            return []
        return [
            f"model.template: {template} has no tokens for what stands around tiles (<fake_token_around_image>, "
            f"<global-img>), which {self.classes}Processor writes"
        ]

    def tokens(self, source: Source) -> dict[str, int]:
        """``image_token_id``."""
        token = source.config.get("image_token_id")
        return {"image": token} if isinstance(token, int) else {}


class SmolVLMFamily(Idefics3Family):
    """``SmolVLMForConditionalGeneration``."""

    name = "smolvlm"
    title = "SmolVLM2 (SmolVLMForConditionalGeneration)"
    template = "smolvlm"
    classes = "SmolVLM"

    def templates(self, source: Source) -> tuple[str, ...]:
        """As Idefics3's, on SmolLM2."""
        return ("smolvlm", "idefics3")


def _inexact(grid: int) -> str | None:
    """Return why the positions of a whole tile are not those of the plain table in Transformers' classes, or None."""
    if grid in _ROUNDED or grid > _MOST_PATCHES:
        return (
            f"a tile of {grid} x {grid} patches, some of which share a position in Transformers' classes, as these "
            "round where a patch lies (26, 27 and 32 of the published ones are exact)"
        )
    return None


def _factor(config: Mapping[str, Any], vision: Tree, where: str) -> int:
    """Return the side of the squares of patches that become one token.

    Raises:
        UserError: squares of that side do not fill the tower's grid.
    """
    factor, grid = number(config, "scale_factor", where, 2), vision["positional_grid"]
    if factor < 1 or factor != int(factor) or grid % int(factor):
        fit = ", ".join(str(side) for side in (1, 2, 3, 4, 6, 8) if grid % side == 0)
        raise UserError(
            f"{where}: scale_factor is {factor!r}; it must be a whole number that divides the {grid} x {grid} patches "
            f"of the tower, such as {fit}"
        )
    return int(factor)


def _files(source: Source) -> Iterator[tuple[str, Tree]]:
    """Yield the image processor's settings, as far as there are some."""
    for path, tree in processor_files(source, areas=True):
        if tree:
            yield str(path), tree


def _pictures(source: Source, side: int) -> Tree:
    """Return ``model.image`` by the image processor's file; empty where there is none.

    Raises:
        UserError: pictures are treated in a way that is not done here, or two files disagree.
    """
    found: Tree = {}
    for where, tree in _files(source):
        kind = str(tree.get("image_processor_type", "Idefics3ImageProcessor"))
        if not kind.startswith(("Idefics3", "SmolVLM")):
            raise UserError(f"{where}: image_processor_type is {kind!r}; Idefics3's or SmolVLM's is supported")
        if tree.get("do_resize") is False:
            raise UserError(f"{where}: do_resize is false; pictures are always resized here: set it to true")
        tile = (tree.get("max_image_size") or {}).get("longest_edge", 364)
        if tile != side:
            raise UserError(
                f"{where}: makes tiles of {tile!r} (max_image_size), but config.json's tower is for {side} x {side}; "
                "correct one"
            )
        longest = (tree.get("size") or {}).get("longest_edge", 4 * 364)
        if not isinstance(longest, int) or isinstance(longest, bool) or not side <= longest <= _MOST_PIXELS:
            raise UserError(
                f"{where}: longest_edge of size is {str(longest)[:40]!r}; it must be a length from {side} (a tile) to "
                f"{_MOST_PIXELS} pixels"
            )
        splitting = flag(tree, "do_image_splitting", where, default=True)
        resample = resampling({"resample": 1, **tree}, where)
        one = {"kind": "split_tiles", "longest_edge": longest, "image_splitting": splitting, "resample": resample}
        if found and one != found:
            raise UserError(f"{where}: pictures become {one}, but by the other file {found}; correct one")
        found = one
    return found
