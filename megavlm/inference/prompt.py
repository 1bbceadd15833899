"""What generation is asked, and what it has answered so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from megavlm.data.media import Arrangement

if TYPE_CHECKING:  # commands make prompts before they load torch
    from torch import Tensor


@dataclass
class Prompt:
    """A prompt and its answer so far."""

    tokens: NDArray[np.int64]
    """[T] token ids, with the slots of its images."""
    images: Tensor | None = None
    """[V, 3, H, W] uint8 views on the first stage (V may be 0); elsewhere it is not looked at."""
    arrangement: Arrangement | None = None
    """Where the views' features go; None where they stay in their order."""
    answer: list[int] = field(default_factory=list)
    """Generated token ids, without the one that ended the answer."""

    def __len__(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.tokens) + len(self.answer)
