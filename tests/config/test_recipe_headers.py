"""What the headers of shipped recipes tell to type: it is there, and makes what the recipe starts from."""

from __future__ import annotations

import re
from functools import cache

import pytest

from megavlm.config.fields import from_tree, meaning_of
from megavlm.config.help import to_tree
from megavlm.config.load import SHIPPED, load_recipe, shipped_recipes
from megavlm.config.schema import ModelConfig, Recipe
from megavlm.families.presets import expand_presets


@cache
def said(name: str) -> str:
    """Return a header as one line, commands whole."""
    lines = (SHIPPED / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    return " ".join(line.lstrip("# ").removesuffix("\\") for line in lines if line.startswith("#"))


def found(pattern: str) -> list[str]:
    """Return the recipes whose header has it."""
    return [name for name in shipped_recipes() if re.search(pattern, said(name))]


def loaded(name: str, *keys: str) -> Recipe:
    return load_recipe(name, list(keys), expand_presets)


@pytest.mark.parametrize("name", found(r"torchrun .*megavlm train "))
def test_the_launch_line(name: str) -> None:
    """It names the recipe, keys that there are, and a stage before it whose weights fit."""
    for own, words in re.findall(r"megavlm train (\S+)((?:\s+[a-z][\w.]*=\S+)*)", said(name)):
        assert own == name
        recipe = loaded(name, *words.split())
        before = str(recipe.checkpoint.load).removeprefix("runs/")
        if before not in shipped_recipes():
            continue
        earlier = loaded(before)
        assert str(earlier.output_dir) == recipe.checkpoint.load
        for branch in ("vision", "connector", "language"):
            one, two = getattr(earlier.model, branch), getattr(recipe.model, branch)
            fixed = [key for key in type(two).__pydantic_fields__ if meaning_of(two, key).fixed]
            assert {key: getattr(one, key, None) for key in fixed} == {key: getattr(two, key) for key in fixed}


@pytest.mark.parametrize("name", found(r"megavlm convert hf-to-megatron[^:]* --vision "))
def test_what_parts_are_put_together_to(name: str) -> None:
    """The fresh connector is the recipe's; no conversion gives a tower that sees pictures at several sizes."""
    model = loaded(name).model
    assert getattr(model.vision, "s2_scales", None) is None
    (command,) = re.findall(r"megavlm convert hf-to-megatron((?:\s+-\S+(?:\s+[^-\s]\S*)?)+)", said(name))
    words = dict(re.findall(r"--([a-z-]+)[=\s]+(\S+)", command))
    assert {"language", "vision", "out"} <= words.keys()
    if "recipe" in words:
        assert words["recipe"] == name and "connector-preset" not in words
    if "connector" in words or "connector-preset" not in words:
        return
    parts = {**to_tree(loaded(name))["model"], "connector": {"preset": words["connector-preset"]}}
    parts.pop("preset", None)  # that of the whole model has a connector of its own
    fresh = from_tree(ModelConfig, expand_presets({"model": parts})["model"]).connector
    fixed = [key for key in type(fresh).__pydantic_fields__ if key != "preset" and meaning_of(fresh, key).fixed]
    assert {key: getattr(fresh, key) for key in fixed} == {key: getattr(model.connector, key) for key in fixed}
