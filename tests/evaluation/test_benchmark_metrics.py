"""The benchmarks' metrics: worked examples from their definitions, and the figures of public scorers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megavlm.evaluation.benchmarks import scores
from megavlm.evaluation.benchmarks.spec import Item
from megavlm.evaluation.metrics import box_iou
from megavlm.evaluation.metrics.captions import cider, tokenize
from megavlm.evaluation.metrics.grounding import box_text, first_box, hit
from megavlm.evaluation.metrics.text import anls, edit_distance, exact, open_answer, relaxed
from megavlm.evaluation.metrics.vqa import process_answer, vqa_accuracy
from megavlm.evaluation.metrics.yes_no import mme_answer, pope_answer

REFERENCE: dict[str, Any] = json.loads((Path(__file__).parent / "reference" / "scores.json").read_text("utf-8"))


def items(answers: list[str], units: list[str] | None = None, kinds: list[str] | None = None) -> list[Item]:
    count = len(answers)
    return [
        Item(str(i), "?", (), (answer,), choices=("x", "y", "z"), unit=unit, kind=kind)
        for i, (answer, unit, kind) in enumerate(
            zip(answers, units or [""] * count, kinds or ["all"] * count, strict=True)
        )
    ]


@pytest.mark.parametrize(
    ("same", "expected"),
    # Left out one by one: those who agree see one agreeing person fewer than those who do not.
    [(0, 0.0), (1, 0.9 / 3), (2, (8 * 2 / 3 + 2 * 1 / 3) / 10), (3, (7 * 1 + 3 * 2 / 3) / 10), (4, 1.0), (10, 1.0)],
)
def test_vqa_accuracy_by_hand(same: int, expected: float) -> None:
    answers = ["red"] * same + [f"other {i}" for i in range(10 - same)]
    assert vqa_accuracy("Red.", answers) == pytest.approx(expected)


def test_vqa_answer_processing_by_hand() -> None:
    assert process_answer("The two  dogs\n") == "2 dogs"
    assert process_answer("None") == "0"
    assert process_answer("3.50") == "3.50"  # a decimal point stays
    assert process_answer("Yes.") == "yes"
    assert process_answer("black-white") == "black white"
    assert process_answer("black - white") == "black white"
    assert process_answer("1,000 cars") == "1000 cars"
    assert process_answer("dont") == "don't"


def test_vqa_against_lmms_eval() -> None:
    for text, expected in REFERENCE["vqa_texts"]:
        assert process_answer(text) == expected, text
    for said, answers, expected in REFERENCE["vqa"]:
        assert vqa_accuracy(said, answers) == pytest.approx(expected, abs=1e-12), (said, answers)
    assert len(REFERENCE["vqa_texts"]) >= 40


def test_anls_by_hand() -> None:
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "abc") == 3
    assert anls("Kitten", ["sitting"]) == pytest.approx(1 - 3 / 7)
    assert anls("abcd", ["abxy"]) == 0.5  # just at the threshold
    assert anls("abcde", ["abxyz"]) == 0.0  # 0.4 is below it
    assert anls("may 8", ["8 may", "May 8"]) == 1.0


def test_relaxed_accuracy_by_hand() -> None:
    assert relaxed("105", ["100"]) == 1.0
    assert relaxed("105.1", ["100"]) == 0.0
    # Five percent of the target: 95 is within it of 100, but 100 is not within it of 95.
    assert relaxed("95", ["100"]) == 1.0
    assert relaxed("100", ["95"]) == 0.0
    assert relaxed("12%", ["0.12"]) == 1.0
    assert relaxed("yes", ["Yes"]) == 1.0


@pytest.mark.parametrize(
    ("name", "score"),
    [
        ("anls", anls),
        ("relaxed", lambda said, true: relaxed(said, [true])),
        ("open", open_answer),
        ("mme_answer", mme_answer),
    ],
)
def test_text_scores_against_lmms_eval(name: str, score: Any) -> None:
    for *given, expected in REFERENCE[name]:
        found = score(*given)
        assert (found == pytest.approx(expected, abs=1e-12)) if isinstance(expected, float) else (found == expected), (
            given
        )


def test_exact_match() -> None:
    assert exact(" Yes\n", ["no", "yes"]) == 1.0
    assert exact("yes.", ["yes"]) == 0.0


def test_mme_by_hand_and_against_lmms_eval() -> None:
    # count: right right | right wrong -> acc 75, acc+ 50; code_reasoning: wrong right -> acc 50, acc+ 0
    asked = items(
        ["yes", "no", "yes", "no", "yes", "no"], ["a", "a", "b", "b", "c", "c"], ["count"] * 4 + ["code_reasoning"] * 2
    )
    found = scores.mme_scores(asked, ["Yes.", "No", "yes", "yes", "no", "no, it is not"])
    assert found.values == {"total": 175.0, "perception": 125.0, "cognition": 50.0}
    assert found.kinds["count"] == {"score": 125.0, "acc": 75.0, "acc_plus": 50.0}
    rows, expected = REFERENCE["mme"]
    asked = items(["yes"] * len(rows), [row["question_id"] for row in rows], [row["category"] for row in rows])
    said = ["yes" if row["score"] else "no" for row in rows]
    assert scores.mme_scores(asked, said).values["perception"] == pytest.approx(expected)


def test_pope_by_hand_and_against_lmms_eval() -> None:
    assert [pope_answer(text) for text in ("Yes, there is.", "No", "There is not", "maybe", "Is. No")] == [
        "yes", "no", "no", "yes", "yes"
    ]  # fmt: skip
    # 2 true, 1 false positive, 1 missed, 1 true negative
    found = scores.pope_scores(items(["yes", "yes", "no", "yes", "no"]), ["yes", "yes", "yes", "no", "no"]).values
    assert found == pytest.approx(
        {"f1": 200 / 3, "accuracy": 60, "precision": 200 / 3, "recall": 200 / 3, "yes_ratio": 60}
    )
    rows, expected = REFERENCE["pope"]
    found = scores.pope_scores(items([row["ground_truth"] for row in rows]), [row["prediction"] for row in rows]).values
    for name, value in expected.items():
        assert found["f1" if name == "f1_score" else name] == pytest.approx(100 * value), name
    assert scores.pope_scores(items(["yes"]), ["no"]).values["f1"] == 0
    both = scores.pope_scores(items(["yes", "no", "yes"], kinds=["random", "random", "popular"]), ["yes", "yes", "no"])
    assert both.kinds["random"] == {"f1": pytest.approx(200 / 3), "accuracy": 50.0, "questions": 2.0}
    assert both.kinds["popular"]["f1"] == 0


def test_circular_needs_all_rotations() -> None:
    asked = items(["A", "B", "A", "B"], ["1", "1", "2", "2"], ["k", "k", "l", "l"])
    found = scores.circular_accuracy(asked, ["A", "B", "A", "A"])
    assert found.values == {"circular_accuracy": 50.0, "single_accuracy": 100.0}
    assert found.kinds == {"k": {"circular_accuracy": 100.0}, "l": {"circular_accuracy": 0.0}}
    assert found.each == [1, 1, 1, 0]


def test_boxes_by_hand() -> None:
    assert first_box("(0,0),(999,500)</box>", (640, 480)) == pytest.approx((0, 0, 640, 480 * 500 / 999))
    assert first_box("nothing", (640, 480)) is None
    box, size = (0.0, 0.0, 999.0, 999.0), (999, 999)
    assert hit("<box>(0,0),(999,500)</box>", box, size) == 1.0
    assert hit("(0,0),(999,499)", box, size) == 0.0
    assert hit("(10,10),(10,10)", box, size) == 0.0
    # Turned round it has no area, and hits nothing.
    assert hit("(999,999),(0,0)", box, size) == 0.0
    assert box_text((0, 0, 640, 240), (640, 480)) == "<box>(0,0),(999,500)</box>"


def test_boxes_against_lmms_eval() -> None:
    size = (999, 999)  # a pixel is a step of the notation
    for said, true, iou, right in REFERENCE["boxes"]:
        assert box_iou(said, true) == pytest.approx(iou)
        text = "<box>({},{}),({},{})</box>".format(*said)
        assert hit(text, true, size) == right
    assert {right for *_, right in REFERENCE["boxes"]} == {True, False}


def test_open_answers_by_hand() -> None:
    assert open_answer("There are 5 cats and 3 dogs, so the answer is 8.", ["8"]) == 1.0
    assert open_answer("There are 5 cats and 3 dogs, so the answer is 8.", ["5"]) == 0.0
    assert open_answer("in Paris", ["Rome", "paris"]) == 1.0
    assert open_answer("1,200", ["1200.001"]) == 1.0  # to two decimals
    assert open_answer("18", ["8"]) == 0.0


def test_captions_against_the_coco_evaluation() -> None:
    for text, expected in REFERENCE["captions"]:
        assert tokenize(text) == expected, text
    pairs, total, each = REFERENCE["cider"]
    found = cider([said for said, _ in pairs], [texts for _, texts in pairs])
    assert found[0] == pytest.approx(total)
    assert found[1] == pytest.approx(each)
    assert total > 0.5


def test_cider_by_hand() -> None:
    # Both captions equal their only reference and share no word: cosine 1 for each n, times 10. One-word captions
    # have no longer n-grams, which count as 0 of 4.
    assert cider(["cat", "dog"], [["cat"], ["dog"]]) == (pytest.approx(2.5), pytest.approx([2.5, 2.5]))
    assert cider(["a b c d", "e f g h"], [["a b c d"], ["e f g h"]])[0] == pytest.approx(10)
    assert cider(["x", "dog"], [["cat"], ["dog"]])[1] == pytest.approx([0, 2.5])


def test_means_and_sub_tasks() -> None:
    asked = items(["A", "B", "C"], kinds=["k", "k", "l"])
    found = scores.choice_accuracy(asked, ["A", "A", "C"])
    assert found.values == {"accuracy": pytest.approx(200 / 3)}
    assert found.kinds["k"] == {"accuracy": 50.0, "questions": 2.0}
