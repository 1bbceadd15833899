"""``megavlm eval``: answer held-out records or a benchmark with a checkpoint and score the answers, at any layout."""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megavlm.data.schema import IMAGE_PLACEHOLDER
from megavlm.evaluation.benchmarks import find_benchmark
from megavlm.evaluation.benchmarks.main import run_benchmark
from megavlm.evaluation.metrics import score
from megavlm.evaluation.panel import PanelItem, draw_panel
from megavlm.evaluation.records import HeldOutRecord, encode_records, read_records
from megavlm.inference.checkpoint import load_for_inference
from megavlm.parallel.device import prepare_device

logger = logging.getLogger(__name__)

_RECORD_TOKENS = 48
PREDICTIONS, SCORES, PANEL = "predictions.jsonl", "scores.json", "panel.png"


INTERMIXED = True
"""Overrides may stand between the options."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("checkpoint", type=Path, help="a step-... directory, or a run's output_dir for its newest one")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the checkpoint's recipe to change")
    parser.add_argument(
        "--benchmark", metavar="NAME", help="a public benchmark (docs/evaluation.md); without it, --data holds records"
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="the benchmark's own file, or a JSON list of records with an answer"
    )
    parser.add_argument(
        "--images",
        type=Path,
        help="directory of the pictures; a benchmark's are looked for beside its file if left out",
    )
    parser.add_argument(
        "--out", type=Path, help="directory to write predictions, scores and pictures to (a benchmark's: eval/NAME)"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, help="longest answer in tokens (default: the benchmark's; 48 for records)"
    )
    parser.add_argument("--limit", type=int, help="answer the first so many records only")
    parser.add_argument("--panel-samples", type=int, default=16, help="cards with pictures; 0 for none (default 16)")
    parser.add_argument("--annotations", type=Path, help="answers, where a benchmark has them in a file of their own")
    parser.add_argument("--split", help="part of a benchmark's file that holds several (default: its test part)")
    parser.add_argument("--chat", action="store_true", help="ask a benchmark in turns of a conversation, not as text")
    parser.add_argument("--predict-only", action="store_true", help="score nothing: a test set with secret answers")


def run(args: argparse.Namespace) -> int:
    """Answer, score and write.

    Raises:
        FileNotFoundError: checkpoint, records or an image are missing.
        ValueError: records or overrides are wrong, or a prompt is too long.
    """
    start = time.perf_counter()
    _check_arguments(args)
    recipe, checkpoint, tokenizer = load_for_inference(args.checkpoint, args.overrides)
    if args.benchmark is not None:
        return run_benchmark(args, recipe, checkpoint, tokenizer)
    max_new_tokens = args.max_new_tokens or _RECORD_TOKENS
    records = read_records(args.data, args.images)[: args.limit]
    prompts = encode_records(records, tokenizer, recipe, max_new_tokens)
    prepare_device()
    from megavlm.evaluation.answer import answer  # noqa: PLC0415 - imports Megatron-Core

    predictions = answer(recipe, checkpoint, tokenizer, records, prompts, max_new_tokens)
    if predictions is None:  # not the first rank
        return 0
    asked = [{"task": record.task, "answer": record.answer, "choices": record.choices} for record in records]
    result = {**score(asked, predictions), "records": len(records), "checkpoint": str(checkpoint)}
    result["seconds"] = round(time.perf_counter() - start, 1)
    _write(args, records, predictions, result)
    logger.info("%s", json.dumps(result))
    return 0


def _check_arguments(args: argparse.Namespace) -> None:
    """Refuse arguments that do not go together.

    Raises:
        ValueError: there is no such benchmark, or an argument is missing or has no use.
    """
    for name, value in (("--max-new-tokens", args.max_new_tokens), ("--limit", args.limit)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if args.benchmark is not None:
        find_benchmark(args.benchmark)
        return
    for name in ("images", "out"):
        if getattr(args, name) is None:
            raise ValueError(f"--{name} DIR is needed for records (without --benchmark)")
    for name in ("annotations", "split", "chat", "predict_only"):
        if getattr(args, name):
            raise ValueError(f"--{name.replace('_', '-')} is for a benchmark; give --benchmark NAME too")


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
