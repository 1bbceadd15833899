"""``megavlm eval``: answer held-out records or a benchmark with a checkpoint and score the answers, at any layout."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megavlm.config.errors import UserError
from megavlm.data.schema import IMAGE_PLACEHOLDER
from megavlm.evaluation.benchmarks import BENCHMARKS, find_benchmark
from megavlm.evaluation.benchmarks.hub import ROWS
from megavlm.evaluation.benchmarks.run import run_benchmark
from megavlm.evaluation.metrics import score
from megavlm.evaluation.panel import PanelItem, draw_panel
from megavlm.evaluation.records import HeldOutRecord, encode_records, read_records
from megavlm.inference.checkpoint import load_for_inference
from megavlm.parallel.lock import TIMEOUT_SECONDS, LockView
from megavlm.parallel.output import holding, try_writing

logger = logging.getLogger(__name__)

_RECORD_TOKENS, _CARDS, _SAVE_EVERY = 48, 16, 128
PREDICTIONS, SCORES, PANEL = "predictions.jsonl", "scores.json", "panel.png"


INTERMIXED = True
"""Overrides may stand between the options."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _epilog()
    parser.add_argument("checkpoint", type=Path, help="a step-... directory, or a run's output_dir for its newest one")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the checkpoint's recipe to change")
    parser.add_argument(
        "--benchmark", metavar="NAME", help="a public benchmark, see below; without it, --data holds records"
    )
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="FILE",
        help="the benchmark's own file or folder, or a JSON list of records with an answer",
    )
    parser.add_argument(
        "--images",
        type=Path,
        metavar="DIR",
        help="directory of the pictures (default: a benchmark's are looked for beside its file)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="directory of predictions, scores and report; a job that ended early goes on there (default: eval/NAME)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="longest answer in tokens (default: the benchmark's; 48 for records)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="answer the first N questions only")
    parser.add_argument(
        "--panel-samples",
        type=int,
        default=_CARDS,
        metavar="N",
        help=f"questions shown with pictures; 0 for none (default {_CARDS})",
    )
    group = parser.add_argument_group("benchmarks only")
    group.add_argument(
        "--annotations", type=Path, metavar="FILE", help="answers, where a benchmark has them in a file of their own"
    )
    group.add_argument(
        "--split", metavar="NAME", help="part of a benchmark's file that holds several (default: its test part)"
    )
    group.add_argument("--chat", action="store_true", help="ask in turns of a conversation, not as plain text")
    group.add_argument(
        "--predict-only", action="store_true", help="write predictions without scores: a test set's answers are secret"
    )
    group.add_argument(
        "--save-every",
        type=int,
        metavar="N",
        help=f"write predictions to disk after every N questions of a replica (default {_SAVE_EVERY})",
    )


def _epilog() -> str:
    width = max(map(len, BENCHMARKS)) + 2
    files = "\n".join(
        f"  {one.name:{width}}{one.file}{' *' if one.name in ROWS else ''}" for one in BENCHMARKS.values()
    )
    return (
        f"benchmarks, and what --data is:\n{files}\n\nThose with * are also read from the parquet files of Hugging "
        "Face's hub.\nPrompts, metrics and where to get the files: docs/evaluation.md"
    )


def run(args: argparse.Namespace) -> int:
    """Answer, score and write.

    Raises:
        MissingFileError: checkpoint, records or an image are missing.
        UserError: records or overrides are wrong, or a prompt is too long.
    """
    start = time.perf_counter()
    _check_arguments(args)
    recipe, checkpoint, tokenizer = load_for_inference(args.checkpoint, args.overrides)
    if args.benchmark is not None:
        args.save_every = args.save_every or _SAVE_EVERY
        return run_benchmark(args, recipe, checkpoint, tokenizer)
    max_new_tokens = args.max_new_tokens or _RECORD_TOKENS
    records = read_records(args.data, args.images)[: args.limit]
    prompts = encode_records(records, tokenizer, recipe, max_new_tokens)
    from megavlm.parallel.device import prepare_device  # noqa: PLC0415 - imports torch

    prepare_device()
    from megavlm.evaluation.answer import answer  # noqa: PLC0415 - imports Megatron-Core

    try_writing(args.out, "--out")
    with contextlib.ExitStack() as stack:
        locks: list[LockView] = []

        def begin() -> None:
            locks.append(stack.enter_context(holding(args.out, "eval", "--out", TIMEOUT_SECONDS)))

        predictions = answer(recipe, checkpoint, tokenizer, records, prompts, max_new_tokens, begin)
        if predictions is None:  # not the first rank
            return 0
        locks[0].check()
        result = _scored(records, predictions, checkpoint, start)
        _write(args, records, predictions, result)
    logger.info("%s", json.dumps(result))
    return 0


def _scored(
    records: Sequence[HeldOutRecord], predictions: Sequence[str], checkpoint: Path, start: float
) -> dict[str, Any]:
    """Score predictions; ``start`` is when the command began, by :func:`time.perf_counter`."""
    asked = [{"task": record.task, "answer": record.answer, "choices": record.choices} for record in records]
    result = {**score(asked, predictions), "records": len(records), "checkpoint": str(checkpoint)}
    result["seconds"] = round(time.perf_counter() - start, 1)
    return result


def _check_arguments(args: argparse.Namespace) -> None:
    """Refuse arguments that do not go together.

    Raises:
        UserError: there is no such benchmark, or an argument is missing or has no use.
    """
    for name, least in (("max_new_tokens", 1), ("limit", 1), ("save_every", 1), ("panel_samples", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
    if args.benchmark is not None:
        find_benchmark(args.benchmark)
        return
    for name in ("images", "out"):
        if getattr(args, name) is None:
            raise UserError(f"--{name} DIR is needed for records (without --benchmark)")
    for name in ("annotations", "split", "chat", "predict_only", "save_every"):
        if getattr(args, name):
            raise UserError(f"--{name.replace('_', '-')} is for a benchmark; give --benchmark NAME too")


def _write(
    args: argparse.Namespace, records: Sequence[HeldOutRecord], predictions: Sequence[str], result: dict[str, Any]
) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"id": record.id, "task": record.task, "answer": record.answer, "prediction": text})
        for record, text in zip(records, predictions, strict=True)
    ]
    (args.out / PREDICTIONS).write_text("\n".join(lines) + "\n", encoding="utf-8")
    (args.out / SCORES).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    items = [
        PanelItem(
            question=records[i].question[-1].text.replace(IMAGE_PLACEHOLDER, "").strip(),
            expected=records[i].answer,
            predicted=predictions[i],
            images=records[i].images,
        )
        for i in spread([record.task for record in records], args.panel_samples)
    ]
    if items:
        draw_panel(items, args.out / PANEL)


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
