"""Causal attention of a chunk of a segment: to all of the segment in front of it, and to itself causally.

What a context-parallel rank asks of attention (:mod:`megavlm.parallel.context`). ``scaled_dot_product_attention``
aligns a causal mask with the first query and the first key, and an explicit mask is kept for the backward pass, as
large as queries times keys. So here it is two products whose results are put together by their sums of exponentials, as
in ring attention (arXiv 2310.01889); nothing is kept but queries, keys, values and what comes out.

Shape legend: Q query positions, K key positions, N query heads and G key/value heads, D width of a head; L positions of
the whole pack, P those of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megavlm.layers.segments import to_device
from megavlm.parallel.context import ContextSplit, whole

_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _LowerRight(torch.autograd.Function):
    """The last query of [1, N, Q, D] sees all K keys, each one before it one key fewer; on a CPU."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        before = key.size(2) - query.size(2)
        own, own_sum = _attend(query, key[:, :, before:], value[:, :, before:], 0.0, True, scale=scale)
        if before:
            other, other_sum = _attend(query, key[:, :, :before], value[:, :, :before], 0.0, False, scale=scale)
            total = torch.logaddexp(own_sum, other_sum)
            own = own * (own_sum - total).exp().unsqueeze(-1) + other * (other_sum - total).exp().unsqueeze(-1)
            own, own_sum = own.to(query.dtype), total
        ctx.save_for_backward(query, key, value, own, own_sum)
        ctx.scale = scale
        return own

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, out, total = ctx.saved_tensors
        before = key.size(2) - query.size(2)

        def part(first: int, last: int, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
            found: tuple[Tensor, Tensor, Tensor] = _attend_backward(
                grad, query, key[:, :, first:last], value[:, :, first:last], out, total, 0.0, causal, scale=ctx.scale
            )
            return found

        queries, keys, values = part(before, key.size(2), True)
        if before:
            other_queries, other_keys, other_values = part(0, before, False)
            queries = queries + other_queries
            keys, values = torch.cat([other_keys, keys], 2), torch.cat([other_values, values], 2)
        return queries, keys, values, None


def lower_right(query_1NQD: Tensor, key_1GKD: Tensor, value_1GKD: Tensor, scale: float | None) -> Tensor:
    """Return [1, N, Q, D] of queries that are the last Q of K positions, each of which sees itself and what is before.

    Args:
        query_1NQD: queries.
        key_1GKD: keys, at least as many.
        value_1GKD: values.
        scale: of the products; None for D ** -0.5.
    """
    if query_1NQD.device.type == "cpu":
        found: Tensor = _LowerRight.apply(query_1NQD, key_1GKD, value_1GKD, scale)
        return found
    queries, keys = query_1NQD.size(2), key_1GKD.size(2)
    rows = torch.arange(keys - queries, keys, device=query_1NQD.device)[:, None]
    return F.scaled_dot_product_attention(
        query_1NQD,
        key_1GKD,
        value_1GKD,
        attn_mask=torch.arange(keys, device=query_1NQD.device) <= rows,
        scale=scale,
        enable_gqa=query_1NQD.size(1) != key_1GKD.size(1),
    )


def gathered(key_PGD: Tensor, value_PGD: Tensor, split: ContextSplit) -> tuple[Tensor, Tensor]:
    """Return keys and values [L, G, D] of the whole pack; a collective over the context-parallel ranks."""
    both_PGX = whole(torch.cat([key_PGD, value_PGD], dim=-1), split)
    key_LGD, value_LGD = both_PGX.split([key_PGD.size(-1), value_PGD.size(-1)], dim=-1)
    return key_LGD, value_LGD


@dataclass(frozen=True)
class ChunkCall:
    """What a kernel for packs takes of a cut pack, on the device: each chunk is a segment of queries.

    Its keys are the segment's up to the chunk's end, so that the last ones are aligned.
    """

    borders: Tensor
    """[C + 1] int32 of the chunks among this rank's positions."""
    keys: Tensor
    """[K] rows of the whole pack: the keys of each chunk."""
    key_borders: Tensor
    """[C + 1] int32 of them."""
    longest: int
    most_keys: int


def chunk_call(split: ContextSplit, window: int | None, device: torch.device) -> ChunkCall:
    """Return what the kernel takes, made once a micro-batch.

    Args:
        split: how the pack is cut.
        window: positions that each sees, its own among them; None for all in front of it.
        device: where attention runs.
    """
    if (ChunkCall, window) not in split.plans:
        widths, keys = [], []
        for start, length in zip(split.cu_seqlens.tolist(), split.lengths, strict=False):
            for begin, end in split.chunks(length):
                first = 0 if window is None else max(0, begin - window + 1)
                widths.append(end - begin)
                keys.append(np.arange(start + first, start + end, dtype=np.int64))
        counts = [len(one) for one in keys]

        def borders(sizes: list[int]) -> Tensor:
            return to_device(torch.from_numpy(np.cumsum([0, *sizes]).astype(np.int32)), device)

        rows = to_device(torch.from_numpy(np.concatenate(keys)), device)
        call = ChunkCall(borders(widths), rows, borders(counts), max(widths), max(counts))
        split.plans[ChunkCall, window] = call
    found: ChunkCall = split.plans[ChunkCall, window]
    return found
