"""How a pack is cut over context-parallel ranks, and attention from the end of a segment."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from megavlm.layers.context_attention import chunk_call, lower_right
from megavlm.layers.two_way import own_stretches, stretches
from megavlm.parallel.context import ContextSplit, filled_length, split_context

CPU = torch.device("cpu")
LENGTHS = [7, 1, 24, 5, 2, 33]


def splits(size: int, lengths: list[int] = LENGTHS, more: int = 0) -> list[ContextSplit]:
    bounds = np.cumsum([0, *lengths]).astype(np.int32)
    length = filled_length(bounds, size, 2) + more
    return [split_context(bounds, size, rank, length) for rank in range(size)]


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_every_position_is_on_one_rank(size: int) -> None:
    """Also of segments that are shorter than the ranks are many; what fills up is the rest."""
    every = splits(size)
    total = sum(LENGTHS)
    held = np.concatenate([one.rows[one.real] for one in every])
    assert sorted(held.tolist()) == list(range(total))
    assert len({len(one.rows) for one in every}) == 1 and len(every[0].rows) % 2 == 0
    gathered = np.concatenate([one.rows for one in every])
    order = every[0].order(CPU).numpy()
    assert sorted(order.tolist()) == list(range(len(gathered)))
    bounds = np.cumsum([0, *LENGTHS])
    for segment, (start, stop) in enumerate(pairwise(bounds)):
        begin, end = every[0].cu_seqlens[segment : segment + 2]
        expected = np.minimum(np.arange(start, start + end - begin), stop - 1)  # the last one is said again
        assert gathered[order[begin:end]].tolist() == expected.tolist()
        assert (end - begin) % (2 * size) == 0
        for position in range(start, stop):
            assert every[0].moved(position, bounds.tolist()) == begin + position - start
    assert (every[0].places(CPU)[torch.from_numpy(order)] == torch.arange(len(order))).all()


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_have_equally_much_to_attend_to(size: int) -> None:
    pairs = []
    for one in splits(size, [24, 48, 240]):
        chunks = [chunk for length in one.lengths for chunk in one.chunks(length)]
        pairs.append(sum(stop * (stop + 1) // 2 - start * (start + 1) // 2 for start, stop in chunks))
    assert max(pairs) == pytest.approx(min(pairs), rel=0.03)


def test_the_last_segment_takes_what_is_over() -> None:
    one, other = splits(2)[0], splits(2, more=16)[0]
    assert other.cu_seqlens[:-1].tolist() == one.cu_seqlens[:-1].tolist()
    assert other.cu_seqlens[-1] == one.cu_seqlens[-1] + 16
    assert other.real.sum() + splits(2, more=16)[1].real.sum() == sum(LENGTHS)
    with pytest.raises(AssertionError, match="do not fill"):
        split_context(np.array([0, 9], np.int32), 2, 0, 8)


def masked(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, scale: float | None) -> Tensor:
    several = query.size(1) // key.size(1)
    key, value = (one.repeat_interleave(several, 1) for one in (key, value))
    scores = query @ key.transpose(2, 3) * (scale or query.size(3) ** -0.5)
    return scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ value


@pytest.mark.parametrize(("queries", "keys"), [(6, 6), (6, 30), (1, 9), (700, 1400)])
@pytest.mark.parametrize("groups", [4, 2])
def test_attention_from_the_end_of_a_segment(queries: int, keys: int, groups: int) -> None:
    torch.manual_seed(queries)
    query, key, value = (
        torch.randn(1, heads, length, 8, dtype=torch.float64).requires_grad_()
        for heads, length in ((4, queries), (groups, keys), (groups, keys))
    )
    allowed = torch.arange(keys) <= torch.arange(keys - queries, keys)[:, None]
    expected, got = masked(query, key, value, allowed, 0.3), lower_right(query, key, value, 0.3)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    weights = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weights).sum(), (query, key, value))
    for one, other in zip(torch.autograd.grad((got * weights).sum(), (query, key, value)), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("size", [2, 3])
def test_what_a_kernel_for_packs_is_told(size: int, window: int | None) -> None:
    """Run as the kernel would: the last query of each chunk is aligned with its last key."""
    for one in splits(size):
        call, at = chunk_call(one, window, CPU), 0
        borders, key_borders = call.borders.tolist(), call.key_borders.tolist()
        for index, (begin, length) in enumerate(
            (begin, length) for begin, length in zip(one.cu_seqlens.tolist(), one.lengths, strict=False) for _ in "12"
        ):
            start, stop = one.chunks(length)[index % 2]
            keys = call.keys[key_borders[index] : key_borders[index + 1]].tolist()
            assert borders[index] == at and borders[index + 1] == at + stop - start
            assert keys[-1] == begin + stop - 1 and keys == list(range(keys[0], keys[-1] + 1))
            assert keys[0] == (begin if window is None else max(begin, begin + start - window + 1))
            at += stop - start
        assert call.longest == max(np.diff(borders)) and call.most_keys == max(np.diff(key_borders))


@pytest.mark.parametrize("window", [None, 4])
def test_stretches_of_a_rank_see_what_those_of_the_pack_do(window: int | None) -> None:
    """Which keys each query sees, with spans both ways that are cut."""
    every, spans = splits(3, [24, 36]), [(2, 9), (30, 41)]
    parts = list(stretches(every[0].lengths, spans, window))

    def seen(found: list) -> dict[int, set[int]]:
        keys: dict[int, set[int]] = {}
        for one in found:
            cut = window is not None and one.stop - one.first > window
            for query in range(one.start, one.stop):
                last = one.last if one.two_way else query + 1
                keys[query] = set(range(max(one.first, query - window + 1) if cut else one.first, last))
        return keys

    together: dict[int, set[int]] = {}
    for one in every:
        for own in own_stretches(parts, one):
            together |= seen(own)
    assert together == seen(parts)
