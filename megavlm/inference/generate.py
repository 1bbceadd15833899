"""Greedy generation at any layout: packed prompts through Megatron-Core's forward-only pipeline schedule.

There is no key/value cache: each new token costs a forward pass over the prompts that are still being answered,
packed without padding between them. That suits panels and short answers. Image features are computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from torch import Tensor

from megavlm.data.batch import IGNORE_INDEX, Pack
from megavlm.data.feed import MicroBatch, micro_batch
from megavlm.inference.prompt import Prompt
from megavlm.models.build import unwrap
from megavlm.models.vlm import VisionLanguageModel
from megavlm.parallel.device import local_device
from megavlm.parallel.state import is_first_stage

_IMAGES_AT_ONCE = 16


@torch.no_grad()
def generate(
    chunks: Sequence[Any],
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    vocab_size: int,
    pack_length: int,
) -> list[list[int]]:
    """Answer ``prompts`` greedily; a collective over the ranks of one data-parallel replica.

    Args:
        chunks: the model chunks of this rank, wrapped or bare.
        prompts: the same on all ranks of the replica, but for their images.
        max_new_tokens: longest answer.
        stop_ids: tokens that end an answer.
        vocab_size: ids from here on (padding of the embedding) are never chosen.
        pack_length: positions of one micro-batch; divisible by TP with sequence parallelism.

    Returns:
        Token ids of each answer, on all ranks.

    Raises:
        ValueError: a prompt and its longest answer do not fit ``pack_length``.
    """
    longest = max((len(prompt) for prompt in prompts), default=0) + max_new_tokens
    if longest > pack_length:
        raise ValueError(f"a prompt with its answer takes {longest} positions, a pack has {pack_length}")
    for chunk in chunks:
        chunk.eval()
    bare = unwrap(chunks[0])
    features = [_features(bare, prompt) for prompt in prompts] if is_first_stage() else []
    active = list(range(len(prompts)))
    for _ in range(max_new_tokens):
        if not active:
            break
        shown = [features[i] for i in active] if features else []
        picks = _next_tokens(chunks, bare, [prompts[i] for i in active], shown, vocab_size, pack_length)
        still = []
        for i, token in zip(active, picks, strict=True):
            if token not in stop_ids:
                prompts[i].answer.append(token)
                still.append(i)
        active = still
    for chunk in chunks:
        chunk.train()
    return [prompt.answer for prompt in prompts]


def _features(model: VisionLanguageModel, prompt: Prompt) -> Tensor | None:
    """[Q, N, E] features of a prompt's images; None without images."""
    if prompt.images is None or prompt.images.size(0) == 0:
        return None
    parts = prompt.images.to(local_device()).split(_IMAGES_AT_ONCE)
    encoded = [model.encode_images(part) for part in parts]
    return torch.cat([part for part in encoded if part is not None], dim=1)


@dataclass
class _Request:
    """One micro-batch of generation."""

    batch: MicroBatch
    ends: Tensor
    """[K] position whose logits are wanted, for each of K prompts."""
    features: Tensor | None


def _next_tokens(
    chunks: Sequence[Any],
    bare: VisionLanguageModel,
    prompts: Sequence[Prompt],
    features: Sequence[Tensor | None],
    vocab_size: int,
    pack_length: int,
) -> list[int]:
    """The next token of each prompt, on all ranks."""
    groups = _group([len(prompt) for prompt in prompts], pack_length)
    order = [i for group in groups for i in group]
    config = bare.config
    multiple = config.pipeline_model_parallel_size if config.virtual_pipeline_model_parallel_size else 1
    groups += [[]] * (-len(groups) % multiple)  # the interleaved schedule wants a multiple of the stages
    requests = [
        _request([prompts[i] for i in group], [features[i] for i in group] if features else [], pack_length)
        for group in groups
    ]
    picked = get_forward_backward_func()(
        forward_step_func=partial(_forward, vocab_size=vocab_size),
        data_iterator=[iter(requests) for _ in chunks] if len(chunks) > 1 else iter(requests),
        model=list(chunks),
        num_microbatches=len(requests),
        seq_length=pack_length,
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    tokens = torch.zeros(len(order), dtype=torch.int64, device=local_device())
    if picked:  # the last stage
        tokens = torch.cat(picked)
    dist.broadcast(tokens, mpu.get_pipeline_model_parallel_last_rank(), group=mpu.get_pipeline_model_parallel_group())
    answer = dict(zip(order, tokens.tolist(), strict=True))
    return [answer[i] for i in range(len(prompts))]


def _group(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of prompts that share a pack: longest first, each into the first pack with room."""
    groups: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((g for g, left in enumerate(room) if left >= lengths[i]), None)
        if place is None:
            groups.append([])
            room.append(capacity)
            place = len(groups) - 1
        groups[place].append(i)
        room[place] -= lengths[i]
    return groups


def _request(prompts: Sequence[Prompt], features: Sequence[Tensor | None], pack_length: int) -> _Request:
    lengths = [len(prompt) for prompt in prompts]
    ends = np.cumsum(lengths, dtype=np.int64) - 1
    sources = [0] * len(prompts)
    padding = pack_length - sum(lengths)
    if padding:
        lengths, sources = [*lengths, padding], [*sources, -1]
    tokens = np.zeros(pack_length, np.int64)
    if prompts:
        tokens[: pack_length - padding] = np.concatenate([[*prompt.tokens, *prompt.answer] for prompt in prompts])
    pack = Pack(
        tokens=tokens,
        labels=np.full(pack_length, IGNORE_INDEX, np.int64),
        position_ids=np.concatenate([np.arange(length, dtype=np.int64) for length in lengths]),
        cu_seqlens=np.cumsum([0, *lengths]).astype(np.int32),
        segment_sources=np.array(sources, np.int32),
        images=[],
        sample_keys=[],
    )
    shown = [item for item in features if item is not None]
    device = local_device()
    return _Request(
        micro_batch(pack, None, device),
        torch.from_numpy(ends).to(device),
        torch.cat(shown, dim=1) if shown else None,
    )


def _forward(requests: Iterator[_Request], model: Any, vocab_size: int) -> tuple[Tensor, Callable[..., Tensor]]:
    """Run one chunk (Megatron-Core's ``forward_step_func``); the last one picks tokens."""
    request = next(requests)
    output = model(
        tokens=request.batch.tokens,
        position_ids=request.batch.position_ids,
        packed_seq_params=request.batch.packed_seq_params,
        image_features=request.features,
    )

    def pick(logits_1SV: Tensor, non_loss_data: bool = True) -> Tensor:
        chosen = logits_1SV[0, request.ends]
        return gather_from_tensor_model_parallel_region(chosen)[:, :vocab_size].argmax(-1)

    return output, pick
