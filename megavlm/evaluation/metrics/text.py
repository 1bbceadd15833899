"""Scores of one short text against references: exact match, ANLS, relaxed accuracy, MMMU's open answers."""

from __future__ import annotations

import re
from collections.abc import Sequence

_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+\.\d+|\.\d+|\d+)(?:[eE][+-]?\d+)?")


def exact(prediction: str, answers: Sequence[str]) -> float:
    """1 where an answer is the same but for case and surrounding white space."""
    said = prediction.strip().lower()
    return float(any(said == answer.strip().lower() for answer in answers))


def edit_distance(first: str, second: str) -> int:
    """Levenshtein distance: insertions, deletions and substitutions of characters."""
    row = list(range(len(second) + 1))
    for i, left in enumerate(first, 1):
        before, row[0] = row[0], i
        for j, right in enumerate(second, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (left != right))
    return row[-1]


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Similarity to the nearest answer (Biten et al. 2019): 1 - distance / longer length, 0 below 0.5.

    Case and white space around and between words do not count, but the lengths are those of the whole texts, as in
    the scorer of the Robust Reading Competition.
    """
    said = " ".join(prediction.lower().split())
    best = 0.0
    for answer in answers:
        true = " ".join(answer.lower().split())
        longest = max(len(prediction), len(answer))
        best = max(best, 1 - edit_distance(said, true) / longest if longest else 1.0)
    return best if best >= 0.5 else 0.0


def relaxed(prediction: str, answers: Sequence[str], tolerance: float = 0.05) -> float:
    """1 where the number is within ``tolerance`` of the target, or the text is the same but for case.

    ChartQA (Masry et al. 2022, section 5.1). The tolerance is a share of the target, not of the prediction. A
    number may end in "%", which divides it by 100. Where the target is 0 the texts must be the same.
    """
    return float(any(_relaxed_one(prediction.strip(), answer.strip(), tolerance) for answer in answers))


def _relaxed_one(prediction: str, target: str, tolerance: float) -> bool:
    said, true = _to_float(prediction), _to_float(target)
    if said is not None and true:
        return abs(said - true) / abs(true) <= tolerance
    return prediction.lower() == target.lower()


def _to_float(text: str) -> float | None:
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def open_answer(prediction: str, answers: Sequence[str]) -> float:
    """MMMU's rule for open questions (its eval/eval_utils.py), on the whole prediction.

    An answer that is a number must be among the prediction's numbers, rounded to two decimals; one that is text must
    be in the prediction, as a word of its own if it is a single letter.
    """
    said = prediction.strip().lower()
    numbers = {round(value, 2) for value in map(_plain_number, _NUMBER.findall(said)) if value is not None}
    for answer in answers:
        value = _plain_number(answer.strip())
        text = answer.strip().lower()
        if value is not None:
            if round(value, 2) in numbers:
                return 1.0
        elif len(text) == 1:
            if text in said.split():
                return 1.0
        elif text and text in said:
            return 1.0
    return 0.0


def _plain_number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None
