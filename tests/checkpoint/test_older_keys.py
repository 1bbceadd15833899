"""A checkpoint that is older than a key had that key's default: not a preset's value, nor what a later run wants."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from ranks import megavlm
from run_data import RunData
from tiny import tiny_recipe

from megavlm.checkpoint.hf.given import make_model
from megavlm.checkpoint.hf.outgoing import model_branches
from megavlm.checkpoint.manifest import write_manifest
from megavlm.checkpoint.merged import recipe_branches
from megavlm.checkpoint.paths import read_tree
from megavlm.config import yaml12
from megavlm.config.architecture import MODELS
from megavlm.config.errors import RecipeError
from megavlm.config.help import to_tree
from megavlm.config.load import load_recipe
from megavlm.config.schema import Recipe
from megavlm.families.presets import expand_presets, load_presets
from megavlm.inference.checkpoint import recipe_at_layout
from megavlm.training.loop import _check_same_model

load_presets()
# The presets of these parts give other values than the keys' defaults.
PRESETS: dict[str, Any] = {
    "vision": {"preset": "siglip_vit", "patch_size": 8, "image_size": 32, "hidden_size": 48, "num_layers": 2}
    | {"ffn_hidden_size": 96, "num_attention_heads": 4, "positional_grid": 4},
    "connector": {"preset": "resampler", "num_queries": 4, "head_dim": 16},
    "language": {"preset": "qwen3", "hidden_size": 64, "ffn_hidden_size": 96, "num_layers": 4, "kv_channels": 16}
    | {"num_attention_heads": 4, "num_query_groups": 4, "vocab_size": 512, "max_position_embeddings": 512},
}
# Key, its default, and another value that weights would mean something else by.
KEYS = {
    "vision.pre_layernorm": (True, False),
    "vision.activation": ("gelu", "gelu_tanh"),
    "connector.head_dim": (None, 16),
    "language.qk_layernorm": (False, True),
    "language.rotary_base": (10000, 1000000),
}
FREE = ("vision.gradient_checkpointing", "language.vocab_divisor", "language.use_logn_attn")


def recipe(key: str | None = None, value: Any = None) -> Recipe:
    """Return a recipe, with a key of the model set."""
    model = copy.deepcopy(PRESETS)
    if key is not None:
        branch, name = key.split(".")
        model[branch][name] = value
    return tiny_recipe(model=model)


def older(directory: Path, *keys: str, tree: dict[str, Any] | None = None) -> Path:
    """Write what a checkpoint that is older than ``keys`` says of its model."""
    tree = to_tree(recipe()) if tree is None else tree
    for key in keys:
        branch, _, name = f"model.{key}".rpartition(".")
        here = tree
        for part in branch.split("."):
            here = here[part]
        del here[name]
    directory.mkdir(exist_ok=True)
    (directory / "recipe.yaml").write_text(yaml12.dump(tree))
    (directory / "run.json").write_text('{"step": 1}')
    return directory


def value_of(model: Any, key: str) -> Any:
    branch, name = key.split(".")
    return getattr(getattr(model, branch), name)


@pytest.mark.parametrize("key", KEYS)
def test_another_value_is_refused(key: str, tmp_path: Path) -> None:
    default, other = KEYS[key]
    path = older(tmp_path / "m", key)
    with pytest.raises(RecipeError, match=f"^model.{key}: {other!r}, but .* was saved with {default!r}; set it"):
        _check_same_model(path, recipe(key, other))
    _check_same_model(path, recipe(key, default))


def test_what_means_nothing_may_differ(tmp_path: Path) -> None:
    tree = to_tree(recipe())
    del tree["optimizer"]["schedule"]
    path = older(tmp_path / "m", *FREE, tree=tree)
    for key, value in zip(FREE, (True, 64, True), strict=True):
        _check_same_model(path, recipe(key, value))
    _check_same_model(path, tiny_recipe(model=PRESETS, optimizer={"schedule": "constant"}))


@pytest.mark.parametrize("key", [key for key in KEYS if not key.startswith("connector")])
def test_answers_export_and_recipes_take_the_default(key: str, tmp_path: Path) -> None:
    """One entry for generate, chat, serve, eval and verify; one for export, one for merging; and its own file."""
    default, other = KEYS[key]
    path = older(tmp_path / "m", key)
    assert value_of(recipe_at_layout(path, []).model, key) == default
    assert value_of(recipe_at_layout(path, [f"model.{key}={json.dumps(other)}"]).model, key) == other
    assert value_of(make_model(model_branches(path, {}), "m"), key) == default
    assert value_of(recipe_branches(path)[0], key) == default
    assert value_of(load_recipe(path / "recipe.yaml", [], expand_presets).model, key) == default
    # Parts alone have no recipe but the record of their conversion.
    record = {
        "model": {
            key.partition(".")[0]: yaml12.parse((path / "recipe.yaml").read_text())["model"][key.partition(".")[0]]
        }
    }
    (path / "recipe.yaml").unlink()
    branch, name = key.split(".")
    assert model_branches(path, record)[branch][name] == default


def older_than_plans(preset: str) -> bool:
    """Whether a checkpoint may be from before image plans: no tower was for pictures of any size, a pair, or codes."""
    model = tiny_recipe(model={"preset": preset, "vision": {}, "connector": {}, "language": {}}).model
    one = not model.vision.packed and len(model.vision.towers) == 1 and model.vision.codes is None
    return one and not model.language.encodes


@pytest.mark.parametrize(
    "preset",
    [
        name
        for name in sorted(MODELS.names())
        if {"image", "template"} & {*MODELS.find(name).values} and older_than_plans(name)
    ],
)
def test_before_templates_and_image_plans_all_were_as_qwen_vl(preset: str, tmp_path: Path) -> None:
    """A preset of a whole model that names others today does not change what a checkpoint was trained with."""
    today = tiny_recipe(model={"preset": preset, "vision": {}, "connector": {}, "language": {}})
    assert (today.model.template, today.model.image.kind) != ("qwen_vl", "squash")
    tree = to_tree(today)
    tree["data"]["sequence_length"] = 8192
    del tree["model"]["template"], tree["model"]["image"], tree["model"]["video"]
    path = older(tmp_path / "m", tree=tree)
    for model in (
        load_recipe(path / "recipe.yaml", [], expand_presets).model,
        recipe_at_layout(path, []).model,
        make_model(model_branches(path, {}), "m"),
    ):
        assert (model.template, model.image.kind) == ("qwen_vl", "squash")


def test_a_default_that_fits_no_model_is_said(tmp_path: Path) -> None:
    """A resampler without the width of its heads: the preset's 128 would cut the same weights in other heads."""
    path = older(tmp_path / "m", "connector.head_dim")
    with pytest.raises(RecipeError, match=r"model\.connector\.head_dim"):
        recipe_at_layout(path, [])
    assert recipe_at_layout(path, ["model.connector.head_dim=16"]).model.connector.head_dim == 16


def test_names_of_layers_are_the_preset_s(tmp_path: Path) -> None:
    """Qwen v1's, in a checkpoint that is older than LoRA."""
    path = older(tmp_path / "m", "language.layer_names", tree=to_tree(tiny_recipe()))
    assert recipe_at_layout(path, []).model.language.layer_names == "qwen"


def test_adapters(tmp_path: Path) -> None:
    """Of lora's keys the same holds."""
    tree = to_tree(recipe()) | {"lora": {"rank": 4, "targets": ["q_proj"]}}
    assert read_tree(older(tmp_path / "m", tree=tree))["lora"] == {
        "rank": 4, "alpha": 16.0, "dropout": 0.0, "targets": ["q_proj"], "train_embeddings": False,
        "train_head": False, "train_norms": False, "quantize": None,
    }  # fmt: skip


def test_a_recipe_by_hand_is_what_its_presets_say(tmp_path: Path) -> None:
    """It lacks keys that every save has written."""
    path = older(tmp_path / "m", tree={"model": {"preset": "tiny", "vision": {"preset": "siglip_vit"}}})
    assert read_tree(path)["model"] == {"preset": "tiny", "vision": {"preset": "siglip_vit"}}
    _check_same_model(older(tmp_path / "m", tree={**to_tree(recipe()), "model": PRESETS}), recipe())


def test_resuming_and_loading_are_refused(run_data: RunData, tmp_path: Path) -> None:
    """The commands: a run whose checkpoint is older than the base of rotary positions."""
    run, few = tmp_path / "run", ("data.validation=[]", "optimizer.warmup_steps=0", "training.train_steps=1")
    megavlm(run_data.words(run, *few), world=1)
    saved = run / "checkpoints" / "step-00000001"
    older(saved, "language.rotary_base", tree=yaml12.parse((saved / "recipe.yaml").read_text()))
    write_manifest(saved, {})
    for output, more in ((run, "training.train_steps=2"), (tmp_path / "new", f"checkpoint.load={run}")):
        words = run_data.words(output, *few, more, "model.language.rotary_base=1000000")
        done = megavlm(words, world=1, check=False)
        assert done.code == 2 and "model.language.rotary_base: 1000000, but" in done.output, done.output
        assert "was saved with 10000" in done.output
    done = megavlm(run_data.words(run, *few, "training.train_steps=2"), world=1)
    assert "resumed from" in done.output
