"""Worked examples of the held-out scores."""

from __future__ import annotations

import pytest

from megavlm.evaluation.metrics import box_hit, box_iou, exact_match, score


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("red", "red", True),
        ("  Red\n", "red", True),
        ("red", " RED ", True),
        ("red.", "red", False),
        ("re d", "red", False),
        ("", "red", False),
    ],
)
def test_exact_match(prediction: str, answer: str, expected: bool) -> None:
    assert exact_match(prediction, answer) is expected


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((0, 0, 10, 10), (0, 0, 10, 10), 1.0),
        ((0, 0, 10, 10), (5, 0, 15, 10), 50 / 150),
        ((0, 0, 10, 10), (0, 0, 5, 10), 0.5),
        ((0, 0, 10, 10), (5, 5, 15, 15), 25 / 175),
        ((0, 0, 10, 10), (10, 0, 20, 10), 0.0),
        ((0, 0, 10, 10), (20, 20, 30, 30), 0.0),
        ((5, 5, 5, 5), (5, 5, 5, 5), 0.0),
        ((10, 10, 0, 0), (0, 0, 10, 10), 0.0),
    ],
)
def test_box_iou(first: tuple[int, ...], second: tuple[int, ...], expected: float) -> None:
    assert box_iou(first, second) == pytest.approx(expected)
    assert box_iou(second, first) == pytest.approx(expected)


def test_box_hit_takes_the_first_box_and_includes_the_threshold() -> None:
    answer = "<box>(0,0),(100,100)</box>"
    half, miss = "<box>(0,0),(50,100)</box>", "<box>(0,0),(49,100)</box>"
    assert box_hit(half + miss, answer)
    assert not box_hit(miss + half, answer)
    assert not box_hit("blue", answer)
    with pytest.raises(ValueError, match="no box"):
        box_hit(half, "blue")


def test_score_on_a_worked_example() -> None:
    box = "<ref>the red circle</ref><box>(0,0),(100,100)</box>"
    records = [
        {"task": "colour", "answers": ("red",), "choices": ["red", "green", "blue", "yellow"]},
        {"task": "colour", "answers": ("blue",), "choices": ["red", "green", "blue", "yellow"]},
        {"task": "multi", "answers": ("yes",), "choices": ["yes", "no"]},
        {"task": "box", "answers": (box,), "choices": None},
        {"task": "box", "answers": (box,), "choices": None},
        {"task": "box", "answers": (box,), "choices": None},
        {"task": "caption", "answers": ("a red circle",), "choices": None},
    ]
    shifted = "<ref>the red circle</ref><box>(0,0),(100,80)</box>"
    predictions = [" Red", "red", "yes", box, shifted, "no idea", "a red circle"]
    result = score(records, predictions)
    assert result["heldout_accuracy"] == pytest.approx(2 / 3)
    assert result["chance_accuracy"] == pytest.approx((1 / 4 + 1 / 4 + 1 / 2) / 3)
    assert result["box_iou50"] == pytest.approx(2 / 3)
    assert result["accuracy"] == pytest.approx({"box": 1 / 3, "caption": 1.0, "colour": 0.5, "multi": 1.0})
    assert result["counts"] == {"box": 3, "caption": 1, "colour": 2, "multi": 1}


def test_score_without_records_of_a_kind() -> None:
    result = score([{"task": "caption", "answers": ("a",), "choices": None}], ["b"])
    assert result["heldout_accuracy"] is None
    assert result["chance_accuracy"] is None
    assert result["box_iou50"] is None
    assert result["accuracy"] == {"caption": 0.0}
    assert score([], [])["counts"] == {}


def test_score_refuses_a_missing_prediction() -> None:
    with pytest.raises(ValueError, match="1 records, but 0 predictions"):
        score([{"task": "caption", "answers": ("a",), "choices": None}], [])
