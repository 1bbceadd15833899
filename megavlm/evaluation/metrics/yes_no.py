"""What counts as yes and as no: MME (Fu et al. 2023) and POPE (Li et al. 2023) read answers differently."""

from __future__ import annotations

from collections.abc import Sequence


def mme_answer(prediction: str) -> str:
    """``yes``, ``no``, or ``other``: MME looks at the first four characters; a y or an n alone counts too."""
    start = prediction.lower().strip().replace(".", "")[:4]
    if start in ("y", "n"):
        return "yes" if start == "y" else "no"
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def pope_answer(prediction: str) -> str:
    """``yes`` or ``no``: POPE takes a first sentence with the word no or not for no, and all else for yes."""
    words = prediction.split(".")[0].replace(",", "").split()
    return "no" if {"no", "No", "not"}.intersection(words) else "yes"


def binary_scores(predicted: Sequence[str], true: Sequence[str]) -> dict[str, float]:
    """Accuracy, precision, recall, F1 and share of yes, in percent; "yes" is the positive class."""
    pairs = list(zip(predicted, true, strict=True))
    hits = pairs.count(("yes", "yes"))
    precision = _share(hits, sum(said == "yes" for said, _ in pairs))
    recall = _share(hits, sum(label == "yes" for _, label in pairs))
    return {
        "accuracy": _share(sum(said == label for said, label in pairs), len(pairs)),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if hits else 0.0,
        "yes_ratio": _share(sum(said == "yes" for said, _ in pairs), len(pairs)),
    }


def _share(part: int, whole: int) -> float:
    return 100 * part / whole if whole else 0.0
