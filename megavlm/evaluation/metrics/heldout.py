"""Scores of held-out answers: exact match, boxes and the summary over a set of records."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from megavlm.config.errors import UserError
from megavlm.data.box_notations import find_boxes
from megavlm.data.box_space import ReadBoxes


def exact_match(prediction: str, *answers: str) -> bool:
    """Whether it is one of the answers, but for case and surrounding white space."""
    return prediction.strip().lower() in {answer.strip().lower() for answer in answers}


def box_iou(first: Sequence[float], second: Sequence[float]) -> float:
    """Area of the intersection by area of the union; 0 where both boxes are empty."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(0.0, width) * max(0.0, height)
    union = _area(first) + _area(second) - shared
    return shared / union if union > 0 else 0.0


def box_hit(prediction: str, answer: str, threshold: float = 0.5, read: ReadBoxes = find_boxes) -> bool:
    """Whether the first box predicted overlaps the answer's first by IoU >= ``threshold``, as ``read`` finds them."""
    predicted, expected = read(prediction), read(answer)
    if not expected:
        raise UserError(f"the answer has no box: {answer!r}")
    return bool(predicted) and box_iou(predicted[0].sides, expected[0].sides) >= threshold


def score(
    records: Sequence[Mapping[str, Any]], predictions: Sequence[str], readers: Sequence[ReadBoxes] | None = None
) -> dict[str, Any]:
    """Summary of the predictions for held-out ``records`` (``task``, ``answers``, the first for boxes, ``choices``).

    ``accuracy`` (exact match) and ``counts`` are per task, ``box_iou50`` is over the answers with a
    box. ``heldout_accuracy`` and ``chance_accuracy`` are over the closed questions, those with
    ``choices``; chance is the mean of 1 / number of choices. What has no records is ``None``.
    ``readers`` find the boxes in the texts of each record; by default they are thousandths, or parts, of the sides.
    """
    if len(records) != len(predictions):
        raise ValueError(f"{len(records)} records, but {len(predictions)} predictions")
    by_task: defaultdict[str, list[float]] = defaultdict(list)
    closed: list[float] = []
    chance: list[float] = []
    hits: list[float] = []
    readers = [find_boxes] * len(records) if readers is None else readers
    for record, prediction, read in zip(records, predictions, readers, strict=True):
        answer = record["answers"][0]
        right = float(exact_match(prediction, *record["answers"]))
        by_task[record["task"]].append(right)
        if record["choices"]:
            closed.append(right)
            chance.append(1 / len(record["choices"]))
        if read(answer):
            hits.append(float(box_hit(prediction, answer, read=read)))
    tasks = sorted(by_task)
    return {
        "heldout_accuracy": _mean(closed),
        "chance_accuracy": _mean(chance),
        "box_iou50": _mean(hits),
        "accuracy": {task: _mean(by_task[task]) for task in tasks},
        "counts": {task: len(by_task[task]) for task in tasks},
    }


def _area(box: Sequence[float]) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
