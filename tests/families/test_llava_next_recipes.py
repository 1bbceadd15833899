"""The shipped recipes of LLaVA-OneVision: the numbers of its authors' scripts, and a layout that holds them."""

from __future__ import annotations

import pytest

from megavlm.config.checks import check_recipe
from megavlm.config.load import load_recipe, shipped_recipes
from megavlm.data.media import plan_of
from megavlm.families.presets import expand_presets

# github.com/LLaVA-VL/LLaVA-NeXT, scripts/train/: file and commit in the recipes. Steps of 256 samples; what is before.
STAGES = {
    "llava_onevision_7b/single_image": (3_200_000 // 256, "/path/to/checkpoint"),
    "llava_onevision_7b/onevision": (1_600_000 // 256, "runs/llava_onevision_7b/single_image"),
}


def test_every_recipe_is_here() -> None:
    assert {name for name in shipped_recipes() if name.startswith("llava")} == set(STAGES)


@pytest.mark.parametrize("name", STAGES)
def test_numbers(name: str) -> None:
    recipe, (steps, before) = load_recipe(name, [], expand_presets), STAGES[name]
    check_recipe(recipe)
    optimizer, modules = recipe.optimizer, recipe.modules
    assert (recipe.model.preset, recipe.model.template) == (name.split("/")[0], "qwen2")
    assert not any(part.freeze for part in (modules.vision, modules.connector, modules.language))
    assert (optimizer.lr, optimizer.lr * modules.vision.lr_multiplier) == (1e-5, pytest.approx(2e-6))
    assert (optimizer.weight_decay, optimizer.schedule, optimizer.min_lr, optimizer.clip_grad) == (0, "cosine", 0, 1)
    assert (recipe.training.train_steps, optimizer.warmup_steps) == (steps, round(0.03 * steps))
    assert (recipe.training.global_batch_size, recipe.data.sequence_length) == (256, 32768)
    assert recipe.checkpoint.load == before and recipe.output_dir == f"runs/{name}"
    # The largest picture: the squashed one, and the limit of nine tiles' features, with newlines.
    assert plan_of(recipe.model).plan(2304, 2304).tokens == 729 + 81 * 82
