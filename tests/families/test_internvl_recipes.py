"""The shipped recipes of InternVL: the numbers of its authors' scripts, and a layout that holds them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from megavlm.config.checks import check_recipe
from megavlm.config.load import load_recipe, shipped_recipes
from megavlm.config.schema import Recipe
from megavlm.data.media import plan_of
from megavlm.families.presets import expand_presets

ALL = ("vision", "connector", "language")


@dataclasses.dataclass
class Stage:
    """What a script says: github.com/OpenGVLab/InternVL, internvl_chat/shell/, files and commits in the recipes."""

    trains: tuple[str, ...]
    lr: float
    decay: float
    steps: int
    warmup: int
    batch: int = 512
    after: str | None = None


STAGES = {
    "internvl2_5_1b/stage1": Stage(("connector",), 2e-4, 0.01, 100_000, 100),
    "internvl2_5_1b/stage2": Stage(ALL, 4e-5, 0.01, 22_000, 660, after="internvl2_5_1b/stage1"),
    "internvl2_5_4b/stage1": Stage(("connector",), 2e-4, 0.01, 100_000, 100),
    "internvl2_5_4b/stage2": Stage(ALL, 4e-5, 0.01, 11_000, 330, after="internvl2_5_4b/stage1"),
    "internvl2_5_38b/stage1": Stage(("connector",), 2e-4, 0.05, 100_000, 100),
    "internvl2_5_38b/stage2": Stage(ALL, 2e-5, 0.05, 5500, 165, after="internvl2_5_38b/stage1"),
    "internvl2_5_78b/stage1": Stage(("connector",), 2e-4, 0.05, 100_000, 100),
    "internvl2_5_78b/stage2": Stage(ALL, 2e-5, 0.05, 5500, 165, after="internvl2_5_78b/stage1"),
    "internvl3_8b/sft": Stage(("connector", "language"), 2e-5, 0.05, 1000, 30, batch=128),
}


def load(name: str) -> Recipe:
    return load_recipe(name, [], expand_presets)


def test_every_recipe_is_here() -> None:
    assert {name for name in shipped_recipes() if name.startswith("internvl")} == set(STAGES)


@pytest.mark.parametrize("name", STAGES)
def test_numbers(name: str) -> None:
    recipe, stage = load(name), STAGES[name]
    check_recipe(recipe)
    optimizer, training = recipe.optimizer, recipe.training
    assert recipe.model.preset == name.split("/")[0]
    assert tuple(part for part in ALL if not getattr(recipe.modules, part).freeze) == stage.trains
    assert (optimizer.lr, optimizer.min_lr, optimizer.schedule) == (stage.lr, 0, "cosine")
    assert (optimizer.weight_decay, optimizer.warmup_steps, training.train_steps) == (
        stage.decay, stage.warmup, stage.steps
    )  # fmt: skip
    assert (optimizer.adam_beta1, optimizer.adam_beta2, optimizer.adam_eps, optimizer.clip_grad) == (
        0.9,
        0.999,
        1e-8,
        1,
    )
    assert (training.global_batch_size, recipe.data.sequence_length, training.precision) == (stage.batch, 16384, "bf16")
    assert recipe.output_dir == f"runs/{name}"
    assert recipe.checkpoint.load == (f"runs/{stage.after}" if stage.after else "/path/to/checkpoint")
    plan: Any = plan_of(recipe.model)
    assert (plan.side, plan.tokens_per_view) == (448, 256)
    assert plan.plan(1600, 1200).tokens == 13 * 256  # 4 x 3 tiles and a thumbnail
