"""``megavlm train``: the entry point of a run, on one process or under torchrun."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from megavlm.checkpoint.paths import newest_first
from megavlm.config.errors import MachineError, OtherRankError, RecipeError, disk_problem
from megavlm.config.schema import Recipe
from megavlm.data.tokenizer import tokenizer_of
from megavlm.parallel.device import prepare_device
from megavlm.parallel.lock import LostError, View
from megavlm.parallel.output import holding, try_writing


def run(recipe: Recipe) -> int:
    """Train by a checked recipe.

    Returns:
        The exit code: 0, or 75 for a run that a signal stopped and that can go on.

    Raises:
        RecipeError: tokenizer, data or checkpoint do not fit the recipe.
        RuntimeError: training went wrong (a loss that is not finite, a reader that failed).
    """
    tokenizer = tokenizer_of(recipe)
    try_writing(recipe.output_dir)
    check_output(recipe)
    prepare_device()
    # Megatron-Core may be imported from here on.
    from megavlm.config.lora import check_quantiser  # noqa: PLC0415
    from megavlm.parallel.engine import check_machine, this_machine, user_buffers  # noqa: PLC0415
    from megavlm.parallel.specs import use_transformer_engine  # noqa: PLC0415
    from megavlm.parallel.state import process_groups  # noqa: PLC0415
    from megavlm.training.loop import Trainer  # noqa: PLC0415
    from megavlm.training.recorder import check_recorder  # noqa: PLC0415

    check_recorder(recipe.logging)
    use_transformer_engine(recipe.parallel.transformer_impl, recipe.training.precision)
    check_machine(recipe, this_machine())
    check_quantiser(recipe.lora.quantize)
    with (
        contextlib.ExitStack() as leaving,
        process_groups(recipe.parallel, recipe.training.seed),
        user_buffers(recipe),
        holding(recipe.output_dir, "train", "output_dir", recipe.checkpoint.lock_timeout_seconds) as lock,
        _causes_told(recipe.output_dir, lock),
    ):
        trainer = Trainer(recipe, tokenizer, lock)
        # Until the groups are gone: a second signal must not kill a rank that is on its way out with 75.
        leaving.enter_context(trainer.stop.listening())
        try:
            return trainer.train()
        finally:
            trainer.close()


@contextlib.contextmanager
def _causes_told(output_dir: str, lock: View) -> Iterator[None]:
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
