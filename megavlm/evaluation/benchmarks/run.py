"""``megavlm eval CHECKPOINT --benchmark NAME``: read, check, answer, score, report."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from megavlm.checkpoint.manifest import MANIFEST, replace_text
from megavlm.config.errors import MissingFileError, UserError
from megavlm.config.schema import Recipe
from megavlm.data.box_space import BoxSpace
from megavlm.data.media import plan_of
from megavlm.data.schema import IMAGE_PLACEHOLDER
from megavlm.data.tokenizer import Tokenizer
from megavlm.evaluation.benchmarks import find_benchmark, read_items
from megavlm.evaluation.benchmarks.own_words import as_taught
from megavlm.evaluation.benchmarks.predictions import Row, put_together, read_predictions
from megavlm.evaluation.benchmarks.published import published
from megavlm.evaluation.benchmarks.questions import Question, digest, make_questions
from megavlm.evaluation.benchmarks.readers import reader_of
from megavlm.evaluation.benchmarks.spec import NOT_ASKED, Benchmark, BenchmarkFiles, Item, Scores
from megavlm.evaluation.metrics.grounding import box_text, first_box
from megavlm.evaluation.report import Card, Page, write_report
from megavlm.inference.boxes import box_space, family_of, own_question
from megavlm.parallel.lock import TIMEOUT_SECONDS, LockView
from megavlm.parallel.output import holding, try_writing

logger = logging.getLogger(__name__)

SCORES, REPORT = "scores.json", "report.html"
_SHOWN_PROBLEMS = 20


@dataclass(frozen=True)
class BenchmarkRun:
    """What is to be done, settled before a process group starts."""

    benchmark: Benchmark
    out: Path
    questions: list[Question]
    identity: dict[str, Any]
    done: dict[str, Row]
    max_new_tokens: int
    scored: bool
    skipped: Counter[str]
    space: BoxSpace | None = None
    """What boxes in answers count; None where they count parts of the picture."""
    as_published: bool = False
    """Whether it is asked as the benchmark's table says, so that figures of others may stand beside its own."""

    def more(self, asked: Sequence[Question], rows: Mapping[str, Row]) -> dict[str, Any]:
        """Return other keys of ``scores.json``."""
        return {}

    def line(self, item: Item) -> dict[str, Any]:
        """Return other keys of an item's line in the predictions."""
        return {}


def run_benchmark(args: argparse.Namespace, recipe: Recipe, checkpoint: Path, tokenizer: Tokenizer) -> int:
    """Answer a benchmark, score the answers and write them.

    Args:
        args: the command's arguments.
        recipe: of the checkpoint, with the overrides.
        checkpoint: its directory.
        tokenizer: its tokenizer.

    Raises:
        MissingFileError: a file or pictures are missing.
        UserError: the benchmark is unknown, its file is wrong, or the directory has predictions of another run.
    """
    start = time.perf_counter()
    answer_run(_plan(args, recipe, checkpoint, tokenizer), args, recipe, checkpoint, tokenizer, start)
    return 0


def answer_run(
    plan: BenchmarkRun, args: argparse.Namespace, recipe: Recipe, checkpoint: Path, tokenizer: Tokenizer, start: float
) -> tuple[list[Question], dict[str, Row]] | None:
    """Answer the questions that have no answer yet, score all and write them.

    Args:
        plan: what is to be done.
        args: the command's arguments: ``limit``, ``save_every``, ``panel_samples``.
        recipe: of the checkpoint, with the overrides.
        checkpoint: its directory.
        tokenizer: its tokenizer.
        start: when the command began, by :func:`time.perf_counter`.

    Returns:
        What was asked and predicted, on the first rank; None on the others.
    """
    from megavlm.parallel.device import prepare_device  # noqa: PLC0415 - imports torch

    prepare_device()
    from megavlm.evaluation.benchmarks.answer import answer_questions  # noqa: PLC0415 - imports Megatron-Core

    asked = plan.questions[: args.limit]
    try_writing(plan.out, "--out")
    with contextlib.ExitStack() as stack:
        locks: list[LockView] = []

        def begin() -> LockView:
            locks.append(stack.enter_context(holding(plan.out, "eval", "--out", TIMEOUT_SECONDS)))
            return locks[0]

        rows = answer_questions(
            recipe, checkpoint, tokenizer, asked, plan.done, plan.out, plan.identity, plan.max_new_tokens,
            args.save_every, begin,
        )  # fmt: skip
        if rows is None:  # not the first rank
            return None
        scores = _score(plan, asked, rows)
        locks[0].check()
        _write(plan, recipe, asked, rows, scores, args.panel_samples, time.perf_counter() - start)
    return asked, rows


def _plan(args: argparse.Namespace, recipe: Recipe, checkpoint: Path, tokenizer: Any) -> BenchmarkRun:
    benchmark = published_as = find_benchmark(args.benchmark)
    scored = not args.predict_only
    if scored and benchmark.needs and importlib.util.find_spec(benchmark.needs) is None:
        raise UserError(
            f"--benchmark {benchmark.name}: its metric needs {benchmark.needs}: pip install 'megavlm[eval]'"
        )
    if not args.data.exists():
        raise MissingFileError(f"{args.data} does not exist")
    images = args.images or (args.data if args.data.is_dir() else args.data.parent)
    source = BenchmarkFiles(args.data, images, args.annotations, args.split, scored)
    items = read_items(benchmark, source)
    for cause, count in source.skipped.items():
        logger.warning("%d questions are skipped: %s", count, cause)
    if scored:
        _check_answers(args.data, items)
    family = family_of(checkpoint)
    space = box_space(family, recipe.model)
    benchmark = as_taught(published_as, own_question(family, recipe.model), space)
    max_new_tokens = args.max_new_tokens or benchmark.max_new_tokens
    chat = benchmark.chat or args.chat
    questions = make_questions(benchmark, items, tokenizer, recipe, max_new_tokens, chat)
    _check_pictures(questions[: args.limit], images)
    warn_problems([one for one in questions[: args.limit] if one.problem])
    out = args.out or Path("eval") / benchmark.name
    identity = {
        "benchmark": benchmark.name,
        "checkpoint": checkpoint.resolve().name,
        "weights": weights_of(checkpoint),
        "questions": digest(questions),
        "pictures": repr(plan_of(recipe.model)),
        "prompt": "chat" if chat else "plain",
        "max_new_tokens": max_new_tokens,
        "precision": recipe.training.precision,
    }
    identity, done = with_predictions(out, benchmark.name, identity)
    usual = (chat, max_new_tokens) == (benchmark.chat, benchmark.max_new_tokens)
    usual = usual and benchmark.prompt == published_as.prompt
    return BenchmarkRun(benchmark, out, questions, identity, done, max_new_tokens, scored, source.skipped, space, usual)


def with_predictions(out: Path, benchmark: str, identity: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Row]]:
    """Return a run's identity with its name, and what it has predicted before in ``out``.

    Raises:
        UserError: the directory has predictions of another run.
    """
    name = f"{benchmark}-{sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]}"
    return {"run": name, **identity}, read_predictions(out, name, identity)


def weights_of(checkpoint: Path) -> str:
    """A short digest that tells this checkpoint's weights from others'."""
    manifest = checkpoint / MANIFEST
    named = manifest if manifest.is_file() else checkpoint / "run.json"
    return sha256(named.read_bytes()).hexdigest()[:12]


def _check_answers(data: Path, items: Sequence[Item]) -> None:
    secret = [item.id for item in items if not item.answers and item.box is None]
    if secret:
        raise UserError(
            f"{data}: {len(secret)} of {len(items)} questions have no answer, the first is {secret[0]}; "
            "give --predict-only for a test set whose answers are secret"
        )


def _check_pictures(questions: Sequence[Question], images: Path) -> None:
    files = [picture for one in questions for picture in one.item.pictures if isinstance(picture, Path)]
    missing = [path for path in files if not path.is_file()]
    if missing:
        raise MissingFileError(
            f"--images {images}: {len(missing)} of {len(files)} pictures are not there, the first is {missing[0]}"
        )


def warn_problems(questions: Sequence[Question]) -> None:
    """Log which questions are not asked, and why."""
    for one in questions[:_SHOWN_PROBLEMS]:
        logger.warning("question %s is not asked and counts as wrong: %s", one.item.id, one.problem)


def _score(plan: BenchmarkRun, asked: Sequence[Question], rows: Mapping[str, Row]) -> Scores | None:
    if not plan.scored:
        return None
    found = [rows[one.item.id] for one in asked]
    said = [NOT_ASKED if row.get("problem") else row["prediction"] for row in found]
    return plan.benchmark.metric([one.item for one in asked], said)


def _write(
    plan: BenchmarkRun,
    recipe: Recipe,
    asked: Sequence[Question],
    rows: Mapping[str, Row],
    scores: Scores | None,
    cards: int,
    seconds: float,
) -> None:
    each = dict(zip([one.item.id for one in asked], scores.each if scores else [], strict=False))
    lines = []
    for one in plan.questions:
        if one.item.id in rows:
            told = {"kind": one.item.kind, "question": one.item.question, "answers": _references(one.item)}
            told |= plan.line(one.item)
            own = {key: value for key, value in rows[one.item.id].items() if key not in (*told, "score")}
            lines.append({**own, **told, **({"score": each[one.item.id]} if one.item.id in each else {})})
    put_together(plan.out, lines)
    problems = {one.item.id: rows[one.item.id]["problem"] for one in asked if rows[one.item.id].get("problem")}
    result: dict[str, Any] = {
        **plan.identity,
        "scores": {name: round(value, 4) for name, value in scores.values.items()} if scores else None,
        "questions_answered": len(asked) - len(problems),
        "questions_counted_wrong": problems,
        "questions_skipped": dict(plan.skipped),
        "seconds": round(seconds, 1),
        **plan.more(asked, rows),
    }
    if scores and scores.kinds:
        result["sub_tasks"] = scores.kinds
    replace_text(plan.out / SCORES, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    told_problems = [f"{count} skipped: {cause}" for cause, count in plan.skipped.items()]
    told_problems += [f"{key} counts as wrong: {problem}" for key, problem in problems.items()]
    page = Page(
        title=f"{plan.benchmark.name}: {len(asked)} questions",
        facts={key: str(value) for key, value in plan.identity.items()} | {"seconds": f"{seconds:.1f}"},
        values=scores.values if scores else {},
        kinds=scores.kinds if scores else {},
        published=published(plan.benchmark.name, len(asked)) if plan.as_published else {},
        problems=told_problems,
        cards=[_card(asked[i], rows[asked[i].item.id], each, plan.space) for i in _chosen(asked, each, cards)],
        plan=plan_of(recipe.model),
        alpha=recipe.data.image_alpha,
    )
    write_report(plan.out / REPORT, page)
    figures = ", ".join(f"{name} {value:.2f}" for name, value in scores.values.items()) if scores else "not scored"
    counted = f"{len(asked)} questions, {len(problems)} of them could not be asked"
    logger.info("%s: %s (%s); %s", plan.benchmark.name, figures, counted, plan.out / REPORT)


def _references(item: Item) -> list[str]:
    return [box_text(item.box, item.size)] if item.box is not None else list(item.answers)


def _chosen(asked: Sequence[Question], each: Mapping[str, float], count: int) -> list[int]:
    """Questions for the page: half of them wrong ones if there are as many, spread over the whole benchmark."""
    wrong = [i for i, one in enumerate(asked) if each.get(one.item.id, 1.0) < 1]
    right = [i for i, one in enumerate(asked) if each.get(one.item.id, 1.0) >= 1]
    first = _spread(wrong, max(count // 2, count - len(right)))
    return sorted([*first, *_spread(right, count - len(first))])


def _spread(indices: Sequence[int], count: int) -> list[int]:
    count = min(count, len(indices))
    return [indices[i * len(indices) // count] for i in range(count)]


def _card(one: Question, row: Row, each: Mapping[str, float], space: BoxSpace | None) -> Card:
    item, said = one.item, row["prediction"]
    expected = " / ".join(dict.fromkeys(_references(item)))
    read = reader_of(item, space)
    if item.box is not None and not read(said):  # of a prompt that has opened Qwen-VL's tag
        found = first_box(said, item.size)
        said = box_text(found, item.size) if found else said
    note = row.get("problem", "")
    if "losses" in row:
        note = "losses: " + ", ".join(f"{loss:.3f}" for loss in row["losses"])
    question = one.text.replace(IMAGE_PLACEHOLDER, "").strip()
    title = item.id if item.kind == "all" else f"{item.kind} · {item.id}"
    return Card(title, question, expected, said, each.get(item.id), item.pictures, note, read)
