"""``megavlm init``: a recipe for a model and a data set of one's own, that runs.

It asks nothing: it looks at the model's directory, measures the samples of the data, and asks the planner what fits the
GPUs. The recipe names the data as it was given: where records change, the next run prepares them anew.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import os
import random
import re
import shlex
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megavlm.checkpoint.hf.directory import expand_recipe
from megavlm.checkpoint.paths import check_load, with_tokenizer_of_load
from megavlm.config import yaml12
from megavlm.config.checks import check_paths, check_recipe
from megavlm.config.errors import MissingFileError, RecipeError, UserError
from megavlm.config.load import recipe_of
from megavlm.config.schema import Recipe
from megavlm.data.cache import is_prepared
from megavlm.data.formats import Source
from megavlm.data.formats.base import Broken
from megavlm.data.formats.tables import files_of
from megavlm.data.preparing import Preparation, check_there, location
from megavlm.planning.gpus import DEFAULT, GIB, GPUS, Gpu, choose_gpu
from megavlm.planning.launch import nodes_of, overrides
from megavlm.planning.layout import layout_of
from megavlm.planning.parameters import static_bytes
from megavlm.planning.search import Plan, search
from megavlm.planning.workload import Workload, assume_workload
from megavlm.weights.kinds import holds_checkpoint, holds_model

logger = logging.getLogger(__name__)

_SCANNED = 2000
"""Samples whose lengths are measured."""
_HELD_OUT_FROM, _HELD_OUT_SHARE, _HELD_OUT_MOST = 200, 0.05, 200
"""Records from which on some are held out, which share of them, and how many at most."""
_UNIT = 256
"""Pack lengths are multiples of this, which every tensor-parallel size divides."""
_SHORTEST = 1024
_LONGER = 1.25
"""Where the longest sample is at most this times the 99th percentile, packs are long enough for all."""
_FEW = 50_000
"""Samples below which three passes are made, else one."""
_STEPS = 60
"""Steps of an epoch, at least, as far as one pack per GPU allows it."""
_MOST_BATCH = 128


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = (
        "Write a recipe that trains a model on your data, and print the command that runs it. It asks nothing, and "
        "looks: at the model's directory, at the lengths of your samples, at what fits the GPUs."
    )
    parser.add_argument(
        "--model", type=Path, required=True, metavar="DIR", help="a Hugging Face directory, or a checkpoint"
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="FILE",
        help="what megavlm prepare reads (a JSON, JSONL or parquet file of conversations, a URL, ..), or what it wrote",
    )
    parser.add_argument("--images", metavar="DIR", help="that image paths start from (default: FILE's)")
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs of the job (default: those of this machine)")
    parser.add_argument("--gpu", metavar="KIND", help=f"kind of GPU (default {DEFAULT}): {', '.join(GPUS)}")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="recipe to write (default: MODEL.yaml); plain data is prepared beside it",
    )


@dataclass(frozen=True)
class Measured:
    """What a data set was found to hold."""

    samples: int
    lengths: tuple[int, ...]
    """Tokens of the samples that were measured, sorted."""
    images: float
    """Pictures of a sample on average."""
    left_out: str
    """Numbers and causes of samples that were measured and can never be trained on; empty for none."""

    def share_within(self, length: int) -> float:
        """Return the share of samples that are no longer than ``length``."""
        return sum(one <= length for one in self.lengths) / len(self.lengths)

    @property
    def tokens(self) -> float:
        """Tokens of a sample on average."""
        return sum(self.lengths) / len(self.lengths)


@dataclass(frozen=True)
class Choice:
    """What the recipe says of training."""

    method: str
    """full, lora or qlora."""
    why: str
    plan: Plan | None


def run(args: argparse.Namespace) -> int:
    """Write the recipe and print the command.

    Raises:
        MissingFileError: model or data are not there.
        UserError: they cannot be trained, or nothing fits the GPUs.
    """
    out = args.out or Path(f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', args.model.absolute().name) or 'recipe'}.yaml")
    args.data = location(args.data)
    args.images = None if args.images is None else location(args.images)
    _check_arguments(args, out)
    made = Path(f"{out.with_suffix('')}-data")
    if made.exists() and not is_prepared(args.data):
        raise UserError(f"{made}: exists already and is left as it is; give another --out, or remove it")
    try:
        return _prepare_and_write(args, out)
    except BaseException:
        if not is_prepared(args.data):
            shutil.rmtree(made, ignore_errors=True)  # of this call: another one begins anew
        raise


def _prepare_and_write(args: argparse.Namespace, out: Path) -> int:
    """Look at the data, choose, and write the recipe."""
    data = _data(args, out.with_suffix(""))
    tree: dict[str, Any] = {
        "output_dir": str(Path("runs") / out.stem),
        "data": {**data, "sequence_length": _UNIT},
        "optimizer": {"lr": 1e-5},
        "training": {"epochs": 1, "global_batch_size": 1},
        "checkpoint": {"load": str(args.model)},
    }
    tree["data"]["sequence_length"] = _positions(tree)
    found = _measure(_loaded(tree))
    length = _length(found, tree["data"]["sequence_length"])
    gpus = args.gpus if args.gpus is not None else _gpus_here()
    tree["data"]["sequence_length"] = length
    tree["training"]["precision"] = "bf16" if gpus else "fp32"
    choice = _choose(tree, gpus, args.gpu, found)
    _fill(tree, found, choice, gpus)
    recipe = _loaded(tree)
    check_recipe(recipe, max(gpus, 1))
    check_paths(recipe)
    check_load(recipe)
    with_tokenizer_of_load(recipe)
    out.write_text(_written(tree, found, choice, args, gpus), encoding="utf-8")
    logger.info("wrote %s", out)
    print(_command(out, gpus))  # noqa: T201 - what was asked for
    return 0


def _check_arguments(args: argparse.Namespace, out: Path) -> None:
    for name in ("model", "data"):
        if isinstance(getattr(args, name), Path) and not getattr(args, name).exists():
            raise MissingFileError(f"--{name} {getattr(args, name)}: no such file or directory")
    if not holds_model(args.model) and not holds_checkpoint(args.model):
        raise UserError(f"--model {args.model}: is neither a Hugging Face directory nor a checkpoint of megavlm")
    if args.gpus is not None and args.gpus < 1:
        raise UserError(f"--gpus must be at least 1, not {args.gpus}; leave it out for a machine without")
    if args.gpu is not None:
        choose_gpu(args.gpu)
    if out.exists():
        raise UserError(f"--out {out}: exists already and is left as it is; give another, or remove it")
    if not out.absolute().parent.is_dir():
        raise MissingFileError(f"--out {out}: no directory {out.absolute().parent}")


def _loaded(tree: dict[str, Any]) -> Recipe:
    """Return a tree as a typed recipe."""
    return recipe_of(tree, expand_recipe)


def _data(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Return the keys of ``data`` that say where the samples are, some of many held out.

    Raises:
        MissingFileError: the pictures are not there.
    """
    if is_prepared(args.data):
        return {"train": [{"path": str(args.data)}], "validation": []}
    options = Preparation(args.data, args.images)
    check_there(options)
    held_out = _split(args, root)
    # Pictures are where they were, also for records that were written elsewhere.
    images = {"images": str(options.folder)} if args.images is not None or held_out else {}
    sources = [[{"path": str(file), **images}] for file in held_out or (args.data,)]
    return {"train": sources[0], "validation": sources[1] if held_out else [], "cache": f"{root}-data"}


def _split(args: argparse.Namespace, root: Path) -> tuple[Path, Path] | None:
    """Write the records as two files, some held out of the other; None where they are few, or are no list."""
    if isinstance(args.data, str):  # of an object store
        return None
    images = args.images or args.data.absolute().parent
    source = Source(args.data, images)
    if source.is_folder or files_of(args.data) or not source.is_list:
        return None
    count = sum(1 for _ in source.rows())
    if count < _HELD_OUT_FROM:
        return None
    chosen = set(random.Random(1234).sample(range(count), min(_HELD_OUT_MOST, int(count * _HELD_OUT_SHARE))))
    folder = Path(f"{root}-data") / "records"
    folder.mkdir(parents=True, exist_ok=True)
    files = folder / "train.jsonl", folder / "heldout.jsonl"
    with files[0].open("w", encoding="utf-8") as train, files[1].open("w", encoding="utf-8") as other:
        for index, record in enumerate(Source(args.data, images).rows()):
            if isinstance(record, Broken):  # as prepare does, but that its line is not there any more
                logger.warning("%s: %s", args.data, record.reason)
                continue
            (other if index in chosen else train).write(json.dumps(record) + "\n")
    return files


def _positions(tree: dict[str, Any]) -> int:
    """Return the longest pack that the model is made for."""
    return int(_loaded(tree).model.language.max_position_embeddings)


def _gpus_here() -> int:
    from megavlm.parallel.device import gpu_count  # noqa: PLC0415 - torch

    return gpu_count()


def _measure(recipe: Recipe) -> Measured:
    """Return what the data holds, as the model's tokenizer, template and image plan make tokens of it.

    Raises:
        UserError: no sample is usable.
    """
    from megavlm.data.inspect.collect import collect  # noqa: PLC0415 - torch
    from megavlm.data.media import plan_of  # noqa: PLC0415
    from megavlm.data.tokenizer import tokenizer_of  # noqa: PLC0415

    recipe = with_tokenizer_of_load(recipe)
    plan = plan_of(recipe.model)
    (counts,) = collect(recipe.data, tokenizer_of(recipe), plan, 1234, samples=0, packs=0, scan=_SCANNED).counts
    pictures = sum(number * samples for number, samples in counts.images.items()) / len(counts.lengths)
    causes = {"too long": "longer than the model's positions"}
    left_out = ", ".join(f"{number} {causes.get(cause, cause)}" for cause, number in counts.skipped.most_common())
    return Measured(counts.total, tuple(sorted(counts.lengths)), pictures, left_out)


def _length(found: Measured, positions: int) -> int:
    """Return the length of a pack: so that hardly a sample is too long, and not longer than the model is made for."""
    most, usual = found.lengths[-1], found.lengths[min(len(found.lengths) - 1, int(0.99 * len(found.lengths)))]
    wanted = most if most <= _LONGER * usual else usual
    # Short samples share packs: fewer positions are left over, and products are large.
    several = min(4096, 4 * found.tokens, found.samples * found.tokens / 16)
    rounded = -(-max(wanted, several, _SHORTEST) // _UNIT) * _UNIT
    return int(min(rounded, positions))


def _choose(tree: dict[str, Any], gpus: int, kind: str | None, found: Measured) -> Choice:
    """Return how the model is trained: whole if that fits, else with LoRA, else with Q-LoRA.

    Raises:
        UserError: nothing fits.
    """
    if not gpus:
        return _choose_on_cpu(tree)
    gpu = choose_gpu(kind)
    reasons: list[str] = []
    for method in ("full", "lora", "qlora"):
        trial = json.loads(json.dumps(tree))
        _set_method(trial, method)
        trial["training"] |= {"train_steps": 1000, "epochs": None, "global_batch_size": gpus}
        recipe = _loaded(trial)
        plans = search(recipe, gpus, gpu, _workload(recipe, found)).plans
        if plans:
            why = f"{plans[0].fullest / GIB:.0f} of {gpu.memory_bytes / GIB:.0f} GiB on {gpus} x {gpu.name}, predicted"
            return Choice(method, "; ".join([*reasons, f"{method} takes {why}"]), plans[0])
        reasons.append(f"{method} does not fit {gpus} x {gpu.name}")
    raise UserError(f"--gpus {gpus}: {', nor '.join(reasons)}; give more, or a larger --gpu ({_larger(gpu)})")


def _larger(gpu: Gpu) -> str:
    names = [name for name, one in GPUS.items() if one.memory_bytes > gpu.memory_bytes]
    return ", ".join(names) or "there is none in the table"


def _choose_on_cpu(tree: dict[str, Any]) -> Choice:
    """Choose without a planner, which knows GPUs alone: by the memory that weights and optimizer take."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    trial = json.loads(json.dumps(tree))
    _set_method(trial, "full")
    recipe = _loaded(trial)
    needed = sum(dataclasses.astuple(static_bytes(recipe, layout_of(recipe, 1), 0)))
    if needed <= memory / 2:
        return Choice("full", f"fp32 with its optimizer takes {needed / GIB:.1f} of {memory / GIB:.0f} GiB here", None)
    return Choice("lora", f"all weights would take {needed / GIB:.1f} of {memory / GIB:.0f} GiB here", None)


def _workload(recipe: Recipe, found: Measured) -> Workload:
    """Return what a pack of these samples holds."""
    samples = max(1.0, recipe.data.sequence_length / found.tokens)
    typical = assume_workload(recipe)
    most = max(recipe.data.sequence_length // 16, 1)
    images = min(found.images * samples, max(typical.images, 1.0) * 4)
    try:
        return assume_workload(recipe, images_per_pack=images, samples_per_pack=min(samples, most))
    except RecipeError:  # more pictures than those of the assumed size that fit
        return assume_workload(recipe, samples_per_pack=min(samples, most))


def _set_method(tree: dict[str, Any], method: str) -> None:
    tree["modules"] = {"vision": {"freeze": True}}
    if method == "full":
        return
    tree["modules"]["connector"] = {"freeze": True}
    tree["lora"] = {"rank": 64, "alpha": 128, "dropout": 0.05, "targets": ["all-linear"]}
    if method == "qlora":
        tree["lora"]["quantize"] = "nf4"


def _fill(tree: dict[str, Any], found: Measured, choice: Choice, gpus: int) -> None:
    """Set what follows from the numbers: batch, passes, warm-up, intervals, layout."""
    replicas = choice.plan.layout.data if choice.plan is not None else 1
    packs = max(1.0, found.samples * found.tokens / tree["data"]["sequence_length"])
    epochs = 3 if found.samples < _FEW else 1
    batch = replicas
    while batch * 2 <= min(_MOST_BATCH, packs / _STEPS):
        batch *= 2
    if choice.plan is not None and choice.plan.layout.virtual:  # micro-batches come in groups as long as the pipeline
        unit = choice.plan.layout.pipeline * replicas
        batch = -(-batch // unit) * unit
    steps = max(2, math.ceil(epochs * packs / batch))
    _set_method(tree, choice.method)
    if choice.plan is not None:
        tree |= overrides(choice.plan)
    lr = 1e-5 if choice.method == "full" else 1e-4
    tree["optimizer"] = {
        "lr": lr, "schedule": "cosine", "warmup_steps": min(max(1, round(0.03 * steps)), steps // 2),
        "adam_beta2": 0.98, "clip_grad": 1.0,
    }  # fmt: skip
    tree["training"] |= {"epochs": epochs, "global_batch_size": batch}
    if tree["data"]["validation"]:
        tree["training"]["validation_interval"] = max(1, steps // 10)
    tree["checkpoint"] |= {"save_interval": max(1, steps // 5), "export_hf": "last"}
    tree["logging"] = {"log_interval": max(1, min(10, steps // 20))}
    tree["data"]["num_workers"] = 2 if gpus else 0


def _written(tree: dict[str, Any], found: Measured, choice: Choice, args: argparse.Namespace, gpus: int) -> str:
    """Return the recipe as YAML, with what its numbers come from."""
    length, held_out = tree["data"]["sequence_length"], bool(tree["data"]["validation"])
    too_long = 1 - found.share_within(length)
    low, middle, high = (found.lengths[int(share * (len(found.lengths) - 1))] for share in (0.1, 0.5, 0.9))
    notes = {
        "output_dir": "Checkpoints, logs, and in hf/ the trained model as a Hugging Face directory.",
        "data": (
            f"{found.samples:,} samples; of {len(found.lengths):,} that were measured 10 % have up to {low:,} tokens, "
            f"half {middle:,}, 90 % {high:,}, the longest {found.lengths[-1]:,}; {found.images:.2f} pictures each. "
            f"Packs of {length:,} leave out {too_long:.1%} as too long"
            + (f"; left out besides: {found.left_out}" if found.left_out else "")
            + (". Plain data is prepared in cache, and again where its files change" if "cache" in tree["data"] else "")
            + ("." if held_out else "; too few, or no list, to hold some out for validation.")
        ),
        "modules": f"What is trained: {choice.why}. Set freeze to false for the tower to be trained too.",
        "lora": "Adapters on every linear layer of the language model; the export has them merged, and as PEFT's.",
        "parallel": "The fastest layout that fits, predicted: megavlm plan tells more.",
        "optimizer": "Warm-up is 3 % of the steps. lr is what decides most: try 0.5 and 2 times this one too.",
        "training": "epochs: passes over the data. global_batch_size: packs of one step.",
        "checkpoint": "Model, template, image plan and tokenizer come from load; it is converted once.",
        "logging": "TensorBoard lies in output_dir/tensorboard.",
    }
    given = {"model": args.model, "data": args.data, "images": args.images, "gpus": gpus or None, "gpu": args.gpu}
    names = " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in given.items() if value is not None)
    lines = [f"# Written by: megavlm init {names}", ""]
    for key in notes:
        if key in tree:
            lines += [*_comment(notes[key]), yaml12.dump({key: tree[key]}).rstrip("\n"), ""]
    return "\n".join(lines)


def _comment(text: str) -> Iterator[str]:
    yield from (f"# {line}" for line in textwrap.wrap(text, 110))


def _command(out: Path, gpus: int) -> str:
    """Return the line that starts the run."""
    recipe = shlex.quote(str(out))
    if gpus <= 1:
        return f"megavlm train {recipe}"
    nodes, per_node = nodes_of(gpus)
    several = f"--nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint HOST:29500 --rdzv-id RUN " if nodes > 1 else ""
    return f"torchrun {several}--nproc-per-node {per_node} -m megavlm train {recipe}"
