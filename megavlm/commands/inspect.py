"""``megavlm inspect``: prepared data sets, shown as the model will see them, on one page of HTML.

(``megavlm convert inspect`` is another thing: it lists the tensors of a checkpoint.)
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from megavlm.config.errors import MissingFileError, UserError
from megavlm.config.load import load_recipe, shipped_recipes
from megavlm.config.schema import DataConfig, DataSource, Recipe
from megavlm.data.box_space import BoxSpace
from megavlm.data.media import ImagePlan, plan_of
from megavlm.data.plans_single import SquashPlan
from megavlm.data.publish import write_whole

logger = logging.getLogger(__name__)

_DEFAULT_LENGTH = 2048
_DEFAULT_IMAGE_TOKENS = 256
_DEFAULT_IMAGE_SIZE = 448
_DEFAULT_SEED = 1234


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = (
        "Write a page that shows samples and packs of prepared data sets as they will be trained: pictures with boxes, "
        "supervised and masked tokens, segment borders, histograms. (Checkpoints: megavlm convert inspect.)"
    )
    parser.add_argument(
        "shards",
        nargs="*",
        metavar="SHARDS",
        help="directories that megavlm prepare wrote, or what it reads, as in a recipe (default: its data.train)",
    )
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="FILE", help="page to write (.html)")
    parser.add_argument(
        "--recipe", metavar="RECIPE", help="recipe that says how the data is trained; or a run's directory"
    )
    parser.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="tokenizer file (default: the recipe's, or that of the checkpoint that it loads)",
    )
    parser.add_argument(
        "--sequence-length",
        type=int,
        metavar="N",
        help=f"tokens of a pack (default: the recipe's, or {_DEFAULT_LENGTH})",
    )
    parser.add_argument(
        "--tokens-per-image",
        type=int,
        metavar="N",
        help=f"positions of a picture, without <img> and </img> (default: the recipe's, or {_DEFAULT_IMAGE_TOKENS})",
    )
    parser.add_argument(
        "--template", metavar="NAME", help="chat template (docs/templates.md; default: the recipe's, or qwen_vl)"
    )
    parser.add_argument("--samples", type=int, default=12, metavar="N", help="samples to show (default 12)")
    parser.add_argument("--packs", type=int, default=3, metavar="N", help="packs to show (default 3)")
    parser.add_argument(
        "--data-parallel",
        type=int,
        default=1,
        metavar="N",
        help="data-parallel size of the run; the packs are those of its first rank (default 1)",
    )
    parser.add_argument(
        "--scan", type=int, default=2000, metavar="N", help="samples to count, spread over each data set (default 2000)"
    )
    parser.add_argument(
        "--max-mb", type=float, default=16.0, metavar="MB", help="largest page, in 10^6 bytes (default 16)"
    )


def run(args: argparse.Namespace) -> int:
    """Write the page.

    Returns:
        0.

    Raises:
        MissingFileError: A data set, its shards or the tokenizer is missing.
        UserError: An argument is wrong, or no sample is usable.
    """
    _check_arguments(args)
    recipe = None if args.recipe is None else _load_recipe(args.recipe)
    if recipe is not None and args.tokenizer is None:
        recipe = _with_tokenizer(recipe, args.recipe)
    if recipe is not None and recipe.loss.image_tokens:
        raise UserError(
            "loss.image_tokens: the page shows pictures, not their tokens, and so not which of these are trained on;"
            " show the data with a recipe where it is 0"
        )
    data, plan, seed = _settings(args, recipe)
    from megavlm.data.inspect.collect import collect  # noqa: PLC0415 - loads torch
    from megavlm.data.inspect.page import write_page  # noqa: PLC0415
    from megavlm.data.templates import template_of  # noqa: PLC0415
    from megavlm.data.tokenizer import load_tokenizer  # noqa: PLC0415
    from megavlm.planning.weighing import weigher_of  # noqa: PLC0415

    assert data.tokenizer is not None
    path = Path(data.tokenizer)
    tokenizer = load_tokenizer(
        path, template_of(args.template or (recipe.model.template if recipe else "qwen_vl"), path)
    )
    found = collect(
        data,
        tokenizer,
        plan,
        seed,
        replicas=args.data_parallel,
        samples=args.samples,
        packs=args.packs,
        scan=args.scan,
        weigh=None if recipe is None else weigher_of(recipe),
    )
    found.space = None if recipe is None else _space(recipe, Path(args.recipe))
    html = write_page(found, tokenizer, limit=int(args.max_mb * 1e6))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(args.out, html)
    logger.info("%s: %d samples, %d packs, %.1f MB", args.out, len(found.samples), len(found.packs), len(html) / 1e6)
    return 0


def _check_arguments(args: argparse.Namespace) -> None:
    least_of = {"samples": 0, "packs": 0, "scan": 1, "data_parallel": 1, "sequence_length": 1, "tokens_per_image": 1}
    for name, least in least_of.items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
    if not args.max_mb >= 0.1:
        raise UserError(f"--max-mb must be at least 0.1, not {args.max_mb:g}")
    if args.out.is_dir():
        raise UserError(f"--out {args.out} is a directory; name a file")
    if not args.shards and args.recipe is None:
        raise UserError("name the data sets to show, or a recipe with --recipe")
    if args.recipe is None and args.tokenizer is None:
        raise UserError("--tokenizer is missing; give a tokenizer file, or a recipe that names one with --recipe")


def _load_recipe(name: str) -> Recipe:
    from megavlm.checkpoint.hf.directory import expand_recipe  # noqa: PLC0415

    path = Path(name)
    if path.is_dir() and name not in shipped_recipes():
        path = _resolve(path) / "recipe.yaml"
    return load_recipe(path if path.is_file() else name, [], expand_recipe)


def _resolve(path: Path) -> Path:
    """The checkpoint that a run's directory means."""
    # An entry point may ask rooms above its own; nothing else of data/ does.
    from megavlm.checkpoint.paths import resolve  # noqa: PLC0415

    return resolve(path)


def _with_tokenizer(recipe: Recipe, name: str) -> Recipe:
    """The recipe with the tokenizer file that it trains with."""
    from megavlm.checkpoint.paths import with_tokenizer_of_load  # noqa: PLC0415

    missing = f"--tokenizer is missing: data.tokenizer of {name} is null, and its checkpoint.load"
    if recipe.data.tokenizer is None and recipe.checkpoint.load is None:
        raise UserError(f"{missing} as well; give a tokenizer file")
    try:
        return with_tokenizer_of_load(recipe)
    except FileNotFoundError:
        raise UserError(f"{missing}, {recipe.checkpoint.load}, has no checkpoint; give a tokenizer file") from None


def _space(recipe: Recipe, name: Path) -> BoxSpace:
    """Return what boxes count in the family that the recipe's checkpoint is of, as far as one is there."""
    from megavlm.checkpoint.hf.given import open_directory  # noqa: PLC0415
    from megavlm.families.registry import FAMILIES  # noqa: PLC0415
    from megavlm.inference.boxes import box_space, family_of  # noqa: PLC0415 - imports PIL
    from megavlm.weights.kinds import holds_model  # noqa: PLC0415

    # Data can be shown before there is a checkpoint; a recipe may be that of one.
    named = name.is_dir() and str(name) not in shipped_recipes()
    if not named and recipe.checkpoint.load is None:
        return box_space(None, recipe.model)
    load = name if named else Path(str(recipe.checkpoint.load))
    if holds_model(load):
        given, home = open_directory(load)
        return box_space(FAMILIES.get(home or given[0].family.name), recipe.model)
    try:
        return box_space(family_of(_resolve(load)), recipe.model)
    except FileNotFoundError:
        return box_space(None, recipe.model)


def _settings(args: argparse.Namespace, recipe: Recipe | None) -> tuple[DataConfig, ImagePlan, int]:
    """The data branch that is shown, what becomes of pictures, and the seed of the order.

    Raises:
        MissingFileError: a data set or the tokenizer is not there.
        UserError: a number of tokens is given for a plan that has its own for each picture.
    """
    from megavlm.data.tokenizer import find_tokenizer  # noqa: PLC0415

    tokenizer = args.tokenizer or (recipe.data.tokenizer if recipe else None)
    assert tokenizer is not None
    if Path(tokenizer).is_dir():
        inside = find_tokenizer(Path(tokenizer))
        if inside is None:
            raise UserError(f"--tokenizer {tokenizer} holds no tokenizer (*.tiktoken, tokenizer.json or *.model)")
        tokenizer = str(inside)
    sources = tuple(DataSource(path=path) for path in args.shards) or (recipe.data.train if recipe else ())
    for source in sources:
        if "://" not in source.path and not Path(source.path).exists():
            raise MissingFileError(f"data set {source.path} does not exist")
    if recipe is not None:
        known = {source.path: source for source in recipe.data.train}
        sources = tuple(known.get(source.path, source) for source in sources)
    changes: dict[str, Any] = {"train": sources, "validation": (), "tokenizer": tokenizer}
    if recipe is None:
        changes["num_workers"] = 0
    if args.sequence_length is not None or recipe is None:
        changes["sequence_length"] = args.sequence_length or _DEFAULT_LENGTH
    if recipe is None:
        tokens = args.tokens_per_image or _DEFAULT_IMAGE_TOKENS
        return TypeAdapter(DataConfig).validate_python(changes), SquashPlan(_DEFAULT_IMAGE_SIZE, tokens), _DEFAULT_SEED
    plan = plan_of(recipe.model)
    if args.tokens_per_image is not None:
        if not plan.fixed:
            raise UserError(
                f"--tokens-per-image: the recipe's model.image.kind is {recipe.model.image.kind}, whose pictures have "
                "each their own number; leave it out"
            )
        plan = dataclasses.replace(plan, tokens_per_view=args.tokens_per_image)
    return dataclasses.replace(recipe.data, **changes), plan, recipe.training.seed
