"""How likely given answers are: the mean loss of each option after its prompt, at any layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from numpy.typing import NDArray
from torch import Tensor

from megavlm.config.errors import UserError
from megavlm.data.device_batch import Batch
from megavlm.data.media import Arrangement, joined
from megavlm.data.positions import OwnPositions
from megavlm.inference.packs import first_fit, pack_segments
from megavlm.inference.prompt import Prompt
from megavlm.models.build import unwrap
from megavlm.models.vlm import VisionLanguageModel
from megavlm.parallel import pipeline
from megavlm.parallel.device import local_device
from megavlm.parallel.state import is_first_stage


@dataclass
class _OptionSegment:
    """A prompt with all but the last token of an option; options of one token share it."""

    prompt: int
    tokens: list[int]
    wanted: list[tuple[int, int, tuple[int, int]]] = field(default_factory=list)
    """Position, token whose loss there is wanted, and whose it is (prompt, option)."""


@dataclass
class _LossRequest:
    """One micro-batch."""

    batch: Batch
    positions: Tensor
    """[K] positions in the pack."""
    tokens: Tensor
    """[K] tokens that should follow them."""


def option_losses(
    chunks: Sequence[Any],
    prompts: Sequence[Prompt],
    options: Sequence[Sequence[Sequence[int]]],
    *,
    vocab_size: int,
    pack_length: int,
) -> list[list[float]]:
    """Return the mean loss over the tokens of each option; a collective over one data-parallel replica.

    Where replicas share experts it is one over all of them, and all are given the same prompts.

    Args:
        chunks: the model chunks of this rank, wrapped or bare.
        prompts: the same on all ranks of the replica, but for their images.
        options: for each prompt the token ids of its options, at least one token each.
        vocab_size: rows of the model's head that count; those after it are padding.
        pack_length: positions of one micro-batch; divisible by TP with sequence parallelism.

    Returns:
        For each prompt the loss of each option, in nats per token, on all ranks.

    Raises:
        UserError: a prompt and its option do not fit ``pack_length``.
    """
    segments = _segments(prompts, options)
    longest = max((len(one.tokens) for one in segments), default=0)
    if longest > pack_length:
        raise UserError(f"a prompt with its option takes {longest} positions, a pack has {pack_length}")
    packs = first_fit([len(one.tokens) for one in segments], pack_length)
    order = [want for group in packs for i in group for want in segments[i].wanted]
    model = unwrap(chunks[0])
    requests = [_request([segments[i] for i in group], prompts, pack_length, model) for group in packs]
    with pipeline.evaluating(chunks):
        found = pipeline.run(chunks, requests, partial(_step, vocab_size=vocab_size), pack_length)
    there = torch.cat(found) if found else torch.zeros(len(order), dtype=torch.float32, device=local_device())
    losses = pipeline.from_last_stage(there).tolist()
    sums = [[0.0] * len(some) for some in options]
    for (_, _, (prompt, option)), loss in zip(order, losses, strict=True):
        sums[prompt][option] += loss / len(options[prompt][option])
    return sums


def _segments(prompts: Sequence[Prompt], options: Sequence[Sequence[Sequence[int]]]) -> list[_OptionSegment]:
    segments: list[_OptionSegment] = []
    for index, (prompt, some) in enumerate(zip(prompts, options, strict=True)):
        by_start: dict[tuple[int, ...], _OptionSegment] = {}
        for number, option in enumerate(some):
            assert option, "an option needs a token"
            start = tuple(option[:-1])
            if start not in by_start:
                by_start[start] = _OptionSegment(index, [*prompt.tokens.tolist(), *start])
            segment, last = by_start[start], len(prompt.tokens) - 1
            segment.wanted += [(last + i, token, (index, number)) for i, token in enumerate(option)]
        segments += by_start.values()
    return segments


def _request(
    segments: Sequence[_OptionSegment], prompts: Sequence[Prompt], pack_length: int, model: VisionLanguageModel
) -> _LossRequest:
    own = model.own_positions
    starts = np.cumsum([0, *(len(one.tokens) for one in segments)])
    wanted = [
        (int(start) + at, token) for start, one in zip(starts, segments, strict=False) for at, token, _ in one.wanted
    ]
    shown = [prompts[one.prompt] for one in segments] if is_first_stage() else []
    shown = [prompt for prompt in shown if prompt.images is not None and prompt.images.size(0)]
    pixels = [prompt.images for prompt in shown if prompt.images is not None]
    device = local_device()
    batch = pack_segments(
        [one.tokens for one in segments],
        pack_length,
        torch.cat(pixels) if pixels else None,
        _arrangement(shown),
        None if own is None else [_positions(one, prompts[one.prompt], own) for one in segments],
        model.two_way_spans,
        [len(prompts[one.prompt].tokens) for one in segments],
        own,
        model.padding_token,
    )
    if model.crosses:  # later stages need to know how large pictures are
        batch.image_grid = pipeline.from_first_stage(batch.image_grid)
    return _LossRequest(
        batch,
        torch.tensor([at for at, _ in wanted], dtype=torch.int64, device=device),
        torch.tensor([token for _, token in wanted], dtype=torch.int64, device=device),
    )


def _positions(segment: _OptionSegment, prompt: Prompt, own: OwnPositions) -> NDArray[np.int64]:
    return prompt.positions(own, len(segment.tokens) - len(prompt.tokens))


def _arrangement(shown: Sequence[Prompt]) -> Arrangement | None:
    """Return where the features of several prompts' views go; None where they stay in their order."""
    parts = [prompt.arrangement for prompt in shown if prompt.arrangement is not None]
    assert len(parts) in (0, len(shown))
    return joined(parts) if parts else None


def _step(model: Any, request: _LossRequest, vocab_size: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Run one chunk; the last one takes the losses."""
    output = model(**request.batch.inputs())

    def take(logits_1SV: Tensor) -> Tensor:
        rows = gather_from_tensor_model_parallel_region(logits_1SV[0, request.positions])[:, :vocab_size].float()
        return rows.logsumexp(-1) - rows.gather(1, request.tokens[:, None]).squeeze(1)

    return output, take
