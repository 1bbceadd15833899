"""``megavlm quickstart``: render a data set, train on it under torchrun at TP 2 x PP 2 + SP, score held-out answers.

Every part is the command that a user would type: ``megavlm prepare``, ``torchrun -m megavlm train quickstart``,
``torchrun -m megavlm eval``.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megavlm.checkpoint.paths import read_run, resolve
from megavlm.commands import prepare
from megavlm.commands.eval import PANEL, PREDICTIONS, SCORES
from megavlm.config.checks import check_recipe
from megavlm.config.errors import UserError
from megavlm.config.load import load_recipe
from megavlm.config.schema import Recipe
from megavlm.data.tokenizer import train_sentencepiece
from megavlm.families.presets import expand_presets
from megavlm.parallel.lock import LOCK_FILE, held
from megavlm.parallel.output import try_writing
from megavlm.parallel.processes import signalled_at_parents_end
from megavlm.quickstart.render import RenderedData, render_dataset
from megavlm.quickstart.report import format_table

logger = logging.getLogger(__name__)

RANKS = 4
"""Processes: TP 2 x PP 2, on CPUs or on as many GPUs."""
_VOCABULARY = 640
_RESULT = "result.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys of the recipe quickstart to change")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="directory to write (and empty)")
    parser.add_argument("--train-images", type=int, default=10000, help="images to render for training (default 10000)")
    parser.add_argument("--heldout-images", type=int, default=320, help="images to hold out (default 320)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the images")


def run(args: argparse.Namespace) -> int:
    """Do the job, print the table, write ``result.json``.

    Raises:
        UserError: an override is wrong, or ``--out`` holds something else.
        RuntimeError: training or evaluation failed; its output says why.
    """
    start = time.perf_counter()
    out: Path = args.out
    ranks, layout = layout_for(_gpus())
    overrides = _overrides(out, [*layout, *args.overrides])
    recipe = load_recipe("quickstart", overrides, expand_presets)
    check_recipe(recipe, ranks)
    _check_ours(out)
    try_writing(out, "--out")
    out.mkdir(parents=True, exist_ok=True)
    with held(out / LOCK_FILE, "quickstart", f"--out {out}"):
        return _run(args, recipe, ranks, overrides, start)


def _run(args: argparse.Namespace, recipe: Recipe, ranks: int, overrides: Sequence[str], start: float) -> int:
    """Do the job in a directory that is ours; ``start`` is when it began, by :func:`time.perf_counter`."""
    out: Path = args.out
    _empty(out)
    rendered = _make_data(out / "data", args)
    logger.info("training: %d processes; curves: tensorboard --logdir %s", ranks, recipe.output_dir)
    _torchrun(ranks, ["train", "quickstart", *overrides])
    _torchrun(
        ranks,
        [
            "eval",
            recipe.output_dir,
            f"--data={rendered.heldout_json}",
            f"--images={rendered.images_dir}",
            f"--out={out / 'eval'}",
        ],
    )
    result = _result(recipe, ranks, out / "eval", rendered)
    result["seconds_total"] = round(time.perf_counter() - start, 1)
    shutil.copy(out / "eval" / PANEL, out / "heldout.png")
    shutil.copy(out / "eval" / PREDICTIONS, out / PREDICTIONS)
    (out / _RESULT).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    table = f"\n{format_table(result)}\n{out / _RESULT}\n{out / 'heldout.png'}\n"
    sys.stdout.write(table)
    return 0


def _overrides(out: Path, own: Sequence[str]) -> list[str]:
    """The keys that follow from ``--out``, then the user's."""
    return [
        f"output_dir={json.dumps(str(out / 'train'))}",
        f"data.train.0.path={json.dumps(str(out / 'data/train'))}",
        f"data.validation.0.path={json.dumps(str(out / 'data/heldout'))}",
        f"data.tokenizer={json.dumps(str(out / 'data/tokenizer.model'))}",
        *own,
    ]


def _check_ours(out: Path) -> None:
    """Check that nothing but an earlier quickstart is in a directory.

    Raises:
        UserError: the directory holds something else.
    """
    # Of one that was killed at once there is the lock alone.
    found = [path for path in out.iterdir() if not path.name.startswith(LOCK_FILE)] if out.is_dir() else []
    if found and not (out / "data").is_dir():
        raise UserError(f"--out {out} is not empty and is no quickstart's; choose another directory")


def _empty(out: Path) -> None:
    """Remove an earlier quickstart, and nothing else.

    Raises:
        HeldError: its model is being trained on, or evaluated, by hand.
    """
    for name in ("train", "eval"):
        if (out / name).is_dir():
            with held(out / name / LOCK_FILE, "quickstart", f"--out {out}: {name}"):
                shutil.rmtree(out / name, ignore_errors=True)
    shutil.rmtree(out / "data", ignore_errors=True)
    for name in (_RESULT, "heldout.png", PREDICTIONS):
        (out / name).unlink(missing_ok=True)


def _make_data(directory: Path, args: argparse.Namespace) -> RenderedData:
    """Render images and conversations, train the tokenizer, write the shards."""
    rendered = render_dataset(
        directory / "raw", train_images=args.train_images, heldout_images=args.heldout_images, seed=args.seed
    )
    logger.info(
        "rendered %d training and %d held-out samples in %.1f s",
        rendered.train_records,
        rendered.heldout_records,
        rendered.seconds,
    )
    records = json.loads(rendered.train_json.read_text(encoding="utf-8"))
    # The roles stand in every turn of ChatML: they should be one token each.
    texts = [f"{turn['from']}\n{turn['value']}" for record in records for turn in record["conversations"]]
    train_sentencepiece(texts, directory / "tokenizer.model", _VOCABULARY)
    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    for split, source in (("train", rendered.train_json), ("heldout", rendered.heldout_json)):
        words = [str(source), f"--images={rendered.images_dir}", f"--out={directory / split}"]
        prepare.run(parser.parse_args(words))
    return rendered


def layout_for(gpus: int) -> tuple[int, list[str]]:
    """Return processes and keys of the recipe: its own layout on CPUs and 4 GPUs, a smaller one on 1 to 3."""
    alone = ["parallel.pipeline_model_parallel_size=1"]
    if gpus == 1:
        return 1, [*alone, "parallel.tensor_model_parallel_size=1", "parallel.sequence_parallel=false"]
    return (2, alone) if 1 < gpus < RANKS else (RANKS, [])


def _gpus() -> int:
    from megavlm.parallel.device import gpu_count  # noqa: PLC0415 - imports torch: seconds

    return gpu_count()


def _torchrun(ranks: int, words: Sequence[str]) -> None:
    """Run ``megavlm`` under torchrun; its processes end with this one.

    Raises:
        RuntimeError: it failed.
    """
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m"]
    command += ["megavlm", *words]
    logger.info("torchrun --nproc-per-node %d -m megavlm %s", ranks, " ".join(words))
    env = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **os.environ}
    # However this process ends: torchrun then ends its ranks.
    process = subprocess.Popen(
        command, env=env, start_new_session=True, preexec_fn=signalled_at_parents_end(signal.SIGTERM)
    )
    try:
        code = process.wait()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
    if code:
        raise RuntimeError(f"megavlm {words[0]} ended with exit code {code}; its output is above")


def _result(recipe: Recipe, ranks: int, evaluation: Path, rendered: RenderedData) -> dict[str, Any]:
    """Gather the figures of training and evaluation."""
    from megavlm.parallel.layout import describe  # noqa: PLC0415 - imports torch

    train = Path(recipe.output_dir)
    losses = [
        line["loss"]
        for line in map(json.loads, (train / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        if "loss" in line
    ]
    progress = read_run(resolve(train))
    scores = json.loads((evaluation / SCORES).read_text(encoding="utf-8"))
    positions = progress["tokens"] + progress["padding_tokens"]
    return {
        "layout": describe(recipe.parallel, ranks),
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "heldout_accuracy": scores["heldout_accuracy"],
        "chance_accuracy": scores["chance_accuracy"],
        "box_iou50": scores["box_iou50"],
        "useful_tokens_per_second": progress["supervised_tokens"] / progress["seconds"],
        "padding_fraction": progress["padding_tokens"] / positions,
        "seconds_training": round(progress["seconds"], 1),
        "seconds_total": 0.0,
        "steps": progress["step"],
        "train_records": rendered.train_records,
        "accuracy": scores["accuracy"],
        "counts": scores["counts"],
    }
