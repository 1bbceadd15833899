"""Causal attention with spans whose positions also see what comes after them in the span.

Which spans a pack has follows from its model's mask kind (:mod:`megavlm.data.spans`): what stands in front of an answer
(PaliGemma, arXiv 2407.07726, section 3.2), or each picture (Gemma 3, arXiv 2503.19786). The mask of a segment is
AND(window, OR(causal, same span)), whatever the kind; another kind is other spans.

So the keys of a query are always one stretch: a position outside of spans sees up to itself, one in a span up to the
span's end. In torch, attention goes on by such stretches; kernels for packs take all of them in two calls.

Shape legend: T tokens of a pack, N query heads and G key/value heads of this tensor-parallel rank, D width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megavlm.layers.attention import TorchAttention
from megavlm.layers.segments import segment_lengths, to_device, two_way_plans, two_way_spans
from megavlm.parallel.context import ContextSplit

Span = tuple[int, int]
"""First position, and the one behind the last."""


@dataclass(frozen=True)
class Stretch:
    """Queries of a segment that go through attention together."""

    start: int
    """First query."""
    stop: int
    """The one behind the last query."""
    first: int
    """First key that any of them sees."""
    last: int
    """The one behind the last key."""
    two_way: bool
    """Whether all of them see up to ``last``; else each up to itself."""


def stretches(lengths: Sequence[int], spans: Sequence[Span], window: int | None) -> Iterator[Stretch]:
    """Yield the queries of all segments in order, cut so that those of a stretch see nearly the same keys.

    Args:
        lengths: of the segments.
        spans: ascending, none across a border.
        window: positions that each sees at most, itself and those behind it in its span apart; None for all.

    Raises:
        AssertionError: a span crosses a border, or another span.
    """
    waiting, start = list(reversed(spans)), 0
    for length in lengths:
        end, at = start + length, start
        while at < end:
            assert not waiting or waiting[-1][0] >= at, f"the span {waiting[-1]} lies in another"
            inside = bool(waiting) and waiting[-1][0] == at
            stop = min(waiting[-1][1 if inside else 0], end) if waiting else end
            if inside:
                assert waiting.pop()[1] == stop, f"a span crosses the border at {end}"
            step = stop - at if window is None else window
            for one in range(at, stop, step):
                behind = min(one + step, stop)
                first = start if window is None else max(start, one - window + 1)
                yield Stretch(one, behind, first, stop if inside else behind, inside)
            at = stop
        start = end
    assert not waiting, f"spans {waiting[::-1]} lie behind the last segment"


def own_stretches(parts: Sequence[Stretch], split: ContextSplit) -> Iterator[list[Stretch]]:
    """Yield, segment by segment, what of ``parts`` is a context-parallel rank's to attend from, in its own order."""
    for begin, length in zip(split.cu_seqlens.tolist(), split.lengths, strict=False):
        found = []
        for chunk in split.chunks(length):
            low, high = begin + chunk[0], begin + chunk[1]
            for one in parts:
                start, stop = max(one.start, low), min(one.stop, high)
                if start < stop:
                    found.append(replace(one, start=start, stop=stop, last=one.last if one.two_way else stop))
        yield found


@dataclass(frozen=True)
class Calls:
    """The two calls of a kernel for packs: what goes in, on the device."""

    tail_rows: Tensor | None
    """[R] queries that see up to themselves: all of a segment behind a span that it begins with. None for all."""
    tail_borders: Tensor
    """[G + 1] int32 of them in the segments."""
    longest_tail: int
    span_rows: Tensor
    """[Q] queries in spans."""
    span_borders: Tensor
    """[K + 1] int32 of them in the spans."""
    longest_span: int
    span_keys: Tensor
    """[L] the keys of each span, up to its end."""
    key_borders: Tensor
    """[K + 1] int32 of them."""
    most_keys: int


def plan_calls(lengths: Sequence[int], spans: Sequence[Span], window: int | None, device: torch.device) -> Calls:
    """Return what the two calls take."""
    starts = np.cumsum([0, *lengths])
    begins = dict(spans)
    tails = [(begins.get(int(a), int(a)), int(b)) for a, b in pairwise(starts)]
    segments = starts[np.searchsorted(starts, [a for a, _ in spans], side="right") - 1]
    keys = [
        (int(own) if window is None else max(int(own), a - window + 1), b)
        for own, (a, b) in zip(segments, spans, strict=True)
    ]

    def rows(stretched: Sequence[Span]) -> Tensor:
        found = [np.arange(a, b, dtype=np.int64) for a, b in stretched]
        return to_device(torch.from_numpy(np.concatenate(found)), device)

    def borders(stretched: Sequence[Span]) -> Tensor:
        return to_device(torch.from_numpy(np.cumsum([0, *(b - a for a, b in stretched)]).astype(np.int32)), device)

    return Calls(
        tail_rows=None if all(a == s for (a, _), s in zip(tails, starts, strict=False)) else rows(tails),
        tail_borders=borders(tails),
        longest_tail=max(b - a for a, b in tails),
        span_rows=rows(spans),
        span_borders=borders(spans),
        longest_span=max(b - a for a, b in spans),
        span_keys=rows(keys),
        key_borders=borders(keys),
        most_keys=max(b - a for a, b in keys),
    )


class TwoWayAttention(TorchAttention):
    """Attention of packs that were told their spans (:func:`megavlm.layers.segments.packed_segments`).

    Arguments as of :class:`megavlm.layers.attention.TorchAttention`, whose mask type must be causal.

    Raises:
        ValueError: the input is no pack, or one whose spans nobody told.
    """

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None, attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:  # fmt: skip
        """Attend; ``query`` is [T, N, D], ``key`` and ``value`` are [T, G, D]. Returns [T, N, D]."""
        if packed_seq_params is None or two_way_spans(packed_seq_params) is None:
            raise ValueError("TwoWayAttention takes packs with spans: make_pack(.., spans=spans_of(model, ..))")
        return super().forward(query, key, value, attention_mask, attn_mask_type, attention_bias, packed_seq_params)

    def _packed(
        self, query_TND: Tensor, key_TGD: Tensor, value_TGD: Tensor, causal: bool, packed: PackedSeqParams
    ) -> Tensor:
        spans = two_way_spans(packed)
        if not spans or not causal:
            return super()._packed(query_TND, key_TGD, value_TGD, causal, packed)
        if self.takes_kernel(query_TND):
            return self._two_calls(query_TND, key_TGD, value_TGD, packed)
        lengths = segment_lengths(packed)
        # Split, and not sliced: a slice's gradient is as long as the pack, and there are many of them.
        total, parts, begin = sum(lengths), list(stretches(lengths, spans, self.sliding_window)), 0
        queries = iter(query_TND[:total].split([one.stop - one.start for one in parts]))
        found: list[Tensor] = []
        waiting = list(reversed(parts))
        for key, value in zip(key_TGD[:total].split(lengths), value_TGD[:total].split(lengths), strict=True):
            key_1GSD, value_1GSD = (one.transpose(0, 1).unsqueeze(0) for one in (key, value))
            while waiting and waiting[-1].start < begin + key.size(0):
                query_1NQD = next(queries).transpose(0, 1).unsqueeze(0)
                context_1NQD = self._stretch(query_1NQD, key_1GSD, value_1GSD, begin, waiting.pop())
                found.append(context_1NQD.squeeze(0).transpose(0, 1))
            begin += key.size(0)
        rest = query_TND.size(0) - total
        return torch.cat([*found, query_TND.new_zeros(rest, *query_TND.shape[1:])] if rest else found)

    def _cut(
        self, query_PND: Tensor, key_LGD: Tensor, value_LGD: Tensor, packed: PackedSeqParams, split: ContextSplit
    ) -> Tensor:
        """Return [P, N, D] of a rank's positions; without the kernels for packs, as two calls know whole packs only."""
        spans = two_way_spans(packed)
        if not spans:
            return super()._cut(query_PND, key_LGD, value_LGD, packed, split)
        lengths, found, begin = split.lengths, [], 0
        segments = list(own_stretches(list(stretches(lengths, spans, self.sliding_window)), split))
        queries = iter(query_PND.split([one.stop - one.start for own in segments for one in own]))
        for own, key, value in zip(segments, key_LGD.split(lengths), value_LGD.split(lengths), strict=True):
            key_1GSD, value_1GSD = (one.transpose(0, 1).unsqueeze(0) for one in (key, value))
            for one in own:
                query_1NQD = next(queries).transpose(0, 1).unsqueeze(0)
                context_1NQD = self._stretch(query_1NQD, key_1GSD, value_1GSD, begin, one)
                found.append(context_1NQD.squeeze(0).transpose(0, 1))
            begin += key.size(0)
        return torch.cat(found)

    def _stretch(self, query_1NQD: Tensor, key_1GSD: Tensor, value_1GSD: Tensor, begin: int, one: Stretch) -> Tensor:
        """Return [1, N, Q, D] of a stretch's queries, given the keys of its segment, which begins at ``begin``."""
        window = self.sliding_window
        cut = window is not None and one.stop - one.first > window
        alone = one.first == one.start and not one.two_way and not cut
        mask = None
        if not alone and (cut or not one.two_way):
            rows = torch.arange(one.start, one.stop, device=query_1NQD.device)[:, None]
            columns = torch.arange(one.first, one.last, device=query_1NQD.device)
            mask = columns > rows - window if cut and window is not None else columns > -1
            if not one.two_way:
                mask = mask & (columns <= rows)
        return F.scaled_dot_product_attention(
            query_1NQD,
            key_1GSD[:, :, one.first - begin : one.last - begin],
            value_1GSD[:, :, one.first - begin : one.last - begin],
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=alone,
            scale=self.softmax_scale,
            enable_gqa=query_1NQD.size(1) != key_1GSD.size(1),
        )

    def _two_calls(self, query_TND: Tensor, key_TGD: Tensor, value_TGD: Tensor, packed: PackedSeqParams) -> Tensor:
        """Attend by two calls for packs: from outside of spans causally, and from spans to all up to their ends.

        Kernels for packs align the last query of a segment with its last key, so that both ask for no mask. Spans that
        do not begin a segment are in the first call too, and what that says of them is written over.
        """
        lengths, window = segment_lengths(packed), self.sliding_window
        plans = two_way_plans(packed)
        if window not in plans:
            plans[window] = plan_calls(lengths, two_way_spans(packed) or [], window, query_TND.device)
        calls: Calls = plans[window]
        total, left = sum(lengths), -1 if window is None else window - 1
        context_TND = torch.zeros_like(query_TND)
        if calls.longest_tail:
            tail = query_TND[:total] if calls.tail_rows is None else query_TND.index_select(0, calls.tail_rows)
            found = self.kernel(
                tail, key_TGD[:total], value_TGD[:total], calls.tail_borders, packed.cu_seqlens_q,
                calls.longest_tail, max(lengths), (left, 0),
            )  # fmt: skip
            if calls.tail_rows is None:
                context_TND = F.pad(found, (0, 0, 0, 0, 0, query_TND.size(0) - total))
            else:
                context_TND = context_TND.index_copy(0, calls.tail_rows, found)
        found = self.kernel(
            query_TND.index_select(0, calls.span_rows),
            key_TGD.index_select(0, calls.span_keys),
            value_TGD.index_select(0, calls.span_keys),
            calls.span_borders, calls.key_borders, calls.longest_span, calls.most_keys, (left, -1),
        )  # fmt: skip
        return context_TND.index_copy(0, calls.span_rows, found)
