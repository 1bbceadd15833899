"""``checkpoint.load`` names a Hugging Face directory: the model of a recipe is what the directory says.

Configuration, tokenizer and headers of the weights are read, by every rank for itself, before process groups start.
The weights themselves come from a conversion that is kept (:mod:`megavlm.checkpoint.hf.converted`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megavlm.checkpoint.paths import resolve
from megavlm.config.architecture import BRANCHES, architecture_named
from megavlm.config.errors import RecipeError, UserError
from megavlm.config.fields import meaning_of
from megavlm.config.help import to_tree
from megavlm.config.load import load_recipe
from megavlm.families.presets import expand_presets
from megavlm.weights.kinds import holds_checkpoint, holds_model

logger = logging.getLogger(__name__)

Tree = dict[str, Any]

_SAID: set[str] = set()
_PLANS = ("image", "video")
"""Branches of ``model`` that say what becomes of pictures and films."""
_REMEDY = "leave it out of the recipe, which takes the directory's then, or load another directory"


def expand_recipe(tree: Tree) -> Tree:
    """Return the raw recipe ``tree`` with presets filled in, and with the model that ``checkpoint.load`` has.

    Of a Hugging Face directory the model's branches, template and image plan are taken; what the recipe itself says
    must agree where weights depend on it, and wins where they do not. A recipe without a ``model`` takes that of a
    checkpoint likewise.

    Raises:
        UserError: a preset is unknown; the directory is damaged or half downloaded.
        RecipeError: keys contradict the directory.
    """
    path = _loaded(tree)
    if path is None:
        _check_absent(tree)
        return expand_presets(tree)
    if holds_model(path):
        found = model_of(path)
    elif not _names_parts(tree.get("model", {})) and holds_checkpoint(path):
        # With what keys were to checkpoints that are older than they.
        found = to_tree(load_recipe(resolve(path) / "recipe.yaml", [], expand_presets).model)
    else:
        return expand_presets(tree)
    own = tree.get("model", {})
    if not isinstance(own, Mapping):
        return tree
    return {**tree, "model": _with_own(found, own, path)}


def _names_parts(model: Any) -> bool:
    """Whether a recipe says what its model is made of, and does not only change some keys of one that is loaded."""
    return not isinstance(model, Mapping) or any(
        isinstance(one, Mapping) and "preset" in one for one in (model, *(model.get(name) for name in BRANCHES))
    )


def _loaded(tree: Tree) -> Path | None:
    branch = tree.get("checkpoint")
    load = branch.get("load") if isinstance(branch, Mapping) else None
    return Path(load) if isinstance(load, str) and Path(load).is_dir() else None


def _check_absent(tree: Tree) -> None:
    """Say what a recipe without a model lacks, whose ``checkpoint.load`` is no directory.

    Raises:
        UserError: it has no model and names one that is not there.
    """
    branch = tree.get("checkpoint")
    load = branch.get("load") if isinstance(branch, Mapping) else None
    if load is not None and "model" not in tree:
        raise UserError(
            f"checkpoint.load: no directory {load!r}, and the recipe has no model of its own; name a Hugging Face "
            "directory or a checkpoint"
        )


def model_of(directory: Path) -> Tree:
    """Return the ``model`` branch of a whole model in a Hugging Face directory.

    Raises:
        UserError: it is damaged, of no known family, or a part of a model only.
    """
    # These import torch, which a recipe without a directory does not need.
    from megavlm.checkpoint.hf.given import open_directory, understand  # noqa: PLC0415
    from megavlm.config.help import to_tree  # noqa: PLC0415

    try:
        given, home = open_directory(directory)
        found = understand(given, {}, home)
    except UserError as error:
        raise UserError(f"checkpoint.load: {error}") from None
    missing = [part for part in BRANCHES if part not in found.parts]
    if missing:
        raise UserError(
            f"checkpoint.load: {directory} is a {given[0].family.title}; it has no {' and no '.join(missing)}: compose "
            "a whole model with megavlm convert hf-to-megatron --language DIR --vision DIR, and name that"
        )
    for note in found.notes:
        if note not in _SAID:  # a command may ask several times
            logger.info("note: %s", note)
            _SAID.add(note)
    tree: Tree = to_tree(found.model)
    return tree


def _with_own(found: Tree, own: Mapping[str, Any], path: Path) -> Tree:
    """Return the model of ``path`` with what a recipe says itself and may say.

    Raises:
        RecipeError: a line for each key that contradicts.
    """
    full = expand_presets({"model": dict(own)})["model"]
    model: Tree = {**found, **{key: value for key, value in own.items() if key not in (*BRANCHES, "preset", *_PLANS)}}
    lines: list[str] = []
    for branch in BRANCHES:
        mine, said = full.get(branch, {}), own.get(branch, {})
        if not isinstance(mine, Mapping) or not isinstance(said, Mapping):
            model[branch] = said
            continue
        lines += _contradictions(branch, found[branch], mine, said, path)
        model[branch] = {**found[branch], **{key: value for key, value in said.items() if key != "preset"}}
    if lines:
        raise RecipeError.of(lines)
    for key in _PLANS:
        plan = own.get(key, {})
        if isinstance(plan, Mapping):
            same = plan.get("kind", found[key]["kind"]) == found[key]["kind"]
            model[key] = {**found[key], **plan} if same else dict(plan)
        else:
            model[key] = plan
    for key in ("template", *_PLANS):
        if model[key] != found[key]:
            logger.info("model.%s: the recipe's own, %s; %s says %s", key, model[key], path, found[key])
    return model


def _contradictions(
    branch: str, theirs: Tree, mine: Mapping[str, Any], said: Mapping[str, Any], path: Path
) -> Iterator[str]:
    """Yield a line for each key of a branch that weights depend on and that is another in the directory."""
    preset = mine.get("preset")
    kind = architecture_named(branch, theirs["preset"])
    if isinstance(preset, str) and preset != theirs["preset"]:
        one, other = BRANCHES[branch].find(preset), BRANCHES[branch].find(theirs["preset"])
        if one.architecture is not other.architecture or one.pattern or other.pattern:
            yield f"model.{branch}.preset: {preset!r}, but {path} has {theirs['preset']!r}; {_REMEDY}"
            return
    for key, value in mine.items():
        if key not in theirs or key == "preset" or not meaning_of(kind.config, key).fixed:
            continue
        if _plain(value) != _plain(theirs[key]):
            by = "" if key in said else f" (of the preset {preset!r})"
            yield f"model.{branch}.{key}: {value!r}{by}, but {path} has {theirs[key]!r}; {_REMEDY}"


def _plain(value: Any) -> Any:
    """Return a value as YAML gives it, so that lists and tuples, whole and other numbers are the same."""
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return value
