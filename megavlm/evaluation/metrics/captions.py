"""CIDEr (Vedantam et al. 2015) by pycocoevalcap, with a tokenizer of our own: the usual one is a Java program."""

from __future__ import annotations

import re
from collections.abc import Sequence

# In this order: abbreviations, numbers and words that begin with one, shortened words, words with inner signs, dots,
# dashes, underscores, and any other sign alone.
_TOKEN = re.compile(
    r"(?:[a-z]\.){2,}|\b(?:mr|mrs|ms|dr|st|jr|sr|vs|etc|ave|blvd|mt)\.|\d+(?:[.,:/-]\d+)*[a-z]*(?:-[^\W_]+)*"
    r"|'(?:em|til|tis|twas|n)\b|[^\W_]+(?:[-&/@_'][^\W_]+)*|\.{2,}|[!?]{2,}|-+|_+|[^\s\w]"
)
_CLITIC = re.compile(r"(?<=\w)(n't|'(?:s|m|d|re|ve|ll))(?!\w)")
_CLITICS = frozenset({"n't", "'s", "'m", "'d", "'re", "'ve", "'ll"})
_SPLIT = {"cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na", "lemme": "lem me"}
# The COCO evaluation means to drop brackets too, but writes their names in capitals, and so keeps them; figures that
# are to be compared must as well.
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_DROPPED = frozenset({"'", "`", '"', ".", "..", "...", "?", "!", ",", ":", "-", "--", "---", ";"})


def tokenize(caption: str) -> str:
    """Return a caption as words in lower case with single spaces, punctuation dropped.

    It follows the Penn Treebank rules of the COCO evaluation: contractions are split, hyphenated words are kept.
    """
    text = caption.lower().replace("\u2018", "'").replace("\u2019", "'").replace("\u201c", '"').replace("\u201d", '"')
    words: list[str] = []
    for chunk in _CLITIC.sub(r" \1 ", text).split():
        found = [chunk] if chunk in _CLITICS else _TOKEN.findall(chunk)
        for word in found:
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
