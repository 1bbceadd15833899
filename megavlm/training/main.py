"""``megavlm train``: the entry point of a run, on one process or under torchrun."""

from __future__ import annotations

from megavlm.config.errors import RecipeError
from megavlm.config.schema import Recipe
from megavlm.data.tokenizer import Tokenizer, load_tokenizer
from megavlm.parallel.device import prepare_device


def run(recipe: Recipe) -> int:
    """Train by a checked recipe.

    Returns:
        The exit code: 0, or 75 for a run that a signal stopped and that can go on.

    Raises:
        RecipeError: tokenizer, data or checkpoint do not fit the recipe.
        RuntimeError: training went wrong (a loss that is not finite, a reader that failed).
    """
    assert recipe.data.tokenizer is not None  # the command line found the file
    tokenizer = load_tokenizer(recipe.data.tokenizer)
    check_vocabulary(recipe, tokenizer)
    prepare_device()
    # Megatron-Core may be imported from here on.
    from megavlm.parallel.engine import check_machine, this_machine, user_buffers  # noqa: PLC0415
    from megavlm.parallel.specs import use_transformer_engine  # noqa: PLC0415
    from megavlm.parallel.state import configure_logging, process_groups  # noqa: PLC0415
    from megavlm.training.loop import Trainer  # noqa: PLC0415

    use_transformer_engine(recipe.parallel.transformer_impl, recipe.training.precision)
    check_machine(recipe, this_machine())
    with process_groups(recipe.parallel, recipe.training.seed), user_buffers(recipe):
        configure_logging()
        trainer = Trainer(recipe, tokenizer)
        try:
            return trainer.train()
        finally:
            trainer.close()


def check_vocabulary(recipe: Recipe, tokenizer: Tokenizer) -> None:
    """Check that the embedding has a row for each token.

    Raises:
        RecipeError: it has not.
    """
    rows = recipe.model.language.vocab_size
    if tokenizer.vocab_size > rows:
        raise RecipeError(
            f"model.language.vocab_size: {rows} rows, but {recipe.data.tokenizer} has {tokenizer.vocab_size} tokens; "
            f"set it to {tokenizer.vocab_size} or more"
        )
