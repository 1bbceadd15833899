"""Token lists that are read together: which share a pack, and the pack."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from megavlm.data.batch import make_pack
from megavlm.data.device_batch import Batch, make_batch
from megavlm.data.media import Arrangement
from megavlm.data.positions import OwnPositions, padded
from megavlm.data.spans import TwoWaySpans
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
    positions: Sequence[NDArray[np.int64]] | None = None,
    spans: TwoWaySpans | None = None,
    prompts: Sequence[int] | None = None,
    own: OwnPositions | None = None,
    pad_token: int = 0,
) -> Batch:
    """Return token lists as the segments of one pack without labels; padding is a segment of its own.

    Args:
        segments: token ids, ``pack_length`` at most in all.
        pack_length: positions of the pack.
        images: [V, 3, H, W] of all segments, in their order; None where they go in as features, or on later stages.
        arrangement: where their features go.
        positions: [.., T] of each segment, where the model has such (``own``); None for counted ones.
        spans: which positions see each other both ways, where the model has such.
        prompts: how many tokens of each segment are its prompt, with ``spans``; None for all.
        own: how the model's positions are made; with ``positions``.
        pad_token: what fills the rest, no slot of an image (``VisionLanguageModel.padding_token``).
    """
    pack = make_pack(segments, pack_length, pad_token=pad_token, spans=spans, prefixes=prompts)
    if positions is not None and own is not None:
        pack.position_ids = padded(positions, pack_length, own.lead)
    return make_batch(pack, images, local_device(), arrangement)
