"""Presets of InternVL have the published sizes, and are what Transformers builds of their configuration."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from pydantic import TypeAdapter
from transformers import InternVLConfig, InternVLForConditionalGeneration

from megavlm.architectures.context import BuildContext
from megavlm.checkpoint.hf.shapes import alone
from megavlm.config.schema import ModelConfig, ParallelConfig
from megavlm.families.known import FAMILIES
from megavlm.families.presets import expand_presets
from megavlm.models.vlm import VisionLanguageModel

# As the model cards round them: InternVL2.5 and 3 (OpenGVLab/InternVL2_5-1B, InternVL3-1B, ..), InternVL3.5.
PUBLISHED = {
    "internvl2_5_1b": "938.19M", "internvl2_5_4b": "3.71B", "internvl2_5_38b": "38.39B", "internvl2_5_78b": "78.41B",
    "internvl3_2b": "2.09B", "internvl3_8b": "7.94B", "internvl3_14b": "15.12B",
    "internvl3_5_1b": "1.06B", "internvl3_5_2b": "2.35B", "internvl3_5_4b": "4.73B", "internvl3_5_8b": "8.53B",
    "internvl3_5_14b": "15.12B", "internvl3_5_38b": "38.4B",
}  # fmt: skip
TOWERS = {"intern_vit_300m_448": "304.01M", "intern_vit_6b_448": "5.54B"}


def rounded(count: int, like: str) -> str:
    scale, digits = {"M": 1e6, "B": 1e9}[like[-1]], len(like.partition(".")[2]) - 1
    return f"{count / scale:.{digits}f}{like[-1]}"


def model_of(preset: str) -> ModelConfig:
    tree = {"model": {"preset": preset, "language": {"vocab_divisor": 2}}}  # no rows that pad the vocabulary
    model: ModelConfig = TypeAdapter(ModelConfig).validate_python(expand_presets(tree)["model"])
    return model


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.family("internvl")
@pytest.mark.parametrize(
    "preset",
    [
        name if name in ("internvl3_8b", "internvl3_5_1b") else pytest.param(name, marks=pytest.mark.long)
        for name in PUBLISHED
    ],
)
def test_a_preset_has_the_published_size(preset: str) -> None:
    model = model_of(preset)
    config = InternVLConfig(**FAMILIES["internvl"].config(model, {}))
    with alone(), torch.device("meta"):
        ours = VisionLanguageModel(model, BuildContext(ParallelConfig(), initialize=False), 0)
        theirs = InternVLForConditionalGeneration(config)
    assert count(ours) == count(theirs)
    assert rounded(count(ours), PUBLISHED[preset]) == PUBLISHED[preset]
    assert rounded(count(ours.vision), TOWERS[model.vision.preset]) == TOWERS[model.vision.preset]
    assert (model.template, model.image.kind, model.tokens_per_view) == ("internvl2_5", "dynamic_tiles", 256)


@pytest.mark.parametrize("size", ["1b", "38b", "78b"])
def test_both_generations_on_one_language_model_are_one_shape(size: str) -> None:
    older, newer = (dataclasses.replace(model_of(f"internvl{v}_{size}"), preset=None) for v in ("2_5", "3"))
    assert older == newer
