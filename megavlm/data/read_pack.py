"""A pack with its pictures decoded, and what becomes of a sample whose picture cannot be."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megavlm.data.batch import IGNORE_INDEX, Pack, SkippedSample
from megavlm.data.media import Arrangement, ImagePlan, arrange

if TYPE_CHECKING:
    from megavlm.data.decode import ImageDecoder


@dataclass
class ReadPack:
    """A pack with its decoded images, on the reader rank."""

    pack: Pack
    pixels: Tensor
    """[V, 3, side, side] uint8 views of all images, on the decoder's device; or [P, F] patches (``plan.packed``)."""
    arrangement: Arrangement | None = None
    """Where the views' features go; None where they stay in their order."""
    masked: list[SkippedSample] = field(default_factory=list)
    """Samples of the pack that lost their labels, as an image of theirs cannot be decoded."""

    @property
    def seen(self) -> int | list[list[int]]:
        """What the tower sees: so many views, or the frames, rows and columns of patches of each picture."""
        if self.arrangement is None or self.arrangement.grid is None:
            return self.pixels.size(0)
        return self.arrangement.grid.tolist()  # type: ignore[no-any-return]


def decode_pack(pack: Pack, decoder: ImageDecoder, plan: ImagePlan, image_token_id: int) -> ReadPack:
    """Decode the images of a pack; a sample that shows one which cannot be decoded loses its labels."""
    if not pack.images:
        return ReadPack(pack, no_pixels(plan).to(decoder.device))
    layouts = pack.layouts(plan)
    decoded = decoder.decode(pack.images, plan, layouts)
    arrangement = None if layouts is None else arrange(plan, layouts)
    firsts = image_starts(pack, plan, image_token_id)
    bad: dict[int, str] = {}
    for index, cause in zip(decoded.failed, decoded.causes, strict=True):
        what = f"bad {'image' if isinstance(pack.images[index], bytes) else 'film'} ({cause})"
        bad.setdefault(int(np.searchsorted(pack.cu_seqlens, firsts[index], side="right")) - 1, what)
    for segment in bad:
        pack.labels[pack.cu_seqlens[segment] : pack.cu_seqlens[segment + 1]] = IGNORE_INDEX
    masked = [_masked(pack, segment, bad[segment]) for segment in sorted(bad)]
    return ReadPack(pack, decoded.pixels, arrangement, masked)


def no_pixels(plan: ImagePlan) -> Tensor:
    """[0, 3, side, side] uint8, or [0, F]: the pixels of no image."""
    return torch.zeros(0, *plan.row, dtype=torch.uint8)


def image_starts(pack: Pack, plan: ImagePlan, image_token_id: int) -> NDArray[np.int64]:
    """Return [N] the position of each image's, or film's, first slot."""
    slots = np.flatnonzero(pack.tokens == image_token_id)
    layouts = pack.layouts(plan)
    if layouts is None:
        assert len(slots) == len(pack.images) * plan.tokens_per_view, "image slots and images of a pack differ"
        return slots[:: plan.tokens_per_view]
    ends = np.cumsum([0, *(layout.tokens for layout in layouts)])
    assert len(slots) == ends[-1], "image slots and images of a pack differ"
    return slots[ends[:-1]]


def _masked(pack: Pack, segment: int, cause: str) -> SkippedSample:
    dataset, _, key = pack.sample_keys[segment].partition("/")
    shard = pack.sample_shards[segment] if pack.sample_shards else ""
    return SkippedSample(dataset, shard, key, cause)
