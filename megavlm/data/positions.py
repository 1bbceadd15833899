"""Positions that are not counted: of three numbers (M-RoPE), or one that a picture's features share (CogVLM).

With M-RoPE each feature of a picture has a time, a row and a column.

Qwen2-VL (arXiv 2409.12191, section 2.1): a text token's three numbers are the same, one more than those of the token
before it. A picture's features stand on its grid, which begins where the text ended, and the text behind it goes on one
after the largest number of the picture. What differs between families is data, which the image plan knows
(:class:`megavlm.data.media.TokenGrid`): how far apart the frames of a film are, and whether text stands between them.

Shape legend: L tokens of a sample; three rows for time, row and column.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megavlm.config.schema import ModelConfig
from megavlm.data.media import ImageLayout, ImagePlan, TokenGrid, plan_of

AXES = 3
"""Time, row, column."""


@dataclass(frozen=True)
class OwnPositions:
    """How the positions of a sample follow from its tokens and the grids of its pictures."""

    slot_ids: tuple[int, ...]
    """Tokens of the slots of pictures and films."""
    after_film: Literal["longest", "side"] = "longest"
    """Where text goes on behind a film: after its largest number, as Qwen2-VL's paper has it and the published code up
    to Transformers 5.2, or after its longer side, whatever its length in time (from Transformers 5.3). Pictures, and
    films with text between their frames, are the same in both."""

    @property
    def lead(self) -> tuple[int, ...]:
        """Dimensions in front of that of tokens."""
        return (AXES,)

    @property
    def on_grids(self) -> bool:
        """Whether they follow from the grids of pictures."""
        return True

    def of(self, tokens: ArrayLike, grids: Sequence[TokenGrid] = ()) -> NDArray[np.int64]:
        """Return [3, L] positions of one sample.

        Args:
            tokens: [L] ids. A sample may end within a picture.
            grids: of its pictures, in their order.

        Raises:
            ValueError: there are other slots than the grids have.
        """
        slots = np.isin(np.asarray(tokens), self.slot_ids)
        found = np.zeros((AXES, len(slots)), np.int64)
        at = first = 0
        for grid in grids:
            text = int(np.argmax(slots[at:])) if slots[at:].any() else len(slots) - at
            found[:, at : at + text] = first + np.arange(text)
            at, first = at + text, first + text
            end = min(at + grid.tokens, len(slots))
            if not slots[at:end].all():
                raise ValueError(f"{grid} has {grid.tokens} slots, and the sample has not as many at {at}")
            own = grid_positions(grid)
            found[:, at:end] = first + own[:, : end - at]
            first += int(own.max()) + 1 if self.after_film == "longest" else max(grid.rows, grid.columns)
            at = end
        if slots[at:].any():
            raise ValueError(f"the sample has slots of pictures at {at} or later, for which there are no grids")
        found[:, at:] = first + np.arange(len(slots) - at)
        return found

    def pack(
        self, samples: Sequence[ArrayLike], grids: Sequence[Sequence[TokenGrid]], length: int
    ) -> NDArray[np.int64]:
        """Return [.., S] positions of a pack of S = ``length``: each sample's own, and its padding's from 0."""
        return padded([self.of(tokens, own) for tokens, own in zip(samples, grids, strict=True)], length, self.lead)


@dataclass(frozen=True)
class SharedPositions(OwnPositions):
    """One number a token: the slots of a picture share one, but for the first and the last of them.

    As ``build_position_ids`` of CogVLM's published code (THUDM/CogVLM), where those two stand for the learned vectors
    that begin and end a picture. Pictures with nothing between them are one there, and here.
    """

    @property
    def lead(self) -> tuple[int, ...]:
        """There is one number."""
        return ()

    @property
    def on_grids(self) -> bool:
        """Where a feature lies in its picture does not matter."""
        return False

    def of(self, tokens: ArrayLike, grids: Sequence[TokenGrid] = ()) -> NDArray[np.int64]:
        """Return [L] positions of one sample; ``grids`` are not looked at."""
        slots = np.isin(np.asarray(tokens), self.slot_ids)
        # The third slot of a run, and those behind it but the last, are where the one before them is.
        stays = np.zeros(len(slots), np.bool_)
        stays[2:-1] = slots[:-3] & slots[1:-2] & slots[2:-1] & slots[3:]
        steps = (~stays).astype(np.int64)
        steps[:1] = 0
        return np.cumsum(steps)


def positions_of(model: ModelConfig, image_token_id: int) -> OwnPositions | None:
    """Return how a model's positions are made; None where they are counted from 0 in each sample."""
    if model.language.shared_positions:
        return SharedPositions((image_token_id,))
    after = model.video.positions_after
    return OwnPositions((image_token_id,), after) if model.language.position_axes > 1 else None


def grid_positions(grid: TokenGrid) -> NDArray[np.int64]:
    """Return [3, tokens] of a picture or film, from 0."""
    # In fp32, and rounded down, as Transformers does.
    times = (np.arange(grid.frames, dtype=np.float32) * np.float32(grid.step)).astype(np.int64)
    axes = np.meshgrid(times, np.arange(grid.rows), np.arange(grid.columns), indexing="ij")
    return np.stack(axes).reshape(AXES, -1)


def text_positions(count: int, first: int = 0, lead: Sequence[int] = (AXES,)) -> NDArray[np.int64]:
    """Return [.., count] of text alone, with the dimensions ``lead`` in front."""
    return np.tile(first + np.arange(count, dtype=np.int64), (*lead, 1))


def padded(parts: Sequence[NDArray[np.int64]], length: int, lead: Sequence[int]) -> NDArray[np.int64]:
    """Return positions [.., L] one after the other, ``length`` of them, with padding from 0 behind."""
    rest = length - sum(part.shape[-1] for part in parts)
    return np.concatenate([*parts, text_positions(rest, lead=lead)], axis=-1)


def continued(positions: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Return ``positions`` [.., L], with those of ``count`` tokens of text behind them."""
    first = int(positions.max()) + 1 if positions.size else 0
    return np.concatenate([positions, text_positions(count, first, positions.shape[:-1])], axis=-1)


def own_grids(model: ModelConfig, layouts: Sequence[ImageLayout]) -> tuple[TokenGrid, ...]:
    """Return :func:`grids_of` where the model's positions have rows and columns; else none."""
    return grids_of(plan_of(model), layouts) if model.language.position_axes > 1 else ()


def grids_of(plan: ImagePlan, layouts: Sequence[ImageLayout]) -> tuple[TokenGrid, ...]:
    """Return the grids of several pictures and films."""
    found: list[TokenGrid] = []
    for layout in layouts:
        maker: Any = plan.maker(layout)
        found += maker.token_grids(layout)
    return tuple(found)
