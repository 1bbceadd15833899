"""Presets of Qwen2-VL and Qwen2.5-VL have the published sizes, and are what Transformers builds of them."""

from __future__ import annotations

import pytest
import torch
from pydantic import TypeAdapter
from transformers import AutoConfig, AutoModelForImageTextToText

from megavlm.architectures.context import BuildContext
from megavlm.checkpoint.hf.shapes import alone
from megavlm.config.checks import check_recipe
from megavlm.config.load import load_recipe
from megavlm.config.schema import ModelConfig, ParallelConfig
from megavlm.data.media import plan_of
from megavlm.data.plans_native import NativePlan
from megavlm.families.known import FAMILIES
from megavlm.families.presets import expand_presets
from megavlm.models.vlm import VisionLanguageModel

# As the hub counts the parameters of Qwen/Qwen2-VL-*-Instruct and Qwen/Qwen2.5-VL-*-Instruct.
PUBLISHED = {
    "qwen2_vl_2b": 2_208_985_600,
    "qwen2_vl_7b": 8_291_375_616,
    "qwen2_vl_72b": 73_405_560_320,
    "qwen2_5_vl_3b": 3_754_622_976,
    "qwen2_5_vl_7b": 8_292_166_656,
    "qwen2_5_vl_32b": 33_452_718_336,
    "qwen2_5_vl_72b": 73_410_777_344,
}


def model_of(preset: str) -> ModelConfig:
    tree = {"model": {"preset": preset, "language": {"vocab_divisor": 2}}}  # no rows that pad the vocabulary
    model: ModelConfig = TypeAdapter(ModelConfig).validate_python(expand_presets(tree)["model"])
    return model


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.family("qwen2_vl", "qwen2_5_vl")
@pytest.mark.parametrize(
    "preset",
    [
        name if name in ("qwen2_vl_2b", "qwen2_5_vl_7b") else pytest.param(name, marks=pytest.mark.long)
        for name in PUBLISHED
    ],
)
def test_a_preset_has_the_published_size(preset: str) -> None:
    model = model_of(preset)
    family = FAMILIES[preset.rpartition("_")[0]]
    assert family.refusal(model) is None
    tree = family.config(model, {})
    config = AutoConfig.for_model(**tree)
    with alone(), torch.device("meta"):
        ours = VisionLanguageModel(model, BuildContext(ParallelConfig(), initialize=False), 0)
        theirs = AutoModelForImageTextToText.from_config(config)
    assert count(ours) == PUBLISHED[preset]
    assert count(theirs) == count(ours)
    assert count(theirs.model.visual) == count(ours.vision) + count(ours.connector)


@pytest.mark.family("qwen2_5_vl")
def test_the_recipe_has_the_published_numbers() -> None:
    """qwen-vl-finetune/scripts/sft_7b.sh of QwenLM/Qwen2.5-VL, on 8 GPUs: 4 samples each, 4 times a step."""
    recipe = load_recipe("qwen2_5_vl_7b/sft", [], expand_presets)
    check_recipe(recipe, 8)
    optimizer, plan = recipe.optimizer, plan_of(recipe.model)
    assert (optimizer.lr, optimizer.min_lr, optimizer.schedule, optimizer.weight_decay) == (2e-7, 0, "cosine", 0)
    assert (optimizer.clip_grad, recipe.training.global_batch_size, recipe.data.sequence_length) == (1, 4 * 4 * 8, 8192)
    assert optimizer.warmup_steps == 0.03 * recipe.training.train_steps
    frozen = {part: getattr(recipe.modules, part).freeze for part in ("vision", "connector", "language")}
    assert frozen == {"vision": True, "connector": False, "language": False}
    assert isinstance(plan, NativePlan) and (plan.min_pixels, plan.max_pixels) == (784, 50176)
    assert (plan.plan(28, 28).tokens, plan.plan(4000, 4000).tokens) == (1, 64)
