"""``megavlm train``: the entry point of a run, on one process or under torchrun.

Wrong input is refused, and help printed, before torch is loaded.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from megavlm.checkpoint.hf.directory import expand_recipe
from megavlm.checkpoint.paths import check_load, newest_first, with_tokenizer_of_load
from megavlm.config.checks import check_paths, check_recipe
from megavlm.config.errors import MachineError, OtherRankError, RecipeError, UsageError, disk_problem
from megavlm.config.help import keys_help, to_yaml
from megavlm.config.load import load_recipe, recipes_of_any_model, shipped_recipes
from megavlm.config.schema import Recipe
from megavlm.data.tokenizer import tokenizer_of
from megavlm.parallel.lock import LockView, LostError
from megavlm.parallel.output import holding, try_writing
from megavlm.planning.layout import with_parallel, with_placement
from megavlm.planning.placement import AUTO, FIRST, check_fits, record, settled
from megavlm.training.loggers.known import check_loggers

INTERMIXED = True
"""Overrides may stand between the options."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.usage = "megavlm train RECIPE [key=value ...] [--overrides FILE] [--print-config]"
    parser.description = "Train a model by a recipe. Start it under torchrun for more than one process."
    parser.epilog = keys_help()
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    names, general = ", ".join(shipped_recipes()), " or ".join(recipes_of_any_model())
    parser.add_argument(
        "recipe",
        metavar="RECIPE",
        help=f"YAML file, or a shipped recipe: {general} for any model that checkpoint.load names, or {names}",
    )
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="a key of the recipe to set, see below"
    )
    parser.add_argument(
        "--overrides",
        dest="files",
        action="append",
        default=[],
        metavar="FILE",
        help="YAML file with keys to set, as megavlm plan --write makes one; key=value wins over it",
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved recipe as YAML and stop")


def run(args: argparse.Namespace) -> int:
    """Check the recipe, then train, or print it.

    Returns:
        The exit code: 0, or 75 for a run that a signal stopped and that can go on.

    Raises:
        RecipeError: the recipe is wrong; tokenizer, data or checkpoint do not fit it.
        RuntimeError: training went wrong (a loss that is not finite, a reader that failed).
    """
    recipe = load_recipe(args.recipe, args.overrides, expand_recipe, args.files)
    if args.print_config:
        # Often asked on another machine than the one that trains: the number of processes may be unknown.
        check_recipe(recipe, _world_size(None))
        sys.stdout.write(to_yaml(recipe))
        return 0
    check_recipe(recipe, _world_size(1))
    check_paths(recipe)
    check_load(recipe)
    # Settled here for all that follows, and for the recipe that checkpoints carry.
    return train(with_tokenizer_of_load(recipe))


def train(recipe: Recipe) -> int:
    """Train by a checked recipe.

    Returns, Raises: as :func:`run`.
    """
    check_loggers(recipe.logging)
    given, recipe = recipe, settled(recipe, _world_size(1) or 1)
    tokenizer = tokenizer_of(recipe)
    try_writing(recipe.output_dir)
    check_output(recipe)
    from megavlm.data.cache import located  # noqa: PLC0415 - imports numpy

    for source in (*recipe.data.train, *recipe.data.validation):
        located(source, recipe.data)  # before the ranks meet: one prepares it, and the others may have to wait for long
    from megavlm.parallel.device import own_memory, prepare_device  # noqa: PLC0415 - imports torch

    prepare_device()
    # Megatron-Core may be imported from here on.
    from megavlm.config.lora import check_quantiser  # noqa: PLC0415
    from megavlm.layers.specs import use_transformer_engine  # noqa: PLC0415
    from megavlm.parallel.engine import check_machine, this_machine, user_buffers  # noqa: PLC0415
    from megavlm.parallel.state import any_rank, process_groups  # noqa: PLC0415
    from megavlm.training.epochs import with_steps  # noqa: PLC0415
    from megavlm.training.loop import Trainer  # noqa: PLC0415
    from megavlm.training.recorder import check_recorder  # noqa: PLC0415
    from megavlm.training.stopping import StopRequest  # noqa: PLC0415

    check_recorder(recipe.logging)
    use_transformer_engine(recipe.parallel.transformer_impl, recipe.training.precision)
    check_machine(recipe, this_machine())
    if given.parallel.vision_placement != AUTO:
        check_fits(recipe, _world_size(1) or 1, *own_memory())
    check_quantiser(recipe.lora.quantize)
    stop = StopRequest()
    with (
        # From here on, as much may come before the first step: a conversion, the counting of epochs. And until all is
        # left: a second signal must not kill a rank that is on its way out with 75, and ends the wait for exports.
        stop.listening(),
        contextlib.ExitStack() as leaving,
        process_groups(recipe.parallel, recipe.training.seed),
        user_buffers(recipe),
        holding(recipe.output_dir, "train", "output_dir", recipe.checkpoint.lock_timeout_seconds, leaving) as lock,
        _causes_told(recipe.output_dir, lock),
    ):
        if given.parallel.vision_placement == AUTO:
            # A rank to which the run's record looked otherwise must not go its own way.
            if any_rank(recipe.parallel.vision_placement == FIRST):
                recipe = with_placement(recipe, FIRST)
            elif any_rank(recipe.parallel.vision_shards == "tensor"):
                recipe = with_parallel(recipe, vision_shards="tensor")
        trainer = Trainer(with_steps(recipe, tokenizer), tokenizer, lock, stop, record(given, recipe))
        leaving.callback(trainer.exporter.end)
        try:
            code = trainer.train()
            # When the groups of ranks are gone, so that none waits for it; the lock is still held.
            leaving.callback(
                trainer.finish_exports,
                lambda: stop.signal is not None or trainer.deadline.passed() or lock.lost(),
            )
            return code
        finally:
            trainer.close()


def _world_size(default: int | None) -> int | None:
    text = os.environ.get("WORLD_SIZE")
    if text is None:
        return default
    if not text.isdigit() or int(text) == 0:
        raise UsageError(f"WORLD_SIZE: {text!r} is not a number of processes; start with torchrun, or unset it")
    return int(text)


@contextlib.contextmanager
def _causes_told(output_dir: str, lock: LockView) -> Iterator[None]:
    """Make one line of what ends a run from outside: another run in its directory, a disk that fills up or goes away.

    Raises:
        LostError: the lock is lost. What the run ran into follows from that: its files were removed, say.
        MachineError: the disk.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        if not isinstance(error, OtherRankError):
            lock.look()
            try:
                lock.check()
            except LostError as lost:
                raise lost from error
        problem = disk_problem(error, output_dir) if isinstance(error, OSError) else None
        if problem is None:
            raise
        raise MachineError(
            f"output_dir: {problem}. Started again, the run goes on from its newest checkpoint"
        ) from error


def check_output(recipe: Recipe) -> None:
    """Check that a run which starts anew does so in a directory of its own.

    Raises:
        RecipeError: checkpoints of another run lie there, which this one would mix with its own.
    """
    root = Path(recipe.output_dir) / "checkpoints"
    if not recipe.checkpoint.resume and newest_first(root):
        raise RecipeError(
            f"checkpoint.resume: false, but {root} holds checkpoints of an earlier run; choose another output_dir, or "
            "move them away"
        )
