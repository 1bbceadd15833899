"""Presets of LLaVA-1.6 and LLaVA-OneVision have the published sizes, and are what Transformers builds of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_internvl_sizes import count, model_of
from transformers import (
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PretrainedConfig,
    PreTrainedModel,
)

from megavlm.architectures.context import BuildContext
from megavlm.checkpoint.hf.shapes import alone
from megavlm.config.schema import ParallelConfig
from megavlm.data.media import plan_of
from megavlm.families.known import FAMILIES
from megavlm.models.vlm import VisionLanguageModel

# As the hub rounds them: llava-hf/llava-v1.6-{vicuna-7b,vicuna-13b,mistral-7b,34b}-hf,
# llava-hf/llama3-llava-next-8b-hf, llava-hf/llava-onevision-qwen2-{0.5b,7b,72b}-ov-hf.
PUBLISHED = {
    "llava_1_6_vicuna_7b": "7.06B", "llava_1_6_vicuna_13b": "13.4B", "llava_1_6_mistral_7b": "7.57B",
    "llava_1_6_34b": "34.8B", "llava_next_llama3_8b": "8.36B", "llava_onevision_0_5b": "894M",
    "llava_onevision_7b": "8.03B", "llava_onevision_72b": "73.2B",
}  # fmt: skip
SHORT = ("llava_1_6_mistral_7b", "llava_onevision_0_5b")
KINDS: dict[str, tuple[type[PretrainedConfig], type[PreTrainedModel], int, int]] = {
    # Layers of the published tower; tokens of 640 x 480, as Transformers' processors count them.
    "llava_next": (LlavaNextConfig, LlavaNextForConditionalGeneration, 24, 2340),
    "llava_onevision": (LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, 26, 2929),
}


def rounded(number: int, like: str) -> str:
    scale, digits = {"M": 1e6, "B": 1e9}[like[-1]], len(like[:-1].partition(".")[2])
    return f"{number / scale:.{digits}f}{like[-1]}"


def case(preset: str) -> Any:
    family = "llava_onevision" if "onevision" in preset else "llava_next"
    marks = [pytest.mark.family(family), *([] if preset in SHORT else [pytest.mark.long])]
    return pytest.param(preset, family, marks=marks)


@pytest.mark.parametrize(("preset", "family"), [case(name) for name in PUBLISHED])
def test_a_preset_has_the_published_size(preset: str, family: str) -> None:
    model = model_of(preset)
    config_class, model_class, layers, tokens = KINDS[family]
    tree = FAMILIES[family].config(model, {})
    tree["vision_config"]["num_hidden_layers"] = layers
    with alone(), torch.device("meta"):
        ours = VisionLanguageModel(model, BuildContext(ParallelConfig(), initialize=False), 0)
        theirs = model_class(config_class(**tree))
    tower = theirs.model.vision_tower
    # What lies behind the layer whose features are taken is carried by the converters, and not built.
    behind = [tower.post_layernorm, *tower.encoder.layers[model.vision.num_layers :]]
    assert len(behind) == (2 if family == "llava_next" else 1)
    assert count(ours) == count(theirs) - sum(count(module) for module in behind)
    assert rounded(count(theirs), PUBLISHED[preset]) == PUBLISHED[preset]
    assert FAMILIES[family].refusal(model) is None
    assert plan_of(model).plan(640, 480).tokens == tokens
    defaults = config_class()
    assert tree["image_grid_pinpoints"] == defaults.image_grid_pinpoints
