"""Scores of one short text against references: exact match, ANLS, relaxed accuracy, MMMU's open answers."""

from __future__ import annotations

import re
from collections.abc import Sequence

# MMMU's numbers: with thousands separators, with an exponent, and plain.
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?e[+-]?\d+"),
    re.compile(r"-?(?:\d*\.\d+|\d+\b)(?!e[+-]?\d)(?![,\d])"),
)
_KEY_WORDS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NO_PART = tuple(":,.!?;'")


def exact(prediction: str, answers: Sequence[str]) -> float:
    """1 where an answer is the same but for case and surrounding white space."""
    said = prediction.strip().lower()
    return float(any(said == answer.strip().lower() for answer in answers))


def contains(prediction: str, answers: Sequence[str]) -> float:
    """1 where an answer occurs in the prediction, but for case and white space; not within a longer word or number.

    The borders of words are those of Latin letters and digits: Chinese is written without.
    """
    said = " ".join(prediction.lower().split())
    for answer in answers:
        wanted = " ".join(answer.lower().split())
        before = r"(?<![a-z0-9])" if wanted[:1].isalnum() and wanted[:1].isascii() else ""
        after = r"(?![a-z0-9])" if wanted[-1:].isalnum() and wanted[-1:].isascii() else ""
        if wanted and re.search(f"{before}{re.escape(wanted)}{after}", said):
            return 1.0
    return 0.0


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
    """MMMU's rule for open questions (its eval/eval_utils.py).

    Of each line of the prediction, what comes after the last "is", "answer", "so" and their like counts, or the whole
    prediction where no line has one. An answer that is a number must be among the numbers there, rounded to two
    decimals; one that is text must occur there, a single letter with a space beside it.
    """
    said: set[str | float] = set()
    for part in _key_parts(prediction.strip().strip(".").lower()):
        for found in (part, *(match for kind in _NUMBERS for match in kind.findall(part))):
            said.update(_normal(found))
    texts = [one for one in said if isinstance(one, str)]
    wanted = [one for answer in answers for one in _normal(answer)]
    return float(any(any(one in text for text in texts) if isinstance(one, str) else one in said for one in wanted))


def _key_parts(text: str) -> list[str]:
    """The parts of a text that may hold the answer: of each line the shortest tail after a key word."""
    lines, parts = text.split("\n"), []
    for number, line in enumerate(lines, 1):
        words = _KEY_WORDS if number < len(lines) else (*_KEY_WORDS, "=")
        best = ""
        for tail in (line.rpartition(word)[2].strip() for word in words if word in line):
            if not best or len(tail) < len(best):
                best = tail
        if best and best not in _NO_PART:
            parts.append(best)
    return parts or [text]


def _normal(text: str) -> list[str | float]:
    """A number to two decimals; a text in lower case; a single letter with a space on one of its sides."""
    text = text.strip()
    value = _plain_number(text)
    if value is not None:
        return [round(value, 2)]
    return [f" {text.lower()}", f"{text.lower()} "] if len(text) == 1 else [text.lower()]


def _plain_number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None
