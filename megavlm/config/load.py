"""From a YAML file and ``key=value`` overrides to a checked :class:`Recipe`.

The values must have the type of their key: nothing is converted, except that a whole number may be written
as ``1e6``, and an integer given for a number. Every failure is a :class:`RecipeError` for the user.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megavlm.config import yaml12
from megavlm.config.architecture import BRANCHES
from megavlm.config.errors import RecipeError, UserError
from megavlm.config.fields import from_tree
from megavlm.config.keys import all_keys, find_key
from megavlm.config.saved import is_saved, with_defaults
from megavlm.config.schema import Recipe

__all__ = [
    "SHIPPED",
    "RecipeError",
    "load_recipe",
    "read_recipe",
    "recipe_of",
    "recipes_of_any_model",
    "shipped_recipes",
]

SHIPPED = Path(__file__).parent / "recipes"
"""Directory of the recipes that come with megavlm."""

_ANY = "any/"
_BEFORE_STAGES = {"codefuse_vl_14b": "codefuse_vl_14b/align", "qwen_vl_7b": "qwen_vl_7b/sft"}
"""Names of recipes before each system had one for every stage; what they started, they still start."""

Tree = dict[str, Any]


def shipped_recipes() -> list[str]:
    """Return the names of the recipes that come with megavlm, such as ``quickstart`` and ``qwen_vl_7b/sft``."""
    found = sorted(path.relative_to(SHIPPED).with_suffix("").as_posix() for path in SHIPPED.rglob("*.yaml"))
    return [name for name in found if not name.startswith(_ANY)]


def recipes_of_any_model() -> list[str]:
    """Return the names of those that say nothing of a model: it comes from ``checkpoint.load``."""
    return sorted(path.stem for path in (SHIPPED / _ANY).glob("*.yaml"))


def load_recipe(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    expand: Callable[[Tree], Tree] = lambda tree: tree,
    files: Sequence[str | Path] = (),
) -> Recipe:
    """Read a recipe, apply the overrides, fill in the presets and check the types.

    Args:
        recipe: Path of a YAML file, or the name of a shipped recipe.
        overrides: ``a.b.c=value`` each; the value is YAML, and a number in the key is a position in a list.
        expand: Fills in what presets give (``megavlm.families.presets.expand_presets``).
        files: YAML files whose keys replace those of the recipe, one after the other, before the overrides.

    Raises:
        RecipeError: a file, an override or a value is wrong.
    """
    tree = read_recipe(recipe)
    for file in files:
        if not Path(file).is_file():
            raise RecipeError(f"--overrides: no file {str(file)!r}; give the path of a YAML file")
        _merge(tree, _read(Path(file)))
    for override in overrides:
        _override(tree, override)
    return recipe_of(tree, expand)


def recipe_of(tree: Tree, expand: Callable[[Tree], Tree]) -> Recipe:
    """Return the recipe of a raw tree: the presets filled in, the types checked.

    Raises:
        RecipeError: a value is wrong.
    """
    try:
        expanded = expand(tree)
    except UserError as error:
        raise RecipeError(str(error)) from None
    try:
        return from_tree(Recipe, expanded)
    except ValidationError as error:
        raise RecipeError.of(_explain(error, expanded)) from None


def read_recipe(recipe: str | Path) -> Tree:
    """Return the raw tree of a YAML file or a shipped recipe, neither expanded nor checked.

    One that lies in a checkpoint gets the defaults of the model's keys that it is older than.

    Raises:
        RecipeError: there is no such recipe, or it is no YAML mapping.
    """
    path = _find(recipe)
    return with_defaults(_read(path)) if is_saved(path) else _read(path)


def _find(recipe: str | Path) -> Path:
    path = Path(recipe)
    if path.is_file():
        return path
    general = recipes_of_any_model()
    if str(recipe) in general:
        return SHIPPED / f"{_ANY}{recipe}.yaml"
    names, name = [*shipped_recipes(), *general], _BEFORE_STAGES.get(str(recipe), str(recipe))
    if name in names:
        return SHIPPED / f"{name}.yaml"
    if path.is_dir():
        raise RecipeError(f"{path}: is a directory; give a recipe's YAML file")
    hint = _did_you_mean(str(recipe), [*names, *_BEFORE_STAGES])
    if path.suffix in (".yaml", ".yml") or (len(path.parts) > 1 and not hint):
        raise RecipeError(f"{path}: no such file; give a recipe's YAML file, or one of {', '.join(names)}")
    raise RecipeError(f"{recipe}: no such recipe; {hint}give a YAML file, or one of {', '.join(names)}")


def _read(path: Path) -> Tree:
    try:
        tree = yaml12.parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: is not UTF-8 text; give a recipe's YAML file") from None
    except ValueError as error:
        raise RecipeError(f"{path}: not valid YAML, {error}; correct the file") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys such as 'model' and 'data', got {_show(tree)}")
    return tree


def _merge(tree: Tree, other: Tree) -> None:
    """Put the values of ``other`` into ``tree``, branch by branch, in place; a list replaces a list."""
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree[key] = value


def _override(tree: Tree, override: str) -> None:
    """Apply one ``a.b.c=value`` to ``tree``, in place."""
    key, equals, text = override.partition("=")
    key = key.strip()
    parts = key.split(".")
    if not equals:
        raise RecipeError(f"{override}: an override has the form key=value, such as optimizer.lr=1e-4; add '='")
    if not all(parts):
        raise RecipeError(f"{override}: {key!r} is not a dotted key; write it like optimizer.lr=1e-4")
    try:
        value = yaml12.parse(text)
    except ValueError as error:
        raise RecipeError(f"{key}: {text!r} is not valid YAML, {error}; quote the value") from None
    here: Any = tree
    for depth, part in enumerate(parts[:-1]):
        child = _get(here, part, key)
        if child is None:
            child = [] if parts[depth + 1].isdigit() else {}
        if not isinstance(child, dict | list):
            branch = ".".join(parts[: depth + 1])
            raise RecipeError(f"{key}: {branch} is a value, {_show(child)}, not a branch; set {branch} itself")
        _set(here, part, child)
        here = child
    _get(here, parts[-1], key)
    _set(here, parts[-1], value)


def _get(parent: Any, part: str, key: str) -> Any:
    """Return the child called ``part``, or None where there is none yet."""
    if isinstance(parent, dict):
        return parent.get(part)
    if not part.isdigit():
        raise RecipeError(f"{key}: {part!r} is not a position in a list; write a number from 0 to {len(parent)}")
    if int(part) > len(parent):
        raise RecipeError(f"{key}: the list has {len(parent)} entries; write a number from 0 to {len(parent)}")
    return parent[int(part)] if int(part) < len(parent) else None


def _set(parent: Any, part: str, value: Any) -> None:
    if isinstance(parent, dict):
        parent[part] = value
    elif int(part) == len(parent):
        parent.append(value)
    else:
        parent[int(part)] = value


def _explain(error: ValidationError, tree: Tree) -> list[str]:
    """Return a line for each thing that is wrong with ``tree``, unknown keys first: they often cause the others."""
    unknown: list[str] = []
    wrong: list[str] = []
    missing: list[tuple[str, str]] = []
    strays: set[str] = set()
    for item in error.errors(include_url=False):
        path, inside = _of_key([str(part) for part in item["loc"]])
        if inside:
            line = _wrong_value(path, "", _value_at(tree, path), _owner(path, tree))
            wrong += [line] if line not in wrong else []
        elif item["type"] == "unexpected_keyword_argument":
            strays.add(path.rpartition(".")[0])
            unknown.append(_unknown(path, tree))
        elif item["type"] == "too_short" and item["input"]:
            continue  # Its entries are wrong, and each has a line of its own.
        elif item["type"] == "missing":
            missing.append((path.rpartition(".")[0], path))
        else:
            wrong.append(_wrong_value(path, item["type"], item["input"], _owner(path, tree)))
    # A branch without a preset lacks nearly everything: the preset alone is worth a line.
    bare = {parent for parent, path in missing if path == f"{parent}.preset"}
    absent = [
        _missing_value(path, _owner(path, tree))
        for parent, path in missing
        if parent not in strays and (parent not in bare or path == f"{parent}.preset")
    ]
    return unknown + wrong + absent


def _of_key(parts: Sequence[str]) -> tuple[str, bool]:
    """Return the key that an error is about, and whether it is about a part of its value, such as one of a list."""
    for end in range(len(parts) - 1, 0, -1):
        key = find_key(".".join(parts[:end]))
        if key is not None:
            return (".".join(parts[:end]), True) if not key.branch else (".".join(parts), False)
    return ".".join(parts), False


def _value_at(tree: Any, path: str) -> Any:
    """Return what a recipe has under a dotted key."""
    for part in path.split("."):
        tree = tree[int(part)] if isinstance(tree, list) else tree[part]
    return tree


def _owner(path: str, tree: Tree) -> str | None:
    """Return the architecture whose key ``path`` is, or would be; None outside of the branches of ``model``."""
    parts = path.split(".")
    if len(parts) < 2 or parts[0] != "model" or parts[1] not in BRANCHES:
        return None
    model = tree.get("model")
    branch = model.get(parts[1]) if isinstance(model, dict) else None
    preset = branch.get("preset") if isinstance(branch, dict) else None
    if not isinstance(preset, str):
        return None
    architecture = BRANCHES[parts[1]].find(preset).architecture
    return None if architecture is None else architecture.name


def _unknown(path: str, tree: Tree) -> str:
    owner, other = _owner(path, tree), find_key(path)
    if owner is not None and other is not None:  # of another architecture
        preset = tree["model"][path.split(".")[1]]["preset"]
        return f"{path}: belongs to the {' and the '.join(other.owners)}, not to {preset!r}; set it to null"
    return f"{path}: unknown key; {_suggest(path, owner) or 'remove it, or correct its name'}"


def _wrong_value(path: str, rule: str, value: Any, owner: str | None) -> str:
    key = find_key(path, owner)
    if rule == "too_short":
        return f"{path}: the list must have at least one entry; add one"
    if key is not None and key.branch and key.type == "list":
        return f"{path}: expected a list, got {_show(value)}; write its entries with '-' or in brackets"
    if key is None or key.branch:
        return f"{path}: expected keys under it, got {_show(value)}; give the keys, or leave the branch out"
    hint = ""
    if key.type.startswith("text"):
        hint = "quote it, or write '' for empty"
    elif "|" in key.type and isinstance(value, str):
        choices = key.type.removesuffix(" or null").split(" | ")
        hint = _did_you_mean(value, choices).strip()
    return f"{path}: expected {key.type}, got {_show(value)}; {hint or 'change the value'}"


def _missing_value(path: str, owner: str | None) -> str:
    key = find_key(path, owner)
    branch = path.rpartition(".")[0]
    meaning = f" ({key.meaning.rstrip('.')})" if key else ""
    preset = (
        f", or name a preset in {branch}.preset" if branch.startswith("model.") and not path.endswith(".preset") else ""
    )
    return f"{path}: missing{meaning}; set it{preset}"


def _suggest(path: str, owner: str | None) -> str:
    """Return 'did you mean ...?' with the nearest key beside ``path``, or one of that name elsewhere.

    Of the keys of ``model``'s branches, those of the architecture ``owner`` alone are suggested beside it.
    """
    parent, _, name = path.rpartition(".")
    generic = ".".join("<i>" if part.isdigit() else part for part in path.split(".")).rpartition(".")[0]
    paths = list(
        dict.fromkeys(
            key.path
            for key in all_keys()
            if owner is None or not key.owners or owner in key.owners or key.path.rpartition(".")[0] != generic
        )
    )
    siblings = {leaf for whole in paths for above, _, leaf in [whole.rpartition(".")] if above == generic}
    # A key of exactly that name elsewhere is more likely than one that looks a little like it.
    elsewhere_too = any(whole.rpartition(".")[2] == name for whole in paths)
    near = difflib.get_close_matches(name, siblings, n=1, cutoff=0.8 if elsewhere_too else 0.6)
    if near:
        return f"did you mean {parent + '.' if parent else ''}{near[0]}?"
    elsewhere = [whole for whole in paths if whole.rpartition(".")[2] == name]
    if not elsewhere:
        leaves = {whole.rpartition(".")[2] for whole in paths}
        close = difflib.get_close_matches(name, leaves, n=1, cutoff=0.8)
        elsewhere = [whole for whole in paths if close and whole.rpartition(".")[2] == close[0]]
    return f"did you mean {' or '.join(elsewhere[:3])}?" if elsewhere else ""


def _did_you_mean(given: str, choices: Sequence[str]) -> str:
    near = difflib.get_close_matches(given, choices, n=1)
    return f"did you mean {near[0]}? " if near else ""


def _show(value: Any) -> str:
    """Return ``value`` as a recipe would show it, shortened, on one line."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
