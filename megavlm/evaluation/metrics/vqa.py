"""VQA accuracy: how many of ten people gave the answer (Antol et al. 2015; visualqa.org/evaluation.html)."""

from __future__ import annotations

import re
from collections.abc import Sequence

_TO_SPACE_OR_NOTHING = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_WORDS = {"none": "0", **{word: str(value) for value, word in enumerate(_NUMBERS)}}
_ARTICLES = {"a", "an", "the"}
_THOUSANDS = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")

# The contractions that the benchmark restores where an apostrophe was left out.
_CONTRACTED = """
ain't aren't can't couldn't could've couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's i'd've isn't it'd it'd've it'll let's ma'am mightn't mightn't've might've mustn't must've needn't
not've o'clock oughtn't 'ow's'at shan't she'd've shouldn't should've shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've 'twas wasn't we'd've weren't we've what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't wouldn't would've
wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word for word in _CONTRACTED.split() for at, sign in enumerate(word) if sign == "'"
}


def process_answer(answer: str) -> str:
    """Return an answer in the form in which VQA compares answers.

    Punctuation becomes nothing where it stands beside a space, or where the text has a thousands separator, and a
    space elsewhere; periods go unless a digit follows; number words become digits, articles go, lost apostrophes
    come back. Lower case.
    """
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    result, joined = text, _THOUSANDS.search(text) is not None
    for sign in _TO_SPACE_OR_NOTHING:
        beside = f"{sign} " in text or f" {sign}" in text
        result = result.replace(sign, "" if beside or joined else " ")
    words = [_WORDS.get(word, word) for word in _PERIOD.sub("", result).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Mean over leaving one person out of min(1, people left who say the same / 3)."""
    said = process_answer(prediction)
    same = [process_answer(answer) == said for answer in answers]
    total = sum(same)
    return sum(min(1.0, (total - one) / 3) for one in same) / len(same) if same else 0.0
