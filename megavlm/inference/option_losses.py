"""How likely given answers are: the mean loss of each option after its prompt, at any layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from torch import Tensor

from megavlm.config.errors import UserError
from megavlm.data.feed import MicroBatch
from megavlm.data.media import Arrangement, joined
from megavlm.inference.packs import first_fit, pack_segments
from megavlm.inference.prompt import Prompt
from megavlm.models.build import unwrap
from megavlm.parallel.device import local_device
from megavlm.parallel.state import is_first_stage


@dataclass
class _Segment:
    """A prompt with all but the last token of an option; options of one token share it."""

    prompt: int
    tokens: list[int]
    wanted: list[tuple[int, int, tuple[int, int]]] = field(default_factory=list)
    """Position, token whose loss there is wanted, and whose it is (prompt, option)."""


@dataclass
class _Request:
    """One micro-batch."""

    batch: MicroBatch
    positions: Tensor
    """[K] positions in the pack."""
    tokens: Tensor
    """[K] tokens that should follow them."""


@torch.no_grad()
def option_losses(
    chunks: Sequence[Any],
    prompts: Sequence[Prompt],
    options: Sequence[Sequence[Sequence[int]]],
    *,
    vocab_size: int,
    pack_length: int,
) -> list[list[float]]:
    """Return the mean loss over the tokens of each option; a collective over one data-parallel replica.

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
    config = unwrap(chunks[0]).config
    if config.virtual_pipeline_model_parallel_size:  # the interleaved schedule wants a multiple of the stages
        packs += [[]] * (-len(packs) % config.pipeline_model_parallel_size)
    for chunk in chunks:
        chunk.eval()
    losses = _run(
        chunks, [[segments[i] for i in group] for group in packs], prompts, len(order), vocab_size, pack_length
    )
    for chunk in chunks:
        chunk.train()
    sums = [[0.0] * len(some) for some in options]
    for (_, _, (prompt, option)), loss in zip(order, losses, strict=True):
        sums[prompt][option] += loss / len(options[prompt][option])
    return sums


def _segments(prompts: Sequence[Prompt], options: Sequence[Sequence[Sequence[int]]]) -> list[_Segment]:
    segments: list[_Segment] = []
    for index, (prompt, some) in enumerate(zip(prompts, options, strict=True)):
        by_start: dict[tuple[int, ...], _Segment] = {}
        for number, option in enumerate(some):
            assert option, "an option needs a token"
            start = tuple(option[:-1])
            if start not in by_start:
                by_start[start] = _Segment(index, [*prompt.tokens.tolist(), *start])
            segment, last = by_start[start], len(prompt.tokens) - 1
            segment.wanted += [(last + i, token, (index, number)) for i, token in enumerate(option)]
        segments += by_start.values()
    return segments


def _run(
    chunks: Sequence[Any],
    packs: Sequence[Sequence[_Segment]],
    prompts: Sequence[Prompt],
    count: int,
    vocab_size: int,
    pack_length: int,
) -> list[float]:
    """The wanted losses, in the order of packs and segments, on all ranks of the replica."""
    if not packs:
        return []
    data = [iter([_request(some, prompts, pack_length) for some in packs]) for _ in chunks]
    found = get_forward_backward_func()(
        forward_step_func=partial(_forward, vocab_size=vocab_size),
        data_iterator=data if len(chunks) > 1 else data[0],
        model=list(chunks),
        num_microbatches=len(packs),
        seq_length=pack_length,
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    losses = torch.zeros(count, dtype=torch.float32, device=local_device())
    if found:  # the last stage
        losses = torch.cat(found)
    dist.broadcast(losses, mpu.get_pipeline_model_parallel_last_rank(), group=mpu.get_pipeline_model_parallel_group())
    return [float(loss) for loss in losses.tolist()]


def _request(segments: Sequence[_Segment], prompts: Sequence[Prompt], pack_length: int) -> _Request:
    starts = np.cumsum([0, *(len(one.tokens) for one in segments)])
    wanted = [
        (int(start) + at, token) for start, one in zip(starts, segments, strict=False) for at, token, _ in one.wanted
    ]
    shown = [prompts[one.prompt] for one in segments] if is_first_stage() else []
    shown = [prompt for prompt in shown if prompt.images is not None and prompt.images.size(0)]
    pixels = [prompt.images for prompt in shown if prompt.images is not None]
    device = local_device()
    return _Request(
        pack_segments(
            [one.tokens for one in segments],
            pack_length,
            torch.cat(pixels) if pixels else None,
            _arrangement(shown),
        ),
        torch.tensor([at for at, _ in wanted], dtype=torch.int64, device=device),
        torch.tensor([token for _, token in wanted], dtype=torch.int64, device=device),
    )


def _arrangement(shown: Sequence[Prompt]) -> Arrangement | None:
    """Return where the features of several prompts' views go; None where they stay in their order."""
    parts = [prompt.arrangement for prompt in shown if prompt.arrangement is not None]
    assert len(parts) in (0, len(shown))
    return joined(parts) if parts else None


def _forward(requests: Iterator[_Request], model: Any, vocab_size: int) -> tuple[Tensor, Callable[..., Tensor]]:
    """Run one chunk (Megatron-Core's ``forward_step_func``); the last one takes the losses."""
    request = next(requests)
    output = model(
        tokens=request.batch.tokens,
        position_ids=request.batch.position_ids,
        packed_seq_params=request.batch.packed_seq_params,
        images=request.batch.images,
        image_index=request.batch.image_index,
        image_weight=request.batch.image_weight,
    )

    def take(logits_1SV: Tensor, non_loss_data: bool = True) -> Tensor:
        rows = gather_from_tensor_model_parallel_region(logits_1SV[0, request.positions])[:, :vocab_size].float()
        return rows.logsumexp(-1) - rows.gather(1, request.tokens[:, None]).squeeze(1)

    return output, take
