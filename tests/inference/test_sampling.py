"""Choosing tokens, held against Transformers' own processors of logits and against the wanted frequencies."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from megavlm.inference.sampling import Sampling, choose, filtered


def logits(rows: int = 4, vocabulary: int = 50) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(3)) * 3


@pytest.mark.parametrize(("top_k", "top_p"), [(5, 1.0), (0, 0.8), (0, 0.05), (7, 0.6), (500, 1.0)])
def test_filters_are_theirs(top_k: int, top_p: float) -> None:
    expected = logits()
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    torch.testing.assert_close(filtered(logits(), top_k, top_p), expected)


def test_the_repetition_penalty_is_theirs() -> None:
    seen = [[1, 4, 4, 49], [0], [7, 8], [3]]
    ids = torch.tensor([row + [row[0]] * (4 - len(row)) for row in seen])
    expected = RepetitionPenaltyLogitsProcessor(2.5)(ids, logits()).argmax(-1)
    best = choose(logits(), Sampling(), seen, [])
    seen[0][0] = int(best[0])  # so that it matters
    ids[0, 0] = best[0]
    expected = RepetitionPenaltyLogitsProcessor(2.5)(ids, logits()).argmax(-1)
    assert choose(logits(), Sampling(repetition_penalty=2.5), seen, []).tolist() == expected.tolist()
    assert int(expected[0]) != int(best[0])


def test_a_draw_depends_on_its_own_seed_alone() -> None:
    sampling = Sampling(temperature=1.0, seed=11)
    alone = [choose(logits()[i : i + 1], sampling, [[]], [sampling.generator(i)]).item() for i in range(4)]
    together = choose(logits(), sampling, [[]] * 4, [sampling.generator(i) for i in range(4)]).tolist()
    assert together == alone
    others = [choose(logits()[:1], sampling, [[]], [sampling.generator(i)]).item() for i in range(40)]
    assert len(set(others)) > 3


def test_frequencies_follow_the_temperature() -> None:
    scores = torch.tensor([[0.0, 1.0, 2.0]])
    sampling = Sampling(temperature=2.0)
    generator = sampling.generator(0)
    drawn = [choose(scores, sampling, [[]], [generator]).item() for _ in range(3000)]
    total = sum(math.exp(x / 2) for x in (0, 1, 2))
    for token in range(3):
        assert drawn.count(token) / 3000 == pytest.approx(math.exp(token / 2) / total, abs=0.03)


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}, {"repetition_penalty": 0.0}]
)
def test_values_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)
