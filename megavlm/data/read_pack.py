"""A pack with its pictures decoded, and what becomes of a sample whose picture cannot be."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from megavlm.data.batch import IGNORE_INDEX, Pack, SkippedSample

if TYPE_CHECKING:
    from megavlm.data.decode import ImageDecoder


@dataclass
class ReadPack:
    """A pack with its decoded images, on the reader rank."""

    pack: Pack
    pixels: Tensor
    """[N, 3, H, W] uint8 on the decoder's device."""
    masked: list[SkippedSample] = field(default_factory=list)
    """Samples of the pack that lost their labels, as an image of theirs cannot be decoded."""


def decode_pack(
    pack: Pack, decoder: ImageDecoder, image_size: int, tokens_per_image: int, image_token_id: int
) -> ReadPack:
    """Decode the images of a pack; a sample that shows one which cannot be decoded loses its labels."""
    if not pack.images:
        return ReadPack(pack, torch.zeros(0, 3, image_size, image_size, dtype=torch.uint8, device=decoder.device))
    decoded = decoder.decode(pack.images, image_size)
    slots = np.flatnonzero(pack.tokens == image_token_id)
    firsts = slots[::tokens_per_image]
    assert len(slots) == len(pack.images) * tokens_per_image, "image slots and images of a pack differ"
    bad: dict[int, str] = {}
    for index, cause in zip(decoded.failed, decoded.causes, strict=True):
        bad.setdefault(int(np.searchsorted(pack.cu_seqlens, firsts[index], side="right")) - 1, cause)
    for segment in bad:
        pack.labels[pack.cu_seqlens[segment] : pack.cu_seqlens[segment + 1]] = IGNORE_INDEX
    return ReadPack(pack, decoded.pixels, [_masked(pack, segment, bad[segment]) for segment in sorted(bad)])


def _masked(pack: Pack, segment: int, cause: str) -> SkippedSample:
    dataset, _, key = pack.sample_keys[segment].partition("/")
    shard = pack.sample_shards[segment] if pack.sample_shards else ""
    return SkippedSample(dataset, shard, key, f"bad image ({cause})")
