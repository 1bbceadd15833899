"""What the data path hands to a training step: one pack of samples, ready for the model.

Shape legend (used everywhere): S positions of the pack, G segments (samples, and one of padding where the
pack is not full), N images, C colours, H and W image height and width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

IGNORE_INDEX = -100
"""Label of a position that is not trained on (the value that PyTorch and Hugging Face use)."""


@dataclass
class Pack:
    """One micro-batch on the rank that reads it, before its images are decoded."""

    tokens: NDArray[np.int64]
    """[S] token ids; every image slot holds ``<imgpad>``."""
    labels: NDArray[np.int64]
    """[S] the token to predict at each position (already shifted by one within its segment), or IGNORE_INDEX."""
    position_ids: NDArray[np.int64]
    """[S] positions, from 0 in each segment."""
    cu_seqlens: NDArray[np.int32]
    """[G + 1] where each segment starts, and S at the end; padding is the last segment."""
    segment_sources: NDArray[np.int32]
    """[G] index of each segment's data set in the blend; -1 for padding."""
    images: list[bytes]
    """[N] encoded image files, in the order of their slots in ``tokens``."""
    sample_keys: list[str]
    """Keys of the samples, in order."""
    restore_key: Any = field(default=None, repr=False)
    """What the reader needs to make this pack again (see :mod:`megavlm.data.reader`)."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Samples left out on the way to this pack, by cause."""

    @property
    def padding_tokens(self) -> int:
        """Positions that hold no sample."""
        if self.segment_sources.size and self.segment_sources[-1] == -1:
            return int(self.cu_seqlens[-1] - self.cu_seqlens[-2])
        return 0

    @property
    def supervised_tokens(self) -> int:
        """Positions that have a label."""
        return int((self.labels != IGNORE_INDEX).sum())
