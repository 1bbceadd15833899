"""What the data path hands to a training step: one pack of samples, ready for the model.

Shape legend (used everywhere): S positions of the pack, G segments (samples, and one of padding where the
pack is not full), N images, C colours, H and W image height and width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megavlm.data.films.film import Film
from megavlm.data.films.plan import FilmShape
from megavlm.data.media import ImageLayout, ImagePlan, ImageShape, TokenGrid, layouts_of
from megavlm.data.positions import OwnPositions
from megavlm.data.spans import TwoWaySpans

IGNORE_INDEX = -100
"""Label of a position that is not trained on (the value that PyTorch and Hugging Face use)."""


class SkippedSample(NamedTuple):
    """A sample that is not trained on."""

    dataset: str
    """Name of its data set."""
    shard: str
    """File that it lies in, in the data set's directory."""
    key: str
    """Its key there."""
    cause: str
    """A short cause, the same for all of its kind."""


@dataclass
class Pack:
    """One micro-batch on the rank that reads it, before its images are decoded."""

    tokens: NDArray[np.int64]
    """[S] token ids; every image slot holds ``<imgpad>``."""
    labels: NDArray[np.int64]
    """[S] the token to predict at each position (already shifted by one within its segment), or IGNORE_INDEX."""
    loss_weights: NDArray[np.float32] | None = field(default=None, kw_only=True)
    """[S] what the loss at each position is multiplied by; None where it is 1 at all."""
    position_ids: NDArray[np.int64]
    """[S] positions, from 0 in each segment; or [3, S], of time, row and column, for models that have these
    (:mod:`megavlm.data.positions`)."""
    two_way_spans: NDArray[np.int64] | None = field(default=None, kw_only=True)
    """[K, 2] where spans start and stop whose positions see each other both ways, or, one for each picture, see it, for
    models that have such (:mod:`megavlm.data.spans`)."""
    cu_seqlens: NDArray[np.int32]
    """[G + 1] where each segment starts, and S at the end; padding is the last segment."""
    segment_sources: NDArray[np.int32]
    """[G] index of each segment's data set in the blend; -1 for padding."""
    images: list[bytes | Film]
    """[N] encoded image files, and films, in the order of their slots in ``tokens``."""
    sample_keys: list[str]
    """Keys of the samples, in order."""
    sample_shards: list[str] = field(default_factory=list)
    """Shards of the samples, in order."""
    image_shapes: list[ImageShape | FilmShape] = field(default_factory=list)
    """[N] what the image plan asks of each image and film; not looked at where it does the same with all
    (``plan.fixed``) and there are no films."""
    restore_key: Any = field(default=None, repr=False)
    """What the reader needs to make this pack again (see :mod:`megavlm.data.reader`)."""
    skipped: list[SkippedSample] = field(default_factory=list)
    """Samples left out on the way to this pack."""

    @property
    def dropped(self) -> dict[str, int]:
        """Number of the samples left out, by cause."""
        return dict(Counter(sample.cause for sample in self.skipped))

    @property
    def padding_tokens(self) -> int:
        """Positions that hold no sample."""
        if self.segment_sources.size and self.segment_sources[-1] == -1:
            return int(self.cu_seqlens[-1] - self.cu_seqlens[-2])
        return 0

    def layouts(self, plan: ImagePlan) -> list[ImageLayout] | None:
        """Return the layout of each image and film; None where all have the same views and tokens."""
        return layouts_of(plan, self.image_shapes)

    @property
    def supervised_tokens(self) -> int:
        """Positions that have a label, whatever it weighs."""
        return int((self.labels != IGNORE_INDEX).sum())


def make_pack(
    tokens: Sequence[ArrayLike],
    length: int,
    *,
    labels: Sequence[ArrayLike] | None = None,
    weights: Sequence[ArrayLike | None] | None = None,
    sources: Sequence[int] | None = None,
    pad_token: int = 0,
    positions: OwnPositions | None = None,
    grids: Sequence[Sequence[TokenGrid]] | None = None,
    spans: TwoWaySpans | None = None,
    prefixes: Sequence[int] | None = None,
    **rest: Any,
) -> Pack:
    """Lay segments out as one pack of S = ``length`` positions.

    Labels are shifted within each segment: a position's label is the label of the next one, and the last position of a
    segment has none. Positions start at 0 in each segment. What is left over is one segment of ``pad_token`` without
    labels.

    Args:
        tokens: ids of each segment.
        length: S, at least as much as the segments have.
        labels: of each segment, one per token, not shifted; None where nothing is to be predicted.
        weights: of each segment, one per token as its label, not shifted; None for 1.
        sources: index of each segment's data set; 0 if not given.
        pad_token: what fills the rest.
        positions: how the model's positions are made, where they are not counted.
        grids: with ``positions``, those of each segment's pictures; None where there are no pictures.
        spans: which positions see each other both ways, where some do.
        prefixes: with ``spans``, how many tokens of each segment stand in front of its answer; if not given, those in
            front of the first label, which are all where there are no labels.
        rest: other fields of :class:`Pack`.

    Raises:
        ValueError: the segments do not fit, or have not as many labels as tokens.
    """
    lengths = [len(np.asarray(one)) for one in tokens]
    origins = list(sources) if sources is not None else [0] * len(lengths)
    used = sum(lengths)
    if used > length:
        raise ValueError(f"{len(lengths)} samples of {used} tokens do not make a pack of {length}")
    if used < length:
        lengths.append(length - used)
        origins.append(-1)
    bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    all_tokens = np.full(length, pad_token, np.int64)
    all_labels = np.full(length, IGNORE_INDEX, np.int64)
    for index, own in enumerate(tokens):
        start, end = bounds[index : index + 2]
        all_tokens[start:end] = own
        if labels is not None:
            if len(np.asarray(labels[index])) != lengths[index]:
                raise ValueError(f"{len(np.asarray(labels[index]))} labels for {lengths[index]} tokens")
            all_labels[start : end - 1] = np.asarray(labels[index])[1:]
    all_weights = None
    if weights is not None and any(own is not None for own in weights):
        all_weights = np.ones(length, np.float32)
        for index, weight in enumerate(weights):
            start, end = bounds[index : index + 2]
            all_weights[start : end - 1] = 1.0 if weight is None else np.asarray(weight, np.float32)[1:]
    return Pack(
        tokens=all_tokens,
        labels=all_labels,
        loss_weights=all_weights,
        position_ids=np.concatenate([np.arange(one, dtype=np.int64) for one in lengths])
        if positions is None
        else positions.pack(tokens, [()] * len(tokens) if grids is None else grids, length),
        two_way_spans=None if spans is None else spans.pack(tokens, prefixes or _prefixes(tokens, labels)),
        cu_seqlens=bounds,
        segment_sources=np.asarray(origins, np.int32),
        **{"images": [], "sample_keys": [], **rest},
    )


def _prefixes(tokens: Sequence[ArrayLike], labels: Sequence[ArrayLike] | None) -> list[int]:
    """Return how many tokens of each segment stand in front of the first that has a label."""
    if labels is None:
        return [len(np.asarray(one)) for one in tokens]
    trained = [np.asarray(one) != IGNORE_INDEX for one in labels]
    return [int(np.argmax(one)) if one.any() else len(one) for one in trained]
