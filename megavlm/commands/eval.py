"""``megavlm eval``: answer held-out records or a benchmark with a checkpoint and score the answers, at any layout."""

from __future__ import annotations

import argparse
from pathlib import Path

from megavlm.config.errors import UserError
from megavlm.data.preparing import location
from megavlm.evaluation.benchmarks import BENCHMARKS, find_benchmark
from megavlm.evaluation.benchmarks.hub import ROWS
from megavlm.evaluation.benchmarks.predictions import PREDICTIONS
from megavlm.evaluation.benchmarks.run import SCORES, run_benchmark
from megavlm.evaluation.own import METRICS, PANEL, RECORD_TOKENS, run_records
from megavlm.inference.checkpoint import load_for_inference

__all__ = ["PANEL", "PREDICTIONS", "SCORES", "add_arguments", "run"]

INTERMIXED = True
"""Overrides may stand between the options."""
_CARDS, _SAVE_EVERY = 16, 128


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
        required=True,
        metavar="FILE",
        help="the benchmark's own file or folder; or held-out records, whatever megavlm prepare reads",
    )
    parser.add_argument(
        "--images",
        metavar="DIR",
        help="directory of the pictures (default: where the data is)",
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
        help=f"longest answer in tokens (default: the benchmark's; {RECORD_TOKENS} for records)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="answer the first N questions only")
    parser.add_argument(
        "--panel-samples",
        type=int,
        default=_CARDS,
        metavar="N",
        help=f"questions shown with pictures; 0 for none (default {_CARDS})",
    )
    parser.add_argument(
        "--annotations", type=Path, metavar="FILE", help="answers, where a benchmark has them in a file of their own"
    )
    parser.add_argument(
        "--save-every",
        type=int,
        metavar="N",
        help=f"write predictions to disk after every N questions of a replica (default {_SAVE_EVERY})",
    )
    group = parser.add_argument_group("records only")
    group.add_argument("--format", metavar="NAME", help="as of megavlm prepare (default: what the data looks like)")
    group.add_argument(
        "--metric",
        metavar="NAME[,NAME]",
        help=f"how answers are scored (default: exact): {', '.join(METRICS)}; a record's own 'metric' wins",
    )
    group.add_argument(
        "--prompt",
        metavar="TEXT",
        help="how a question is asked: {question}, {pictures} (else they stay in the question), {options}",
    )
    group = parser.add_argument_group("benchmarks only")
    group.add_argument(
        "--split", metavar="NAME", help="part of a benchmark's file that holds several (default: its test part)"
    )
    group.add_argument("--chat", action="store_true", help="ask in turns of a conversation, not as plain text")
    group.add_argument(
        "--predict-only", action="store_true", help="write predictions without scores: a test set's answers are secret"
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
    _check_arguments(args)
    recipe, checkpoint, tokenizer = load_for_inference(args.checkpoint, args.overrides)
    args.save_every = args.save_every or _SAVE_EVERY
    return (run_records if args.benchmark is None else run_benchmark)(args, recipe, checkpoint, tokenizer)


def _check_arguments(args: argparse.Namespace) -> None:
    """Refuse arguments that do not go together.

    Raises:
        UserError: there is no such benchmark, or an argument is missing or has no use.
    """
    for name, least in (("max_new_tokens", 1), ("limit", 1), ("save_every", 1), ("panel_samples", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
    args.data = location(args.data)
    args.images = None if args.images is None else location(args.images)
    if args.benchmark is not None:
        find_benchmark(args.benchmark)
        for name in ("format", "metric", "prompt"):
            if getattr(args, name) is not None:
                raise UserError(f"--{name} is for records; leave it out, or --benchmark")
        for name in ("data", "images"):
            if isinstance(getattr(args, name), str):
                raise UserError(f"--{name}: a benchmark's files are not read from an object store; copy them")
        return
    args.metric = "exact" if args.metric is None else args.metric
    for name in ("split", "chat", "predict_only"):
        if getattr(args, name):
            raise UserError(f"--{name.replace('_', '-')} is for a benchmark; give --benchmark NAME too")
