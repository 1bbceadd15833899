"""CogAgent (arXiv 2312.08914) as its authors publish it: code and weights, no class in Transformers.

Facts are those of ``modeling_cogagent.py``, ``visual.py`` and ``cross_visual.py`` beside the weights of
THUDM/cogagent-chat-hf and cogagent-vqa-hf (a copy: github.com/aredden/faster-cogagent-chat @ 9bdc9cb8); names and
numbers are vLLM's too (``cogagent.py``, ``cogagent_vision_encoder.py``, ``configs/cogagent.py``). It is CogVLM at 224
pixels, with a table that is added to the tower's features, and an EVA02-CLIP-L that sees the picture at 1120: of that
the code runs all layers but the last, which lies in the file with its norm and head. ``config.json`` has no shape of
that tower but its picture's side and its width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from megavlm.architectures.connectors.glu.tables import COGVLM_GLU
from megavlm.architectures.decoders.decoder.tables import COGAGENT_LANGUAGE
from megavlm.architectures.towers.vit_vit.tables import COGAGENT_HIGH, COGAGENT_LOW
from megavlm.config.errors import UserError
from megavlm.config.schema import LanguageConfig, ModelConfig
from megavlm.families.cogvlm import COGVLM_TEXT, CogVLMFamily, both_weights, first_tower, first_tower_keys
from megavlm.families.common import expect, need
from megavlm.families.eva02 import AUTHORS, eva02_tower, no_eva02
from megavlm.families.family import Tree, config_file
from megavlm.weights.rules import Table
from megavlm.weights.source import Source

AGENT_CLASS = "CogAgentForCausalLM"
_CROSS = "model.cross_vision."
_TOP = f"{_CROSS}vit.model."
_WORDS = {**AUTHORS, "top": _TOP, "whole": "", "cross": _CROSS}
_TEMPLATES = {"chat": "cogagent", "chat_old": "cogvlm", "vqa": "cogvlm_vqa", "base": "cogvlm_base"}
"""``template_version``, and what it is here."""
_UNUSED = -2
"""The last layer that runs, from behind."""


def _read(config: Mapping[str, Any], where: str) -> Tree:
    width = need(config, "cross_hidden_size", where)
    # Its code takes one for the other behind attention.
    expect(config, where, cross_compute_hidden_size=width)
    return {**COGVLM_TEXT.read(config, where), "cross_hidden_size": width, "cross_compute_hidden_size": width}


def _write(language: LanguageConfig) -> Tree:
    keys = ("cross_hidden_size", "cross_compute_hidden_size")
    return {**COGVLM_TEXT.write(language), **{key: getattr(language, key) for key in keys}}


def _narrow(language: LanguageConfig) -> str | None:
    if not language.feature_width:
        return "its layers attend to no features of a second tower (model.language.cross_hidden_size)"
    inside, width = language.cross_compute_hidden_size, language.cross_hidden_size
    if inside != width:
        return (
            f"its layers attend to features {inside} wide inside (model.language.cross_compute_hidden_size), where"
            f" CogAgent's code takes the features' own width, {width} (cross_hidden_size)"
        )
    return COGVLM_TEXT.narrow(language)


COGAGENT_TEXT = dataclasses.replace(
    COGVLM_TEXT, model_type="cogagent", title="CogAgent", table=COGAGENT_LANGUAGE, read=_read, write=_write,
    narrow=_narrow, templates=("cogagent",),
)  # fmt: skip


class CogAgentFamily(CogVLMFamily):
    """``CogAgentForCausalLM``."""

    name = "cogagent"
    title = "CogAgent (CogAgentForCausalLM)"
    architectures: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "vision": ("vit_vit",), "connector": ("glu",), "language": ("decoder",),
    }  # fmt: skip
    template = "cogagent"
    image_plan = "squash_pair"
    features_beside = True
    text, class_name, files, versions = COGAGENT_TEXT, AGENT_CLASS, "cogagent", _TEMPLATES

    def branches(self, source: Source) -> Tree:
        """Return all three branches, and what becomes of pictures."""
        config, where = source.config, config_file(source)
        both_weights(source)
        language = COGAGENT_TEXT.branch(config, where)
        low = first_tower(need(config, "vision_config", where), where)
        high = eva02_tower(source, _WORDS, _UNUSED)
        expect(config, where, cross_image_size=high["image_size"], cross_hidden_size=high["hidden_size"])
        if high["image_size"] // high["patch_size"] % (low["image_size"] // low["patch_size"]):
            raise UserError(
                f"{where}: cross_image_size is {high['image_size']}, whose patches are no whole number to each of those"
                f" of image_size {low['image_size']}; only such sizes are supported"
            )
        high.pop("preset"), high.pop("feature_layers")
        return {
            "vision": {
                **low, "preset": "eva02_pair", "high_to": "layers", **{f"high_{key}": high[key] for key in high},
            },
            "connector": self.connector(language),
            "language": language,
            "image": {"kind": self.image_plan, "resample": "bicubic"},
            "template": self.version(config, where),
        }  # fmt: skip

    def tables(self, model: ModelConfig, style: str) -> Sequence[Table]:
        """Return the tables."""
        low = dataclasses.replace(COGAGENT_LOW, prefix="model.vision.")
        return [low, dataclasses.replace(COGAGENT_HIGH, names=_WORDS), COGVLM_GLU, COGAGENT_LANGUAGE]

    def config(self, model: ModelConfig, tokens: Mapping[str, int]) -> Tree:
        """Return a configuration in the form of the published ones."""
        return {**super().config(model, tokens), "cross_image_size": model.vision.high_image_size}

    def tower_refused(self, model: ModelConfig) -> str | None:
        """Both towers must be CogAgent's."""
        vision = model.vision
        wanted = {**first_tower_keys(), "low_from": "plan", "high_to": "layers", "feature_table": True}
        wanted |= {"low_tiles": 1, "low_whole": False}
        wanted |= {"high_feature_table": True, "high_post_layernorm": False, "high_feature_layers": None}
        wanted |= {
            "high_attention_norm": True,
            "high_activation": "silu",
            "high_branch_norms": "before",
            "high_positional_antialias": False,
            "high_class_feature": False,
            "high_deepstack_layers": (),
            "high_post_layernorm_epsilon": None,
            "high_image_mean": vision.image_mean,
            "high_image_std": vision.image_std,
        }
        for key, value in wanted.items():
            there = getattr(vision, key)
            if (tuple(there) if isinstance(there, list) else there) != value:
                return f"the towers have {key} {there!r}, those of CogAgent {value!r}"
        return no_eva02(vision.high)
