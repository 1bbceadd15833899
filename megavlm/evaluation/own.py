"""``megavlm eval CHECKPOINT --data FILE``: records of one's own, answered, scored and shown as benchmarks are."""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megavlm.config.errors import UserError
from megavlm.config.schema import Recipe
from megavlm.data.box_notations import find_boxes
from megavlm.data.box_space import BoxSpace, ReadBoxes
from megavlm.data.inspect.strip import some_frames
from megavlm.data.media import ImagePlan, plan_of
from megavlm.data.schema import IMAGE_PLACEHOLDER
from megavlm.data.tokenizer import Tokenizer
from megavlm.evaluation.benchmarks.predictions import Row
from megavlm.evaluation.benchmarks.questions import Question, check_lengths, digest
from megavlm.evaluation.benchmarks.readers import reader_of
from megavlm.evaluation.benchmarks.run import (
    BenchmarkRun,
    answer_run,
    warn_problems,
    weights_of,
    with_predictions,
)
from megavlm.evaluation.benchmarks.spec import (
    Benchmark,
    BenchmarkFiles,
    Item,
    Scores,
    Shown,
    StoredFilm,
    by_kind,
    picture_bytes,
)
from megavlm.evaluation.metrics import score
from megavlm.evaluation.metrics.captions import cider
from megavlm.evaluation.metrics.heldout import box_iou
from megavlm.evaluation.metrics.text import anls, contains, exact, relaxed
from megavlm.evaluation.metrics.vqa import vqa_accuracy
from megavlm.evaluation.panel import PanelItem, draw_panel
from megavlm.evaluation.records import HeldOutRecord, check_prompt, make_questions, read_records
from megavlm.inference.boxes import box_space, family_of

PANEL = "panel.png"
RECORD_TOKENS = 48
"""Longest answer unless the command says otherwise."""
_PACKAGE = "pycocoevalcap"
_FEWEST_PEOPLE = 4
_FRAMES = 4
"""Of a film in the panel."""


def _iou(prediction: str, answers: Sequence[str], read: ReadBoxes = find_boxes) -> float:
    """Overlap of the first box of the prediction with the nearest answer's first, as ``read`` finds them."""
    said = read(prediction)
    return max(box_iou(said[0].sides, read(answer)[0].sides) for answer in answers) if said else 0.0


def _reader(record: HeldOutRecord, space: BoxSpace | None) -> ReadBoxes:
    return reader_of(Item(record.id, "", tuple(record.images)), space)


_EACH: Mapping[str, tuple[str, Callable[[str, Sequence[str]], float]]] = {
    "exact": ("exact_match", exact),
    "contains": ("contains", contains),
    "vqa": ("vqa_accuracy", vqa_accuracy),
    "anls": ("anls", anls),
    "relaxed": ("relaxed_accuracy", relaxed),
    "iou": ("mean_iou", _iou),
}
METRICS = (*_EACH, "cider")
"""What ``--metric`` and a record's ``metric`` may name."""


def metrics_of(text: str) -> tuple[str, ...]:
    """Return the metrics that ``--metric`` names.

    Raises:
        UserError: there is no such metric.
    """
    names = tuple(dict.fromkeys(name.strip().lower() for name in text.split(",")))
    for name in names:
        _check_name(name, "--metric")
    return names


def _check_name(name: str, where: str) -> None:
    if name not in METRICS:
        raise UserError(f"{where}: no metric {name!r}; there are {', '.join(METRICS)}")


def check_metrics(records: Sequence[HeldOutRecord], chosen: Sequence[str], space: BoxSpace | None = None) -> None:
    """Check that each record can be scored as it is to be; ``space`` is what boxes count.

    Raises:
        UserError: a metric is unknown, needs other answers than a record has, or a package that is not installed.
    """
    used: set[str] = set()
    for record in records:
        names = chosen if record.metric is None else (record.metric,)
        used.update(names)
        for name in names:
            _check_name(name, f"record {record.id}")
            if name == "vqa" and len(record.answers) < _FEWEST_PEOPLE:
                raise UserError(
                    f"record {record.id}: metric vqa compares with the answers of several people ('answers'), at least "
                    f"{_FEWEST_PEOPLE} of them; it has {len(record.answers)}; take exact"
                )
            if name == "iou" and not all(map(_reader(record, space), record.answers)):
                raise UserError(
                    f"record {record.id}: metric iou needs a box in each answer, such as <box>(x1,y1),(x2,y2)</box> in "
                    "thousandths, or in another notation (docs/serving.md)"
                )
    if "cider" in used and importlib.util.find_spec(_PACKAGE) is None:
        raise UserError(f"--metric cider: it needs {_PACKAGE}: pip install 'megavlm[eval]'")


def scores_of(
    records: Sequence[HeldOutRecord], chosen: Sequence[str], predictions: Sequence[str], space: BoxSpace | None = None
) -> Scores:
    """Score predictions: each metric over the records that it is asked of, in percent; a record's own wins.

    ``space`` is what the numbers of boxes count; None where they count parts of the picture.
    A record's point, and those of its task, are those of its first metric.
    """
    names = [chosen if one.metric is None else (one.metric,) for one in records]
    values: dict[str, float] = {}
    points: list[dict[str, float]] = [{} for _ in records]
    for name in dict.fromkeys([*chosen, *(name for own in names for name in own)]):
        asked = [i for i, own in enumerate(names) if name in own]
        if not asked:
            continue
        if name == "cider":
            total, each = cider([predictions[i] for i in asked], [records[i].answers for i in asked])
            values["cider"] = 100 * total
            each = [min(1.0, value) for value in each]
        else:
            title, one = _EACH[name]
            if name == "iou":
                each = [_iou(predictions[i], records[i].answers, _reader(records[i], space)) for i in asked]
                hits = [float(value >= 0.5) for value in each]
                values["iou50"] = 100 * sum(hits) / len(hits)
            else:
                each = [one(predictions[i], records[i].answers) for i in asked]
            values[title] = 100 * sum(each) / len(each)
            each = hits if name == "iou" else each
        for i, value in zip(asked, each, strict=True):
            points[i][name] = value
    each = [point[own[0]] for point, own in zip(points, names, strict=True)]
    items = [Item(one.id, "", (), kind=one.task) for one in records]
    kinds = {
        kind: {"score": 100 * sum(found) / len(found), "questions": float(len(found))}
        for kind, found in by_kind(items, each).items()
    }
    return Scores(values, each, kinds if len(kinds) > 1 else {})


@dataclass(frozen=True)
class RecordsRun(BenchmarkRun):
    """Records of one's own, asked as a benchmark's questions are."""

    records: Mapping[str, HeldOutRecord] = field(default_factory=dict)
    """By identifier."""
    checkpoint: Path = Path()
    plan: ImagePlan = field(kw_only=True)
    """What becomes of pictures and films."""

    def more(self, asked: Sequence[Question], rows: Mapping[str, Row]) -> dict[str, Any]:
        """Return the figures by task, and those of closed questions beside chance."""
        records = [self.records[one.item.id] for one in asked]
        told = [{"task": one.task, "answers": one.answers, "choices": one.choices} for one in records]
        readers = [reader_of(one.item, self.space) for one in asked]
        found = score(told, [rows[one.id]["prediction"] for one in records], readers)
        return {**found, "records": len(records), "checkpoint": str(self.checkpoint)}

    def line(self, item: Item) -> dict[str, Any]:
        """Return the record's task and answer."""
        return {"task": item.kind, "answer": self.records[item.id].answer}


def run_records(args: argparse.Namespace, recipe: Recipe, checkpoint: Path, tokenizer: Tokenizer) -> int:
    """Answer records, score the answers and write them.

    Args:
        args: the command's arguments.
        recipe: of the checkpoint, with the overrides.
        checkpoint: its directory.
        tokenizer: its tokenizer.

    Raises:
        MissingFileError: records or pictures are missing.
        UserError: a record or an argument is wrong, or the directory has predictions of another run.
    """
    start = time.perf_counter()
    plan = _plan(args, recipe, checkpoint, tokenizer)
    found = answer_run(plan, args, recipe, checkpoint, tokenizer, start)
    if found is not None and args.panel_samples:
        _draw(plan, *found, args.panel_samples)
    return 0


def _plan(args: argparse.Namespace, recipe: Recipe, checkpoint: Path, tokenizer: Tokenizer) -> RecordsRun:
    chosen = metrics_of(args.metric)
    if args.prompt is not None:
        check_prompt(args.prompt)
    records = read_records(args.data, args.images, args.format, args.annotations)
    space = box_space(family_of(checkpoint), recipe.model)
    check_metrics(records, chosen, space)
    tokens = args.max_new_tokens or RECORD_TOKENS
    questions = make_questions(records, tokenizer, recipe, args.prompt)
    pictures = plan_of(recipe.model)
    # Where no film is shown, as it was called before there were films.
    moving = any(isinstance(one, StoredFilm) for question in questions for one in question.item.pictures)
    check_lengths(questions[: args.limit], tokens, recipe.data.sequence_length)
    warn_problems([one for one in questions[: args.limit] if one.problem])
    name = Path(str(args.data)).name
    out = args.out or Path("eval") / Path(name).stem
    identity, done = with_predictions(
        out,
        "records",
        {
            "benchmark": f"records of {name}",
            "checkpoint": checkpoint.resolve().name,
            "weights": weights_of(checkpoint),
            "questions": digest(questions),
            "pictures": repr(pictures),
            **({"films": repr(pictures.films)} if moving else {}),
            "prompt": "chat",
            "max_new_tokens": tokens,
            "precision": recipe.training.precision,
        },
    )
    by_id = {record.id: record for record in records}

    def metric(items: Sequence[Item], predictions: Sequence[str]) -> Scores:
        return scores_of([by_id[item.id] for item in items], chosen, predictions, space)

    benchmark = Benchmark(name, _not_read, "", tokens, metric, name, chat=True)
    return RecordsRun(
        benchmark,
        out,
        questions,
        identity,
        done,
        tokens,
        True,
        Counter(),
        space,
        records=by_id,
        checkpoint=checkpoint,
        plan=pictures,
    )


def _not_read(source: BenchmarkFiles) -> list[Item]:
    raise AssertionError(f"records of one's own are read by read_records, not from {source}")


def _draw(plan: RecordsRun, asked: Sequence[Question], rows: Mapping[str, Row], count: int) -> None:
    items = [
        PanelItem(
            question=asked[i].text.replace(IMAGE_PLACEHOLDER, "").strip(),
            expected=plan.records[asked[i].item.id].answer,
            predicted=rows[asked[i].item.id]["prediction"],
            images=[image for one in asked[i].item.pictures for image in _opened(one, plan.plan, asked[i].item)],
            boxes=reader_of(asked[i].item, plan.space),
        )
        for i in spread([one.item.kind for one in asked], count)
        if not rows[asked[i].item.id].get("problem")
    ]
    if items:
        draw_panel(items, plan.out / PANEL)


def _opened(one: Shown, plan: ImagePlan, item: Item) -> list[Any]:
    """Return a picture, or frames of a film that the model was shown."""
    if isinstance(one, Path):
        return [one]
    if isinstance(one, StoredFilm):
        film = one.read()
        return [image for _, image in some_frames(film, plan.of(film.shape(len(item.pictures))), "white", _FRAMES)]
    from megavlm.data.images import decode_with_pil  # noqa: PLC0415 - few records have them

    return [decode_with_pil(picture_bytes(one))]


def spread(tasks: Sequence[str], count: int) -> list[int]:
    """Return ``count`` indices, all tasks in turn."""
    by_task: dict[str, list[int]] = {}
    for i, task in enumerate(tasks):
        by_task.setdefault(task, []).append(i)
    chosen: list[int] = []
    while len(chosen) < min(count, len(tasks)):
        for members in by_task.values():
            if members and len(chosen) < count:
                chosen.append(members.pop(0))
    return sorted(chosen)
