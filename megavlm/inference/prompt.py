"""What generation is asked, and what it has answered so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from megavlm.data.media import Arrangement, TokenGrid
from megavlm.data.positions import OwnPositions, continued

if TYPE_CHECKING:  # commands make prompts before they load torch
    from torch import Tensor


@dataclass
class Prompt:
    """A prompt and its answer so far."""

    tokens: NDArray[np.int64]
    """[T] token ids, with the slots of its images."""
    images: Tensor | None = None
    """[V, 3, H, W] uint8 views on the first stage (V may be 0), or [P, F] patches with the grid of ``arrangement``;
    elsewhere it is not looked at."""
    arrangement: Arrangement | None = None
    """Where the views' features go, and the grid of pictures that keep sizes of their own; None where they stay in
    their order."""
    grids: tuple[TokenGrid, ...] = ()
    """How the slots of its images lie, on all ranks; looked at where the model's positions have rows and columns."""
    answer: list[int] = field(default_factory=list)
    """Generated token ids, without the one that ended the answer."""

    def __len__(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.tokens) + len(self.answer)

    def positions(self, own: OwnPositions, more: int | None = None) -> NDArray[np.int64]:
        """Return the positions [.., T] of prompt and answer, or of the prompt and ``more`` tokens behind it.

        What is generated is text, whatever the tokens: its positions go on behind the largest of the prompt.
        """
        return continued(own.of(self.tokens, self.grids), len(self.answer) if more is None else more)
