"""The recipe that a converted checkpoint is trained by, ready but for the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from megavlm.config.checks import check_recipe
from megavlm.config.errors import RecipeError, UserError
from megavlm.config.fields import from_tree
from megavlm.config.help import to_tree, to_yaml
from megavlm.config.schema import ModelConfig, Recipe
from megavlm.data.media import plan_of

Tree = dict[str, Any]

_TEXT_TOKENS = 256
_DEFAULTS: Tree = {
    "data": {"train": [{"path": "/path/to/data"}]},
    "optimizer": {"lr": 1e-5, "warmup_steps": 100, "weight_decay": 0.05, "clip_grad": 1.0},
    "training": {"train_steps": 5000, "global_batch_size": 128},
    "checkpoint": {"save_interval": 500},
}


def converted_recipe(model: ModelConfig, out: Path, base: Tree | None, dtype: torch.dtype, where: str) -> str:
    """Return a recipe, as YAML, that trains ``model`` from the checkpoint ``out``.

    Args:
        model: the converted model.
        out: where the checkpoint will lie.
        base: raw recipe whose other branches are taken; None for modest defaults.
        dtype: of the weights; fp32 weights are trained in fp32.
        where: the sources, for messages.

    Raises:
        UserError: the parts do not make one model, or ``base`` is no recipe.
    """
    tree: Tree = {**(base or _DEFAULTS)}
    whole = to_tree(model)
    tree["model"] = whole
    if base is None:
        tree["output_dir"] = str(Path("runs") / out.name)
        length = max(2048, _longest_image(model, where) + _TEXT_TOKENS)
        tree["data"] = {
            **tree["data"],
            "sequence_length": min(length, max(model.language.max_position_embeddings, length)),
        }
        tree["training"] = {**tree["training"], "precision": "fp32" if dtype is torch.float32 else "bf16"}
    tree["checkpoint"] = {**tree.get("checkpoint", {}), "load": str(out.absolute())}
    try:
        recipe = from_tree(Recipe, tree)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"--recipe: {'.'.join(map(str, first['loc']))}: {first['msg']}; correct the recipe") from None
    try:
        check_recipe(recipe)
    except RecipeError as error:
        raise UserError(f"{where}: do not make one model, or do not suit the recipe:\n{error}") from None
    return to_yaml(recipe)


def _longest_image(model: ModelConfig, where: str) -> int:
    """Return the tokens of a large photograph.

    Raises:
        UserError: the image plan does not suit the model.
    """
    try:
        return plan_of(model).plan(1600, 1200).tokens
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
