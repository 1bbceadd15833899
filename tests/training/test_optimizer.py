"""Learning rates, weight decay, schedules and clipping, seen in what a step does to the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import pack, recipe, sample
from tiny import IMAGE_TOKEN
from torch import Tensor

from megavlm.checkpoint.distributed import load
from megavlm.checkpoint.saver import Saver, State
from megavlm.config.load import load_recipe
from megavlm.config.schema import ModuleTraining, ParallelConfig, Recipe
from megavlm.data.device_batch import Batch
from megavlm.families.presets import expand_presets
from megavlm.parallel.state import process_groups
from megavlm.training.build import TrainingModel, build_training
from megavlm.training.optimizer import (
    _factors,
    _overrides,
    learning_rate_factor,
    learning_rates,
    recipe_settings_kept,
)
from megavlm.training.step import StepResult, train_step

IMAGES = pack([sample(0, 23), sample(1, 17, 1), sample(2, 30, 3)])
TEXT = pack([sample(3, 20), sample(4, 31)])
LR = 1e-3
LAYERS = 2  # of the tower of tests.samples


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    with process_groups(ParallelConfig(), seed=1):
        yield


def tiny(optimizer: dict[str, Any] | None = None, **branches: Any) -> Recipe:
    """Return a recipe of a constant learning rate without decay, clipping or epsilon, changed as given."""
    plain = {"lr": LR, "schedule": "constant", "weight_decay": 0.0, "clip_grad": 0.0, "adam_eps": 1e-15}
    return recipe(optimizer={**plain, **(optimizer or {})}, **branches)


def step_once(made: Recipe, batch: Batch) -> tuple[TrainingModel, StepResult, dict[str, tuple[Tensor, Tensor]]]:
    """Take one step; return each parameter before and after."""
    torch.manual_seed(0)
    training = build_training(made, IMAGE_TOKEN)
    (module,) = training.modules
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    training.scheduler.step(1)
    result = train_step(training.chunks, training.optimizer, [batch], num_sources=1)
    after = {name: p.detach().clone() for name, p in module.named_parameters()}
    return training, result, {name: (before[name], after[name]) for name in before}


def beit(name: str, decay: float) -> float:
    """BEiT's rule by its own words (``get_num_layer_for_vit``): ids 0 below the blocks, i + 1 for block i.

    BEiT counts one more layer, the head, above the last block; here the top layer has the full rate.
    """
    layer_id = int(name.split("layers.")[1].split(".")[0]) + 1 if "layers." in name else 0
    return decay ** (LAYERS - layer_id)


MODULES = {
    "vision": {"lr_multiplier": 0.5, "layer_decay": 0.6},
    "connector": {"lr_multiplier": 3.0},
    "language": {},
}


@pytest.mark.parametrize("distributed", [True, False])
def test_each_module_and_layer_moves_at_its_own_rate(distributed: bool) -> None:
    """AdamW's first step moves every weight with a gradient by exactly the learning rate."""
    made = tiny(modules=MODULES, parallel={"use_distributed_optimizer": distributed})
    _, _, weights = step_once(made, IMAGES)
    seen = set()
    for name, (before, after) in weights.items():
        factor = {"vision": 0.5 * beit(name, 0.6), "connector": 3.0, "language": 1.0}[name.split(".")[0]]
        moved = float((after - before).abs().max())
        if name == "connector.pos_embed":
            assert moved == 0.0
            continue
        assert moved == pytest.approx(LR * factor, rel=2e-3), name
        seen.add(factor)
    assert seen == {1.0, 3.0, 0.5, 0.5 * 0.6, 0.5 * 0.6**2}


@pytest.mark.parametrize("distributed", [True, False])
def test_weight_decay_spares_biases_and_norms_and_follows_the_rate(distributed: bool) -> None:
    """A micro-batch without images gives tower and connector zero gradients: decay alone acts on them."""
    made = tiny({"weight_decay": 40.0}, modules=MODULES, parallel={"use_distributed_optimizer": distributed})
    _, _, weights = step_once(made, TEXT)
    decayed = set()
    for name, (before, after) in weights.items():
        if name.startswith("language.") or name == "connector.pos_embed":
            continue
        factor = 3.0 if name.startswith("connector.") else 0.5 * beit(name, 0.6)
        if "bias" in name or "norm" in name or "ln_" in name:
            assert torch.equal(before, after), name
        else:
            decayed.add(name)
            torch.testing.assert_close(after, before * (1 - LR * factor * 40.0), rtol=1e-5, atol=1e-7)
    assert {"vision.conv1.weight", "vision.positional_embedding", "connector.query"} < decayed
    assert "vision.transformer.layers.1.mlp.linear_fc2.weight" in decayed


def test_frozen_modules_have_no_place_in_the_optimizer() -> None:
    made = tiny({"weight_decay": 0.1}, modules={"language": {"freeze": True}, "vision": {"freeze": True}},
                parallel={"use_distributed_optimizer": False})  # fmt: skip
    training = build_training(made, IMAGE_TOKEN)
    (module,) = training.modules
    held = {id(p) for group in training.optimizer.param_groups for p in group["params"]}
    names = {name for name, p in module.named_parameters() if id(p) in held}
    assert names == {name for name, _ in module.named_parameters() if name.startswith("connector.")} - {
        "connector.pos_embed"
    }
    assert set(learning_rates(made, training.optimizer)) == {"connector"}


def test_factors_of_names() -> None:
    module = ModuleTraining(lr_multiplier=2.0, layer_decay=0.5)
    assert learning_rate_factor("transformer.layers.47.mlp.linear_fc1.weight", module, 48) == 2.0
    assert learning_rate_factor("transformer.layers.45.mlp.linear_fc1.weight", module, 48) == 0.5
    for name in ("conv1.weight", "positional_embedding", "ln_pre.bias"):
        assert learning_rate_factor(name, module, 48) == 2.0 * 0.5**48
    assert learning_rate_factor("ln_post.weight", module, 48) == 2.0
    assert learning_rate_factor("layers.0.weight", ModuleTraining(), 2) == 1.0


def test_each_of_two_towers_has_its_own_layers_and_rate() -> None:
    """SAM-B has 12 layers and the SigLIP beside it 24; the second learns at a tenth."""
    words = ["model.vision.high_lr_multiplier=0.1", "modules.vision.layer_decay=0.5", "modules.vision.lr_multiplier=2"]
    recipe = load_recipe("deepseek_vl_7b/sft", words, expand_presets)
    low, high = _factors(recipe, "vision")
    layer = "transformer.layers.23.mlp.linear_fc1.weight"
    assert (low.of(f"low.{layer}"), high.of(f"low.{layer}")) == (2.0, None)
    assert low.of("low.conv1.weight") == 2.0 * 0.5**24
    for name, depth in (("layers.11.mlp.linear_fc1.weight", 0), ("layers.9.norm", 2), ("conv1.weight", 12)):
        assert high.of(f"high.{name}") == 0.2 * 0.5**depth
    for name in ("neck.conv1.weight", "second_scale", "halve2.weight"):
        assert high.of(f"high.{name}") == 0.2
    every = low.all | high.all
    assert 2.0 * 0.5**24 in every and 0.2 * 0.5**12 in every and len(_overrides(recipe)) == 1 + len(every - {1.0})
    assert [one.of("layers.0.weight") for one in _factors(recipe, "connector")] == [1.0]


STEPS, WARMUP, WSD, MIN = 20, 4, 6, 2e-4


def cosine(fraction: float) -> float:
    """Half a cosine wave from LR to MIN."""
    return MIN + (LR - MIN) * 0.5 * (1 + math.cos(math.pi * fraction))


SHAPES: dict[str, Callable[[int], float]] = {
    "cosine": lambda n: cosine((n - WARMUP) / (STEPS - WARMUP)),
    "constant": lambda n: LR,
    "WSD": lambda n: LR if n <= STEPS - WSD else cosine((n - (STEPS - WSD)) / WSD),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_schedules_step_by_step(shape: str) -> None:
    settings = {"schedule": shape, "warmup_steps": WARMUP, "min_lr": MIN}
    if shape == "WSD":
        settings["wsd_decay_steps"] = WSD
    made = tiny(settings, training={"train_steps": STEPS}, modules=MODULES)
    training = build_training(made, IMAGE_TOKEN)
    for n in range(1, STEPS + 1):
        training.scheduler.step(1)
        expected = LR * n / WARMUP if n <= WARMUP else SHAPES[shape](n)
        rates = learning_rates(made, training.optimizer)
        assert rates == pytest.approx(
            {"vision": 0.5 * expected, "connector": 3.0 * expected, "language": expected}, rel=1e-9
        ), n
        groups = training.optimizer.param_groups
        assert {round(g["lr"] / expected, 6) for g in groups} == {1.0, 3.0, 0.5, 0.3, 0.18}
    if shape != "constant":
        assert rates["language"] == pytest.approx(MIN)


def applied_norm(training: TrainingModel, beta1: float) -> float:
    """Return the norm of the gradient that the first step was taken with, from AdamW's first moments."""
    squares = 0.0
    for one in getattr(training.optimizer, "chained_optimizers", [training.optimizer]):
        for state in one.optimizer.state.values():
            squares += float(state["exp_avg"].double().div(1 - beta1).square().sum())
    return math.sqrt(squares)


@pytest.mark.parametrize("distributed", [True, False])
def test_gradients_are_clipped_to_the_global_norm(distributed: bool) -> None:
    def norms(clip: float) -> tuple[float, float]:
        made = tiny({"clip_grad": clip}, parallel={"use_distributed_optimizer": distributed})
        training, result, _ = step_once(made, IMAGES)
        assert result.grad_norm is not None
        return result.grad_norm, applied_norm(training, made.optimizer.adam_beta1)

    whole, applied = norms(0.0)
    assert applied == pytest.approx(whole, rel=1e-4)
    assert whole > 0.5
    reported, applied = norms(0.25 * whole)
    assert reported == pytest.approx(whole, rel=1e-5), "the norm before clipping is reported"
    assert applied == pytest.approx(0.25 * whole, rel=1e-4)
    assert norms(4 * whole)[1] == pytest.approx(whole, rel=1e-4)


def test_the_recipes_settings_survive_a_checkpoints_state() -> None:
    training = build_training(tiny(modules=MODULES), IMAGE_TOKEN)
    groups = training.optimizer.param_groups
    before = [(g["max_lr"], g["min_lr"], g["wd_mult"], g["betas"]) for g in groups]
    with recipe_settings_kept(training.optimizer):
        for group in groups:
            group.update(max_lr=9.0, min_lr=9.0, wd_mult=9.0, betas=(0.1, 0.1), step=5)
    assert [(g["max_lr"], g["min_lr"], g["wd_mult"], g["betas"]) for g in training.optimizer.param_groups] == before
    assert all(g["step"] == 5 for g in training.optimizer.param_groups)


@pytest.mark.parametrize("distributed", [True, False])
def test_a_run_goes_on_with_changed_rates(distributed: bool, tmp_path: Path) -> None:
    """Megatron-Core 0.19 would not find the saved groups: it knows them by their rates too."""
    branches: dict[str, Any] = {"modules": MODULES, "parallel": {"use_distributed_optimizer": distributed}}
    training, _, _ = step_once(tiny(**branches), IMAGES)
    with training.settled():
        state = State(training.modules, training.optimizer, training.scheduler, run={"step": 1})
        saved = Saver(tmp_path, keep=1).save(state)
    assert saved is not None
    changed = tiny({"lr": 3 * LR, "min_lr": LR, "weight_decay": 0.2, "adam_beta1": 0.8}, **branches)
    other = build_training(changed, IMAGE_TOKEN)
    wanted = [{key: group[key] for key in ("max_lr", "min_lr", "betas")} for group in other.optimizer.param_groups]
    with recipe_settings_kept(other.optimizer):
        load(saved, modules=other.modules, optimizer=other.optimizer, scheduler=other.scheduler)
    groups = other.optimizer.param_groups
    assert [{key: group[key] for key in ("max_lr", "min_lr", "betas")} for group in groups] == wanted
    assert all(int(group["step"]) == 1 for group in groups if group["params"])
    assert all(torch.equal(a, b) for a, b in zip(moments(training), moments(other), strict=True))


def moments(training: TrainingModel) -> list[Tensor]:
    """Return the first moments of all parameters."""
    found = []
    for optimizer in getattr(training.optimizer, "chained_optimizers", [training.optimizer]):
        found += [state["exp_avg"] for state in optimizer.optimizer.state.values()]
    assert any(bool(one.any()) for one in found)
    return found
