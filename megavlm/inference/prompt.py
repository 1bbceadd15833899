"""What generation is asked, and what it has answered so far."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


@dataclass
class Prompt:
    """A prompt and its answer so far."""

    tokens: NDArray[np.int64]
    """[T] token ids, with the slots of its images."""
    images: Tensor | None = None
    """[N, 3, H, W] uint8 on the first stage (N may be 0); elsewhere it is not looked at."""
    answer: list[int] = field(default_factory=list)
    """Generated token ids, without the one that ended the answer."""

    def __len__(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.tokens) + len(self.answer)
