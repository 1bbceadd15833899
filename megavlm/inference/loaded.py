"""A checkpoint's model in processes that answer with it and do nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from megavlm.checkpoint.distributed import load
from megavlm.config.schema import Recipe
from megavlm.data.tokenizer import Tokenizer
from megavlm.models.build import build_model, unwrap
from megavlm.parallel.state import process_groups


@contextlib.contextmanager
def loaded(
    recipe: Recipe, checkpoint: Path, tokenizer: Tokenizer, begin: Callable[[], object] = lambda: None
) -> Iterator[list[Any]]:
    """Load a checkpoint and yield its model chunks; process groups end with the block.

    The block runs in torch's inference mode, which is a little quicker than ``no_grad``. Training must not: buffers and
    tables that Megatron-Core keeps for later would become tensors that cannot take part in a backward pass.

    Args:
        recipe: of the checkpoint, at this job's layout; checked.
        checkpoint: its directory.
        tokenizer: its tokenizer.
        begin: called once the ranks have met, before anything is loaded.
    """
    with process_groups(recipe.parallel, recipe.training.seed):
        begin()
        chunks = build_model(recipe, tokenizer.imgpad_id)
        load(checkpoint, modules=[unwrap(chunk) for chunk in chunks], base=recipe.checkpoint.load)
        with torch.inference_mode():
            yield chunks
