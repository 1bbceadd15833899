"""Language layers that attend to text, and then to features of pictures (CogAgent, arXiv 2312.08914, section 2.2).

Behind self-attention, and in front of the MLP, each layer has a norm, and attention to features that no token stands
for: those of a second, finer view of the picture, whose first view lies among the tokens. There is no gate, and heads
are narrower than those of self-attention.

Every position of a sample sees all features of the sample's pictures, those in front of the picture too, as in
``CrossAttention`` of THUDM/cogagent-chat-hf's modeling file, whose mask is of zeros. A sample without pictures sees
nothing, and its positions are not changed. (There a sample has one picture; of several, all are seen from everywhere.)

Shape legend: S positions of a pack, F rows of features of all its pictures and what fills them up for sequence
parallelism, C width of a feature, E width of the model.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megavlm.layers.cross import PictureAttention, Sight, tell_sights
from megavlm.layers.segments import segment_lengths, two_way_spans
from megavlm.layers.visual_expert import VisualExpertLayer


def slots_of_samples(packed: PackedSeqParams) -> list[int]:
    """Return how many slots of pictures each segment of a pack has; none where nobody told its spans."""
    spans = two_way_spans(packed)
    if spans is None:
        return []
    starts = np.cumsum([0, *segment_lengths(packed)])
    found = np.zeros(len(starts) - 1, np.int64)
    for start, stop in spans:
        found[np.searchsorted(starts, start, side="right") - 1] += stop - start
    return [int(one) for one in found]


def tell_samples(packed: PackedSeqParams, slots: int, rows: int) -> None:
    """Say which features each segment of a pack sees.

    Args:
        packed: the pack, with its spans.
        slots: of one picture among the tokens.
        rows: of its features.

    Raises:
        ValueError: a segment has a part of a picture.
    """
    counts, found, first = slots_of_samples(packed), list[Sight](), 0
    if any(one % slots for one in counts):
        raise ValueError(f"segments have {counts} slots of pictures, and each picture has {slots}")
    borders = np.cumsum([0, *segment_lengths(packed)]).tolist()
    for (start, stop), count in zip(pairwise(borders), (one // slots for one in counts), strict=False):
        if count:
            found.append(Sight(start, stop, first, first + count))
        first += count
    tell_sights(packed, found, [rows] * first)


class FeatureAttention(PictureAttention):
    """:class:`PictureAttention` as Megatron-Core's layer calls it."""

    packed: PackedSeqParams | None = None

    def forward(  # type: ignore[override]
        self, hidden_S1E: Tensor, *, key_value_states: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, None]:
        """Return [S, 1, E], zeros for positions that see nothing, and no bias.

        Args:
            hidden_S1E: the text; with sequence parallelism this rank's rows, as are the features.
            key_value_states: [F, 1, C] features; None where answers go on, or no picture is there.
        """
        packed = self.packed
        assert packed is not None, "the layer says which pack it is"
        going_on = self.kept is not None and self.kept.goes_on
        if key_value_states is None and not going_on:
            return hidden_S1E * 0.0, None
        return super().forward(hidden_S1E, key_value_states, packed), None


class FeatureLayer(VisualExpertLayer):
    """A layer with a visual expert that attends to features too."""

    def forward(self, *args: Any, packed_seq_params: Any = None, **kwargs: Any) -> Any:
        """Run the layer; arguments as of Megatron-Core's, ``context`` are the features [F, 1, C]."""
        self.cross_attention.packed = packed_seq_params
        return super().forward(*args, packed_seq_params=packed_seq_params, **kwargs)
