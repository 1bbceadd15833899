"""The distributed part of ``megavlm eval``: a checkpoint answers prompts at this job's layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state as mpu

from megavlm.config.errors import UserError
from megavlm.config.schema import Recipe
from megavlm.data.decoders import make_decoder
from megavlm.data.media import plan_of
from megavlm.data.tokenizer import Tokenizer
from megavlm.evaluation.records import HeldOutRecord
from megavlm.inference.answer_text import answer_text
from megavlm.inference.generate import generate
from megavlm.inference.loaded import loaded
from megavlm.inference.prompt import Prompt
from megavlm.parallel.state import agreed, is_first_stage

_PROMPTS_AT_ONCE = 512


def answer(
    recipe: Recipe,
    checkpoint: Path,
    tokenizer: Tokenizer,
    records: Sequence[HeldOutRecord],
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    begin: Callable[[], object] = lambda: None,
) -> list[str] | None:
    """Answer ``prompts`` greedily; data-parallel replicas share them out.

    Args:
        recipe: of the checkpoint, at this job's layout.
        checkpoint: its directory.
        tokenizer: its tokenizer.
        records: for their images.
        prompts: one per record.
        max_new_tokens: longest answer.
        begin: as :func:`~megavlm.inference.loaded.loaded` has it.

    Returns:
        The answers on the first rank, None on the others.

    Raises:
        UserError: an image cannot be decoded.
    """
    with loaded(recipe, checkpoint, tokenizer, begin) as chunks:
        rank, size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
        mine = list(range(rank, len(prompts), size))
        answers: dict[int, str] = {}
        for start in range(0, len(mine), _PROMPTS_AT_ONCE):
            some = mine[start : start + _PROMPTS_AT_ONCE]
            _show(some, records, prompts, recipe)
            ids = generate(
                chunks,
                [prompts[i] for i in some],
                max_new_tokens=max_new_tokens,
                stop_ids=tokenizer.stop_ids,
                vocab_size=tokenizer.vocab_size,
                pack_length=recipe.data.sequence_length,
            )
            for i, tokens in zip(some, ids, strict=True):
                answers[i] = answer_text(tokens, tokenizer)
                prompts[i].images = None
        gathered: list[Any] = [None] * size
        dist.all_gather_object(gathered, answers, group=mpu.get_data_parallel_group())
        everything = {i: text for part in gathered for i, text in part.items()}
        return [everything[i] for i in range(len(prompts))] if dist.get_rank() == 0 else None


def _show(indices: Sequence[int], records: Sequence[HeldOutRecord], prompts: Sequence[Prompt], recipe: Recipe) -> None:
    """Decode the images of some prompts, on every rank of the first stage."""
    with agreed("reading images"):
        if not is_first_stage():
            return
        decoder = make_decoder(recipe.data.image_decoder, alpha=recipe.data.image_alpha)
        for i in indices:
            files = [path.read_bytes() for path in records[i].images]
            decoded, prompts[i].arrangement = decoder.decode_prompt(files, plan_of(recipe.model))
            if decoded.failed:
                raise UserError(f"{records[i].images[decoded.failed[0]]}: cannot be decoded")
            prompts[i].images = decoded.pixels
