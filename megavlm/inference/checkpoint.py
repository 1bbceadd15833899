"""Which recipe answers: the one that made the checkpoint, with the user's overrides, at this job's layout."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megavlm.checkpoint.base import base_for
from megavlm.checkpoint.manifest import check_for_answers
from megavlm.checkpoint.paths import resolve
from megavlm.config.checks import check_recipe
from megavlm.config.context import CP
from megavlm.config.encoder import check_answers
from megavlm.config.engine import for_inference
from megavlm.config.errors import UserError
from megavlm.config.load import load_recipe
from megavlm.config.lora import check_quantiser
from megavlm.config.schema import Recipe
from megavlm.data.tokenizer import Tokenizer, tokenizer_of, with_tokenizer
from megavlm.families.presets import expand_presets
from megavlm.inference.sampling import Sampling
from megavlm.planning.layout import with_parallel, with_placement

_ALONE: dict[str, Any] = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "num_layers_in_first_pipeline_stage": None,
    "sequence_parallel": False,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": None,
}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what says which model answers, and at which layout."""
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="a step-... directory, or a run's output_dir"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="keys of the checkpoint's recipe, such as parallel.*"
    )
    parser.add_argument("--context", type=int, help="longest prompt with its answer, in tokens (default: the model's)")


def add_sampling_arguments(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """Add how answers are made."""
    own = parser.add_argument_group("answers")
    own.add_argument("--max-new-tokens", type=int, default=max_new_tokens, help=f"default {max_new_tokens}")
    own.add_argument("--temperature", type=float, default=0.0, help="0 takes the best token (default)")
    own.add_argument("--top-k", type=int, default=0, help="choose among the best k; 0 for all (default)")
    own.add_argument("--top-p", type=float, default=1.0, help="choose among the best with this sum of probability")
    own.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1 makes repetition rarer")
    own.add_argument("--seed", type=int, default=0, help="of the draws")


def sampling_of(args: argparse.Namespace) -> Sampling:
    """Return what :func:`add_sampling_arguments` asked for.

    Raises:
        UserError: a value is out of its range.
    """
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens must be at least 1, not {args.max_new_tokens}")
    return Sampling(args.temperature, args.top_k, args.top_p, args.repetition_penalty, args.seed)


def model_of(args: argparse.Namespace) -> tuple[Recipe, Path, Tokenizer]:
    """Return recipe, checkpoint and tokenizer that :func:`add_model_arguments` asked for.

    Raises:
        MissingFileError: there is no such checkpoint.
        UserError: the recipe does not fit this job.
    """
    if args.context is not None and args.context < 1:
        raise UserError(f"--context must be at least 1, not {args.context}")
    return load_for_inference(args.checkpoint, args.overrides)


def load_for_inference(checkpoint: Path, overrides: Sequence[str]) -> tuple[Recipe, Path, Tokenizer]:
    """Return the recipe that made a checkpoint, with overrides, the checkpoint's directory and its tokenizer.

    Args:
        checkpoint: a checkpoint, or a run's directory.
        overrides: ``key=value``, mostly the layout of this job.

    Raises:
        MissingFileError: there is no such checkpoint.
        UserError: the recipe does not fit this job.
    """
    recipe, path = recipe_of(checkpoint, overrides)
    return recipe, path, tokenizer_of(recipe)


def recipe_of(checkpoint: Path, overrides: Sequence[str]) -> tuple[Recipe, Path]:
    """Return the recipe that made a checkpoint, at this job's layout, and the checkpoint's directory.

    The recipe's tokenizer may have moved since, or be null: then it is the one that lies in the checkpoint.

    Raises:
        MissingFileError: there is no such checkpoint.
        UserError: the checkpoint is damaged, the recipe does not fit this job, the base of adapters is gone, or there
            is no tokenizer.
    """
    path = resolve(checkpoint)
    check_for_answers(path)
    return with_tokenizer(recipe_at_layout(path, overrides), path), path


def recipe_at_layout(path: Path, overrides: Sequence[str]) -> Recipe:
    """Return the recipe of a checkpoint's directory as a job without training runs it.

    One process has no use for the layout that the model was trained with, which is then left out unless ``overrides``
    names one.

    Raises:
        UserError: the recipe does not fit this job, or the base of adapters is gone.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    recipe = for_inference(load_recipe(path / "recipe.yaml", overrides, expand_presets))
    check_answers(recipe.model)
    given = {override.partition("=")[0] for override in overrides}
    if world_size == 1 and given.isdisjoint(f"parallel.{name}" for name in _ALONE):
        recipe = dataclasses.replace(recipe, parallel=dataclasses.replace(recipe.parallel, **_ALONE))
    # Who encodes a training step's pictures says nothing of answers: the first stage's ranks share theirs. Nor does who
    # has which part of a pack.
    recipe = with_placement(recipe, "first_stage")
    if recipe.parallel.context_parallel_size > 1 and CP in given:
        raise UserError(f"{CP}: answers are not cut over ranks; leave it out")
    recipe = with_parallel(recipe, context_parallel_size=1, cp_comm_type="p2p")
    # There is no training batch here, no profile and no panel: none may rule out a layout.
    recipe = dataclasses.replace(
        recipe,
        training=dataclasses.replace(recipe.training, global_batch_size=world_size),
        logging=dataclasses.replace(recipe.logging, profile_ranks=(0,), panel_interval=None),
    )
    check_recipe(recipe, world_size)
    check_quantiser(recipe.lora.quantize)
    base_for(path, recipe.checkpoint.load)
    return recipe
