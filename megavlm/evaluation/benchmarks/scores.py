"""The benchmarks' metrics: from questions and predictions to figures. The definitions lie in ``evaluation/metrics``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megavlm.data.box_space import BoxSpace
from megavlm.evaluation.benchmarks.readers import reader_of
from megavlm.evaluation.benchmarks.spec import NOT_ASKED, Item, Metric, Scores, by_kind
from megavlm.evaluation.metrics.captions import cider
from megavlm.evaluation.metrics.grounding import hit
from megavlm.evaluation.metrics.text import exact, open_answer
from megavlm.evaluation.metrics.yes_no import binary_scores, mme_answer, pope_answer

MME_COGNITION = ("code_reasoning", "commonsense_reasoning", "numerical_calculation", "text_translation")
"""Sub-tasks of MME's second sum; the others are perception."""


def mean_of(name: str, one: Callable[[str, Sequence[str]], float]) -> Metric:
    """Make a metric that is the mean of ``one`` (prediction, answers: 0 to 1) over the questions, in percent."""

    def metric(items: Sequence[Item], predictions: Sequence[str]) -> Scores:
        each = [one(said, item.answers) for item, said in zip(items, predictions, strict=True)]
        return _mean_scores(name, items, each)

    return metric


def choice_accuracy(items: Sequence[Item], predictions: Sequence[str]) -> Scores:
    """Share of questions whose option was found; questions without options by MMMU's rule for open answers."""
    pairs = zip(items, predictions, strict=True)
    each = [(exact if item.choices else open_answer)(said, item.answers) for item, said in pairs]
    return _mean_scores("accuracy", items, each)


def circular_accuracy(items: Sequence[Item], predictions: Sequence[str]) -> Scores:
    """MMBench: share of questions that are right in all rotations; and, as ``single_accuracy``, unrotated."""
    each = [exact(said, item.answers) for item, said in zip(items, predictions, strict=True)]
    units = _units(items, each)
    kind_of = {item.unit: item.kind for item in items}
    whole = {unit: float(all(values)) for unit, values in units.items()}
    kinds = {}
    for kind in sorted(set(kind_of.values())):
        kinds[kind] = {"circular_accuracy": _percent([whole[unit] for unit in whole if kind_of[unit] == kind])}
    single = [values[0] for values in units.values()]
    values = {"circular_accuracy": _percent(list(whole.values())), "single_accuracy": _percent(single)}
    return Scores(values, each, kinds if len(kinds) > 1 else {})


def mme_scores(items: Sequence[Item], predictions: Sequence[str]) -> Scores:
    """MME: a sub-task's accuracy plus its share of pictures with all questions right, each in percent, summed up."""
    said = [mme_answer(prediction) for prediction in predictions]
    each = [float(answer == item.answers[0]) for item, answer in zip(items, said, strict=True)]
    kinds = {}
    for kind in sorted({item.kind for item in items}):
        chosen = [i for i, item in enumerate(items) if item.kind == kind]
        units = _units([items[i] for i in chosen], [each[i] for i in chosen])
        accuracy = _percent([each[i] for i in chosen])
        plus = _percent([float(all(values)) for values in units.values()])
        kinds[kind] = {"score": accuracy + plus, "acc": accuracy, "acc_plus": plus}
    sums = {"perception": 0.0, "cognition": 0.0}
    for kind, figures in kinds.items():
        sums["cognition" if kind in MME_COGNITION else "perception"] += figures["score"]
    return Scores({"total": sum(sums.values()), **sums}, each, kinds)


def pope_scores(items: Sequence[Item], predictions: Sequence[str]) -> Scores:
    """POPE: F1 of yes, accuracy, precision, recall and the share of yes."""
    said = ["" if prediction == NOT_ASKED else pope_answer(prediction) for prediction in predictions]
    true = [item.answers[0] for item in items]
    figures = binary_scores(said, true)
    each = [float(one == label) for one, label in zip(said, true, strict=True)]
    kinds = {}
    for kind in sorted({item.kind for item in items}):
        chosen = [i for i, item in enumerate(items) if item.kind == kind]
        part = binary_scores([said[i] for i in chosen], [true[i] for i in chosen])
        kinds[kind] = {"f1": part["f1"], "accuracy": part["accuracy"], "questions": float(len(chosen))}
    return Scores({"f1": figures["f1"], **figures}, each, kinds if len(kinds) > 1 else {})


def box_accuracy_in(space: BoxSpace | None) -> Metric:
    """Make a metric that is the share of boxes with IoU >= 0.5, in percent; ``space`` is what their numbers count."""

    def metric(items: Sequence[Item], predictions: Sequence[str]) -> Scores:
        each = []
        for item, said in zip(items, predictions, strict=True):
            assert item.box is not None
            each.append(hit(said, item.box, item.size, read=reader_of(item, space)))
        return _mean_scores("iou50", items, each)

    return metric


box_accuracy = box_accuracy_in(None)
"""Share of boxes with IoU >= 0.5, of models whose numbers count parts of the picture."""


def caption_scores(items: Sequence[Item], predictions: Sequence[str]) -> Scores:
    """CIDEr, times 100 as tables have it; a picture's own is cut to 0..1 for the report."""
    total, each = cider(predictions, [item.answers for item in items])
    kinds = {
        kind: {"cider": _percent(values), "pictures": float(len(values))}
        for kind, values in by_kind(items, each).items()
    }
    return Scores({"cider": 100 * total}, [min(1.0, value) for value in each], kinds if len(kinds) > 1 else {})


def _mean_scores(name: str, items: Sequence[Item], each: list[float]) -> Scores:
    parts = by_kind(items, each)
    kinds = {kind: {name: _percent(values), "questions": float(len(values))} for kind, values in parts.items()}
    return Scores({name: _percent(each)}, each, kinds if len(kinds) > 1 else {})


def _units(items: Sequence[Item], each: Sequence[float]) -> dict[str, list[float]]:
    units: dict[str, list[float]] = {}
    for item, value in zip(items, each, strict=True):
        units.setdefault(item.unit, []).append(value)
    return units


def _percent(values: Sequence[float]) -> float:
    return 100 * sum(values) / len(values) if values else 0.0
