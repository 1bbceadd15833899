"""Choosing tokens, held against Transformers' own processors of logits and against the wanted frequencies."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from megavlm.inference.choice import choose, filtered, log_probabilities
from megavlm.inference.sampling import NO_TOKEN, Sampling


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
    "wrong",
    [
        {"temperature": -1.0}, {"temperature": math.inf}, {"temperature": math.nan}, {"temperature": 1e7},
        {"top_p": -0.1}, {"top_p": 1.5}, {"top_p": math.nan}, {"top_k": -1},
        {"repetition_penalty": 0.0}, {"repetition_penalty": math.inf}, {"repetition_penalty": math.nan},
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)


ROWS = {
    "usual": logits(1)[0],
    "equal": torch.zeros(50),
    "huge": logits(1)[0] * 1e37,
    "tiny": logits(1)[0] * 1e-40,
    "few": logits(1)[0].masked_fill(torch.arange(50) > 3, -math.inf),
    "one": torch.full((50,), -math.inf).index_fill(0, torch.tensor([7]), 0.0),
}


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-300, 1e-45, 1e-38, 1e-10, 1e-5, 1e-4, 0.7, 1e6])
@pytest.mark.parametrize("penalty", [1.0, 5e-324, 1e-300, 1e-45, 0.5, 1e45, 1e300])
def test_whatever_is_accepted_chooses_a_token(temperature: float, penalty: float) -> None:
    for row in ROWS.values():
        for kind in ({}, {"top_p": 0.0}, {"top_p": 5e-324}, {"top_k": 1}, {"top_k": 10**400, "top_p": 0.5}):
            sampling = Sampling(temperature=temperature, repetition_penalty=penalty, **kind)
            token = int(choose(row[None], sampling, [[7, 3, 7]], [sampling.generator(0)]))
            assert 0 <= token < 50 and row[token] > -math.inf
            if penalty == 1.0 and row is not ROWS["equal"] and (temperature < 1 or row is not ROWS["tiny"]):
                greedy = temperature < 1e-5 or kind.get("top_k") == 1 or kind.get("top_p", 1) < 0.1
                assert not greedy or token == int(row.argmax())


def test_a_tiny_penalty_takes_the_best_token_that_was_there() -> None:
    row = torch.tensor([[5.0, 1.0, 2.0, -1.0]])
    for penalty in (1e-6, 1e-45, 1e-300, 5e-324):
        assert int(choose(row, Sampling(repetition_penalty=penalty), [[1, 2]], [])) == 2
        assert int(choose(row, Sampling(repetition_penalty=penalty, temperature=1.0), [[1, 2]], [_generator()])) == 2


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_ends_alone(wrong: float) -> None:
    kinds = [
        Sampling(),
        Sampling(temperature=1.0, seed=1),
        Sampling(temperature=1.0, top_p=0.5, repetition_penalty=2.0),
    ]
    rows = logits(3)
    for kind in [*kinds, kinds]:  # one kind for all, and one for each
        each = kind if isinstance(kind, list) else [kind] * 3
        alone = [int(choose(rows[i : i + 1], each[i], [[3]], [each[i].generator(0)])) for i in range(3)]
        for bad in range(3):
            damaged = rows.clone()
            damaged[bad, :] = wrong
            if wrong != -math.inf:  # one is enough
                damaged[bad, 1:] = rows[bad, 1:]
            chosen = choose(damaged, kind, [[3]] * 3, [one.generator(0) for one in each]).tolist()
            assert chosen == [NO_TOKEN if i == bad else alone[i] for i in range(3)]


def test_log_probabilities_are_the_models_own() -> None:
    chosen = torch.tensor([4, NO_TOKEN])
    said = log_probabilities(logits(2), chosen, 3)
    logs = logits(2).log_softmax(-1)
    assert said.shape == (2, 8) and said[:, 0].tolist() == [4, NO_TOKEN]
    assert float(said[0, 1]) == pytest.approx(float(logs[0, 4]))
    assert said[0, 2:5].tolist() == logs[0].topk(3).indices.tolist()
    torch.testing.assert_close(said[0, 5:].float(), logs[0].topk(3).values)
    assert log_probabilities(logits(2), chosen, 0).shape == (2, 2)
