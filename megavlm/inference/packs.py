"""Token lists that are read together: which share a pack, and the pack."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from megavlm.data.batch import IGNORE_INDEX, Pack
from megavlm.data.feed import MicroBatch, micro_batch
from megavlm.data.media import Arrangement
from megavlm.parallel.device import local_device


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return the indices of what shares a pack: longest first, each into the first pack with room."""
    groups: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((g for g, left in enumerate(room) if left >= lengths[i]), len(groups))
        if place == len(groups):
            groups.append([])
            room.append(capacity)
        groups[place].append(i)
        room[place] -= lengths[i]
    return groups


def pack_segments(
    segments: Sequence[Sequence[int]],
    pack_length: int,
    images: Tensor | None = None,
    arrangement: Arrangement | None = None,
) -> MicroBatch:
    """Return token lists as the segments of one pack without labels; padding is a segment of its own.

    Args:
        segments: token ids, ``pack_length`` at most in all.
        pack_length: positions of the pack.
        images: [V, 3, H, W] of all segments, in their order; None where they go in as features, or on later stages.
        arrangement: where their features go.
    """
    lengths, sources = [len(one) for one in segments], [0] * len(segments)
    padding = pack_length - sum(lengths)
    if padding:
        lengths, sources = [*lengths, padding], [*sources, -1]
    tokens = np.zeros(pack_length, np.int64)
    tokens[: pack_length - padding] = [token for one in segments for token in one]
    pack = Pack(
        tokens=tokens,
        labels=np.full(pack_length, IGNORE_INDEX, np.int64),
        position_ids=np.concatenate([np.arange(length, dtype=np.int64) for length in lengths]),
        cu_seqlens=np.cumsum([0, *lengths]).astype(np.int32),
        segment_sources=np.array(sources, np.int32),
        images=[],
        sample_keys=[],
    )
    return micro_batch(pack, images, local_device(), arrangement)
