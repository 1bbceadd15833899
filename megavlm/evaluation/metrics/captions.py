"""CIDEr (Vedantam et al. 2015) by pycocoevalcap, with a tokenizer of our own: the usual one is a Java program."""

from __future__ import annotations

import re
from collections.abc import Sequence

_ABBREVIATIONS = "mr|mrs|ms|dr|st|jr|sr|vs|etc|ave|blvd|mt|no|inc|co|corp|ltd|prof|rev|gen|col|capt|lt|sgt|ft|rd|ph\\.d"
# In this order: initials, abbreviations; firms; times, numbers, words that begin with one; years, shortened words,
# tags and addresses; names with dots; words with inner signs; dots, dashes, underscores, any other sign alone.
_TOKEN = re.compile(
    rf"(?i:(?:[a-z]\.)+[a-z]\b(?!\.)|(?:[a-z]\.){{2,}}|\b(?:{_ABBREVIATIONS})\.|(?<![^\W_])[a-z]\.(?!\w))|[A-Z]+(?:&[A-Z]+)+"
    r"|\+?\d+:\d+(?=[ap]m\b)|\+?\d+(?:[.,:/-]\d+)*[^\W_]*(?:-[^\W_]+)*"
    r"|(?i:'\d0s\b|'n'|'(?:em|til|tis|twas|n)\b|[#@][a-z]\w*|[^\W_]+@[^\W_]+(?:\.[^\W_]+)+)"
    r"|[^\W\d_]+(?:\.[^\W_]+)+|[^\W_]+(?:[-/@_'][^\W_]+)*|\.{2,}|[!?]{2,}|-+|_+|[^\s\w]"
)
_CLITIC = re.compile(r"(?i)(?<=\w)(n't|'(?:s|m|d|re|ve|ll))(?!\w)|(?<=\w)('n')(?=\w)")
_CLITICS = frozenset({"n't", "'s", "'m", "'d", "'re", "'ve", "'ll"})
_SPLIT = {"cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na", "lemme": "lem me"}
# The COCO evaluation means to drop brackets too, but writes their names in capitals, and so keeps them; figures that
# are to be compared must as well.
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_QUOTES = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2026": "...", "\u2014": "--"})
_DROPPED = frozenset({"'", "`", '"', ".", "..", "...", "?", "!", ",", ":", "-", "--", "---", ";"})


def tokenize(caption: str) -> str:
    """Return a caption as words in lower case with single spaces, punctuation dropped.

    It follows the Penn Treebank rules of the COCO evaluation: contractions are split, hyphenated words are kept.
    """
    text = caption.translate(_QUOTES)
    words: list[str] = []
    for chunk in _CLITIC.sub(r" \g<0> ", text).split():
        found = [chunk] if chunk.lower() in _CLITICS else _TOKEN.findall(chunk)
        for word in map(str.lower, found):
            words += _SPLIT.get(word, _BRACKETS.get(word, word)).split()
    return " ".join(word for word in words if word not in _DROPPED)


def cider(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, list[float]]:
    """Return CIDEr of a whole set, and each picture's own; 1.0 is what tables call 100.

    Args:
        predictions: a caption per picture.
        references: its reference captions, at least one.
    """
    from pycocoevalcap.cider.cider import Cider  # noqa: PLC0415 - only captions need it

    said = {i: [tokenize(text)] for i, text in enumerate(predictions)}
    true = {i: [tokenize(text) for text in texts] for i, texts in enumerate(references)}
    total, each = Cider().compute_score(true, said)
    return float(total), [float(value) for value in each]
