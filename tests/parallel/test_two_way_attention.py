"""Attention with spans that are seen both ways equals softmax attention written out, forward and backward."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from test_attention import HEADS, WIDTH, compare, naive, random
from torch import Tensor

from megavlm.config.schema import ParallelConfig
from megavlm.layers.segments import packed_segments
from megavlm.layers.two_way import TwoWayAttention, stretches
from megavlm.parallel.state import process_groups

LENGTHS, REST = [9, 1, 14, 6], 2
SPANS = {
    "none": [],
    "prefix": [(0, 5), (9, 10), (10, 17), (24, 30)],
    "pictures": [(2, 5), (5, 8), (10, 14), (16, 22), (23, 24)],
}


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    with process_groups(ParallelConfig(), seed=1):
        yield


class TwoCalls(TwoWayAttention):
    """The form for kernels, whose call is written out from flash-attention's definition (github.com/Dao-AILab).

    "If causal or a window, the mask is aligned to the bottom right corner", and a query sees so many keys before and
    behind its own as the window says, all for -1.
    """

    def takes_kernel(self, query_TND: Tensor) -> bool:
        return True

    def kernel(
        self, query_TND: Tensor, key_LGD: Tensor, value_LGD: Tensor, borders: Tensor, key_borders: Tensor,
        longest: int, most_keys: int, window: tuple[int, int],
    ) -> Tensor:  # fmt: skip
        assert longest == int(borders.diff().max()) and most_keys == int(key_borders.diff().max())
        parts = []
        for (a, b), (c, d) in zip(
            itertools.pairwise(borders.tolist()), itertools.pairwise(key_borders.tolist()), strict=True
        ):
            own = torch.arange(b - a)[:, None] + (d - c) - (b - a)
            keys = torch.arange(d - c)
            before, behind = window
            allowed = (keys >= (own - before if before >= 0 else 0)) & (keys <= (own + behind if behind >= 0 else d))
            parts.append(naive(query_TND[a:b, None], key_LGD[c:d, None], value_LGD[c:d, None], allowed)[:, 0])
        assert len(query_TND) == int(borders[-1]) and len(key_LGD) == int(key_borders[-1])
        return torch.cat(parts)


def attention(kind: type[TwoWayAttention], groups: int, window: int | None) -> TwoWayAttention:
    """Build the core attention."""
    config = TransformerConfig(
        num_layers=1, hidden_size=HEADS * WIDTH, num_attention_heads=HEADS, num_query_groups=groups,
        attention_dropout=0.0, use_cpu_initialization=True,
    )  # fmt: skip
    return kind(config, 1, AttnMaskType.causal, "self", sliding_window=window)


def allowed(lengths: list[int], spans: list[tuple[int, int]], window: int | None) -> Tensor:
    """AND(same segment, window, OR(causal, same span)), pair by pair."""
    total = sum(lengths)
    segment = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    span = -torch.ones(total)
    for number, (a, b) in enumerate(spans):
        span[a:b] = number
    query, key = torch.arange(total)[:, None], torch.arange(total)
    found = (key <= query) | ((span[:, None] == span) & (span >= 0))
    return found & (segment[:, None] == segment) & (key > query - (window or total))


@pytest.mark.parametrize("groups", [4, 1])
@pytest.mark.parametrize("window", [None, 1, 4, 12])
@pytest.mark.parametrize("spans", SPANS.values(), ids=list(SPANS))
@pytest.mark.parametrize("kind", [TwoWayAttention, TwoCalls])
def test_equals_attention_written_out(
    kind: type[TwoWayAttention], spans: list[tuple[int, int]], window: int | None, groups: int
) -> None:
    if kind is TwoCalls and not spans:
        pytest.skip("without spans it is causal attention, whose kernel a CPU has not")
    total = sum(LENGTHS)
    packed = packed_segments(np.cumsum([0, *LENGTHS]).astype(np.int32), torch.device("cpu"), spans=spans)
    q, k, v = (random(total + REST, heads, WIDTH) for heads in (HEADS, groups, groups))
    core = attention(kind, groups, window)
    for _ in range(2):  # the second layer of a pack takes what the first has planned
        got = core(q, k, v, packed_seq_params=packed)
    assert torch.equal(got[total:], torch.zeros(REST, HEADS, WIDTH)), "what follows the last segment is zero"
    expected = naive(*(t[:total, None] for t in (q, k, v)), allowed(LENGTHS, spans, window))[:, 0]
    compare(got[:total], expected, [q, k, v])


def test_spans_lie_in_segments_and_not_in_each_other() -> None:
    for spans in ([(7, 11)], [(2, 6), (4, 8)], [(29, 31)], [(31, 33)]):
        with pytest.raises(AssertionError, match="span"):
            list(stretches(LENGTHS, spans, None))


def test_packs_without_spans_are_refused() -> None:
    """A pack that nobody told its spans is a bug of whoever made it: causal attention would be wrong in silence."""
    q = torch.randn(4, HEADS, WIDTH)
    untold = packed_segments(np.array([0, 4], np.int32), torch.device("cpu"))
    borders = torch.tensor([0, 4], dtype=torch.int32)
    made_elsewhere = PackedSeqParams(qkv_format="thd", cu_seqlens_q=borders, cu_seqlens_kv=borders)
    for packed in (None, untold, made_elsewhere):
        with pytest.raises(ValueError, match="packs with spans"):
            attention(TwoWayAttention, HEADS, None)(q, q, q, packed_seq_params=packed)
