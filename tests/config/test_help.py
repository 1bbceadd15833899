"""Help for every key, the printed recipe, and the list of keys, which changes only on purpose."""

from __future__ import annotations

from pathlib import Path

import pytest

from megavlm.config import yaml12
from megavlm.config.help import keys_help, to_tree, to_yaml
from megavlm.config.keys import all_keys, find_key, leaf_keys
from megavlm.config.load import load_recipe

FROZEN = Path(__file__).with_name("keys.txt")


def test_public_keys_are_those_of_the_list():
    """A key that goes or changes its name breaks people's recipes: edit keys.txt only if that is meant."""
    assert [key.path for key in leaf_keys()] == FROZEN.read_text(encoding="utf-8").split()


@pytest.mark.parametrize("width", [60, 80, 110])
def test_help_names_every_key_with_type_default_and_meaning(width):
    text = keys_help(width)
    assert max(map(len, text.splitlines())) <= max(width, 100)
    flat = " ".join(text.split())
    for key in leaf_keys():
        assert f" {key.path} {key.type}; " in flat, key.path
        assert " ".join(key.meaning.split()) in flat


def test_every_key_has_a_meaning():
    for key in all_keys():
        assert key.meaning.endswith("."), key.path


def test_help_of_single_keys():
    flat = " ".join(keys_help(110).split())
    assert "optimizer.schedule cosine | constant | WSD; default cosine" in flat
    assert "parallel.recompute_granularity full | selective or null; default null" in flat
    assert "optimizer.lr number > 0; required" in flat
    assert "modules.vision.layer_decay number > 0 <= 1; default 1" in flat
    assert "model.vision.patch_size integer > 0 <= 10000; default from the preset" in flat
    assert "logging.profile_ranks list of integers; default [0]" in flat
    assert "logging.profile_steps list of 2 or null; default null" in flat
    assert find_key("data.train.3.weight").type == "number > 0"
    assert find_key("data.nothing") is None


def test_printed_recipe_loads_to_an_equal_one(load, tmp_path):
    recipe = load(
        "optimizer.lr=1e-5",
        "data.train.0.name='1e-4'",
        "data.system_message='no: \"quotes\"\\nlines'",
        "data.validation.0={path: /v, name: 'null'}",
        "output_dir='2024-01-01'",
    )
    path = tmp_path / "printed.yaml"
    path.write_text(to_yaml(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe  # without presets: every value is in the file
    printed = yaml12.parse(path.read_text(encoding="utf-8"))
    assert printed == to_tree(recipe)
