"""Where checkpoints lie: what can be asked without loading one."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megavlm.config.errors import MissingFileError, UserError
from megavlm.config.json_object import read_json
from megavlm.weights.kinds import holds_model, what_is

if TYPE_CHECKING:
    from megavlm.config.schema import Recipe


DEFAULT_REMEDY = "give a step-... directory, or a run's output_dir"


def step_directory(root: Path, step: int) -> Path:
    """Return where the checkpoint of ``step`` lies in ``root``."""
    return root / f"step-{step:08d}"


def latest(root: Path) -> Path | None:
    """Return the checkpoint that ``latest`` names, or else the newest in ``root``, or None."""
    pointer = root / "latest"
    if pointer.is_file():
        path = root / pointer.read_text(encoding="utf-8").strip()
        if path.is_dir():
            return path
    return next(iter(newest_first(root)), None)


def newest_first(root: Path) -> list[Path]:
    """Return the published checkpoints in ``root``, newest first."""
    return sorted((p for p in root.glob("step-*") if re.fullmatch(r"step-\d{8,}", p.name) and p.is_dir()), reverse=True)


def resolve(path: Path) -> Path:
    """Return the checkpoint that ``path`` means: itself, or the newest one of a run's directory.

    Raises:
        MissingFileError: there is none; the message says what is there instead, and what to do.
    """
    if (path / "run.json").is_file():
        return path
    for root in (path, path / "checkpoints"):
        newest = latest(root)
        if newest is not None:
            return newest
    there = what_is(path)
    raise MissingFileError(f"{path}: no checkpoint; {f'it is {there}' if there else DEFAULT_REMEDY}")


def with_tokenizer_of_load(recipe: Recipe) -> Recipe:
    """Return ``recipe`` with the tokenizer file that it trains with: its own, or that of ``checkpoint.load``.

    Raises:
        MissingFileError: ``checkpoint.load`` has no checkpoint.
        RecipeError: There is no such file.
    """
    from megavlm.data.tokenizer import with_tokenizer  # noqa: PLC0415 - this module is asked before much is loaded

    load = recipe.checkpoint.load
    if not load or recipe.data.tokenizer is not None:
        return with_tokenizer(recipe, None)
    if not holds_model(Path(load)):
        return with_tokenizer(recipe, resolve(Path(load)))
    data = dataclasses.replace(recipe.data, tokenizer=load)
    return with_tokenizer(dataclasses.replace(recipe, data=data), None)


def check_load(recipe: Recipe) -> None:
    """Check that ``checkpoint.load`` is a checkpoint, before any process group starts.

    Raises:
        RecipeError: it is not; the line says what it is.
    """
    from megavlm.config.errors import RecipeError  # noqa: PLC0415 - as above

    if recipe.checkpoint.load is not None and not holds_model(Path(recipe.checkpoint.load)):
        try:
            resolve(Path(recipe.checkpoint.load))
        except FileNotFoundError as error:
            raise RecipeError(f"checkpoint.load: {error}") from None


def read_run(path: Path) -> dict[str, Any]:
    """Return ``run.json`` of the checkpoint at ``path``.

    Raises:
        UserError: it is damaged.
    """
    return read_json(path / "run.json")


def read_tree(checkpoint: Path) -> dict[str, Any]:
    """Return the recipe of a checkpoint, unchecked, with the defaults of the model's keys that it is older than.

    Raises:
        MissingFileError: it has none.
        UserError: it is damaged, or asks for more than a recipe holds.
    """
    # This module is asked before much is loaded.
    from megavlm.config import yaml12  # noqa: PLC0415
    from megavlm.config.saved import with_defaults  # noqa: PLC0415

    path = checkpoint / "recipe.yaml"
    try:
        tree = yaml12.parse(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: is damaged: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: is damaged: it holds no keys")
    return with_defaults(tree)
