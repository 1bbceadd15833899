"""Compare our metrics with lmms-eval's on random predictions, and print where they differ.

python tests/evaluation/reference/compare_scorers.py X      # X as for make_scores.py, which lies beside this file
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from itertools import islice, product
from typing import Any

from make_scores import take

from megavlm.evaluation.metrics.text import anls, open_answer, relaxed
from megavlm.evaluation.metrics.vqa import process_answer
from megavlm.evaluation.metrics.yes_no import mme_answer

WORDS = ["8", "5", "-3", "1,200", "1,200.5", ".5", "3.14", "1e3", "2.5E-2", "so", "is", "answer", "final",
    "the", "=", "paris", "London", "b", "a.", "\n", "10%", "x", "could", "be", "thus", ",", ".", "?", "12,34",
    "7,", "0.333", "-0.0"]  # fmt: skip
ANSWERS = ["8", "5", "1200", "1200.5", "0.5", "paris", "b", "x", "7", "London is", "-3", "0.33", "a"]  # fmt: skip
PIECES = ["a", "the", "two", "10", "1,000", "3.5", "5.", "dont", "couldntve", "T-shirt", "u.s.", "!", "?", "-",
    "red", "/", "(x)", '"', "'s", "none", "it's", "@", "x,y", "y.", "$3,5"]  # fmt: skip
VALUES = ["14", "14.7", "0", "-1", "5%", "0.05", "1e2", "yes", "Yes", "", "nan", "inf", "1,000", "100", "95",
    "105", "%", "12 %", " 14"]  # fmt: skip
rng = random.Random(0)


def said(words: list[str], most: int, joints: str = " ") -> str:
    """Up to ``most`` words, with one of the joints after each."""
    return "".join(rng.choice(words) + rng.choice(joints).strip("|") for _ in range(rng.randint(0, most)))


def compare(name: str, theirs: Callable[..., Any], ours: Callable[..., Any], cases: Iterator[tuple[Any, ...]]) -> None:
    """Print how many cases differ, and the first of them."""
    number, differ = 0, []
    for number, case in enumerate(cases, 1):  # noqa: B007 - counted
        first, second = theirs(*case), ours(*case)
        if abs(first - second) > 1e-12 if isinstance(first, float) else first != second:
            differ.append((case, first, second))
    print(f"{name}: {len(differ)} of {number} differ", *differ[:5], sep="\n  ")


def endless(make: Callable[[], tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
    """Cases without end."""
    while True:
        yield make()


def main() -> None:
    """Compare all."""
    opened = take(
        "mmmu/utils.py", "extract_numbers", "check_is_number", "normalize_str", "parse_open_response", "eval_open",
        math=math,
    )  # fmt: skip
    processor = take("_task_utils/vqa_eval_metric.py", "EvalAIAnswerProcessor")["EvalAIAnswerProcessor"]()
    distance = take("../api/metrics.py", "levenshtein_distance", "anls")["anls"]
    chart = take("chartqa/utils.py", "relaxed_correctness")["relaxed_correctness"]
    yes_no = take("mme/utils.py", "parse_pred_ans")["parse_pred_ans"]

    def processed(text: str) -> str:
        return processor.process_digit_article(processor.process_punctuation(text.strip()))

    compare(
        "MMMU, open",
        lambda text, true: bool(opened["eval_open"](true, opened["parse_open_response"](text))),
        lambda text, true: bool(open_answer(text, true)),
        islice(endless(lambda: (said(WORDS, 7), rng.choices(ANSWERS, k=rng.randint(1, 2)))), 200_000),
    )
    compare("VQA answer", processed, process_answer, islice(endless(lambda: (said(PIECES, 5, " | "),)), 100_000))
    compare(
        "ANLS",
        lambda text, true: float(distance(true, [text])["anls"]),
        anls,
        islice(endless(lambda: (said(list("abAB  1"), 9, "|"), [said(list("abAB  1"), 8, "|") + "a"])), 50_000),
    )
    compare(
        "relaxed accuracy",
        lambda text, true: bool(chart(text, true)),
        lambda text, true: bool(relaxed(text, [true])),
        product(VALUES, VALUES),
    )
    compare("MME", yes_no, mme_answer, islice(endless(lambda: (said(list("yesno. YNESO,!x"), 6, "|"),)), 100_000))


if __name__ == "__main__":
    main()
