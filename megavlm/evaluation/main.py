"""``megavlm eval``: answer held-out records with a checkpoint and score the answers, at any layout."""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megavlm.checkpoint.paths import resolve
from megavlm.config.checks import check_recipe
from megavlm.config.engine import for_inference
from megavlm.config.load import load_recipe
from megavlm.config.schema import Recipe
from megavlm.data.schema import IMAGE_PLACEHOLDER
from megavlm.data.tokenizer import check_vocabulary, load_tokenizer, with_tokenizer
from megavlm.evaluation.metrics import score
from megavlm.evaluation.panel import PanelItem, draw_panel
from megavlm.evaluation.records import HeldOutRecord, encode_records, read_records
from megavlm.models.registry import expand_presets
from megavlm.parallel.device import prepare_device

logger = logging.getLogger(__name__)

PREDICTIONS, SCORES, PANEL = "predictions.jsonl", "scores.json", "panel.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("checkpoint", type=Path, help="a step-... directory, or a run's output_dir for its newest one")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the checkpoint's recipe to change")
    parser.add_argument("--data", type=Path, required=True, help="JSON list of records with an answer")
    parser.add_argument("--images", type=Path, required=True, help="directory that the image paths are relative to")
    parser.add_argument("--out", type=Path, required=True, help="directory to write predictions, scores and a panel to")
    parser.add_argument("--max-new-tokens", type=int, default=48, help="longest answer in tokens (default 48)")
    parser.add_argument("--limit", type=int, help="answer the first so many records only")
    parser.add_argument("--panel-samples", type=int, default=16, help="cards of the panel; 0 for none (default 16)")


def run(args: argparse.Namespace) -> int:
    """Answer, score and write.

    Raises:
        FileNotFoundError: checkpoint, records or an image are missing.
        ValueError: records or overrides are wrong, or a prompt is too long.
    """
    start = time.perf_counter()
    recipe, checkpoint = _load_recipe(args)
    records = read_records(args.data, args.images)[: args.limit]
    assert recipe.data.tokenizer is not None
    tokenizer = load_tokenizer(recipe.data.tokenizer)
    check_vocabulary(recipe, tokenizer)
    prompts = encode_records(records, tokenizer, recipe, args.max_new_tokens)
    prepare_device()
    from megavlm.evaluation.answer import answer  # noqa: PLC0415 - imports Megatron-Core

    predictions = answer(recipe, checkpoint, tokenizer, records, prompts, args.max_new_tokens)
    if predictions is None:  # not the first rank
        return 0
    asked = [{"task": record.task, "answer": record.answer, "choices": record.choices} for record in records]
    result = {**score(asked, predictions), "records": len(records), "checkpoint": str(checkpoint)}
    result["seconds"] = round(time.perf_counter() - start, 1)
    _write(args, records, predictions, result)
    logger.info("%s", json.dumps(result))
    return 0


def _load_recipe(args: argparse.Namespace) -> tuple[Recipe, Path]:
    """Return the recipe that made the checkpoint, with the overrides, and the checkpoint's directory.

    The recipe's tokenizer may have moved since, or be null: then it is the one that lies in the checkpoint.
    """
    path = resolve(args.checkpoint)
    recipe = for_inference(load_recipe(path / "recipe.yaml", args.overrides, expand_presets))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    check_recipe(recipe, world)
    for name, value in (("--max-new-tokens", args.max_new_tokens), ("--limit", args.limit)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    return with_tokenizer(recipe, path), path


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
