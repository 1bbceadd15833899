"""``megavlm prepare``: a data set as it is published becomes a checked webdataset that the reader can train from.

The directory is built beside ``--out`` and renamed at the end, so a half-written one is never seen.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from megavlm.config import yaml12
from megavlm.config.errors import UserError
from megavlm.data.codes import PictureCoder
from megavlm.data.formats import formats
from megavlm.data.preparing import Preparation, check_there, finish, location, tell, write_samples
from megavlm.data.publish import clear_leftovers, new_directory
from megavlm.data.shards import ShardWriter

logger = logging.getLogger(__name__)

DATA_FILE = "data.yaml"
"""The data sets of --by-task as keys of a recipe."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = (
        "Check a data set as it is published, and write it as shards that training reads.\n"
        "What cannot be used is counted, and listed in OUT/rejected.jsonl."
    )
    width = max(len(entry.name) for entry in formats()) + 2
    listing = "\n".join(f"  {entry.name:{width}}{entry.summary}" for entry in formats())
    parser.epilog = f"formats:\n{listing}\n\ndocs/data.md tells more."
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "json",
        metavar="FILE",
        help="the data set's file (.json, .jsonl, .parquet, .tar), a folder of them, a saved Hugging Face data set, or "
        "the URL of one of these on an object store (s3://, gs://)",
    )
    parser.add_argument(
        "--images", metavar="DIR",
        help="directory, or URL, that image paths start from (default: where the file is)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--format", metavar="NAME", help="what the file is, see below (default: what it looks like)")
    parser.add_argument("--annotations", type=Path, metavar="FILE", help="vqa: the answers, where VQAv2 has them apart")
    parser.add_argument("--image-info", type=Path, metavar="FILE", help="vg-regions: Visual Genome's image_data.json")
    parser.add_argument("--per-sample", type=int, metavar="N", help="vg-regions: regions of one sample (default 8)")
    parser.add_argument(
        "--allow-urls", action="store_true", help="fetch pictures that are http(s) URLs, from public addresses"
    )
    parser.add_argument(
        "--allow-links", action="store_true", help="follow symbolic links that lead out of the image directory"
    )
    parser.add_argument(
        "--samples-per-shard", type=int, default=1000, metavar="N", help="samples of one tar file (default 1000)"
    )
    parser.add_argument(
        "--by-task",
        action="store_true",
        help="a data set for each task, OUT/TASK, and OUT/data.yaml, which megavlm train takes with --overrides",
    )
    parser.add_argument("--name", help="start of every sample's key (default: the name of FILE)")
    parser.add_argument("--resize", type=int, metavar="N", help="re-encode JPEGs whose longer side is over N pixels")
    parser.add_argument(
        "--image-codes", type=Path, metavar="CHECKPOINT",
        help="of a model whose pictures are tokens (Chameleon): encode each picture once, and store its codes",
    )  # fmt: skip
    parser.add_argument(
        "--codes-only", action="store_true", help="with --image-codes: leave the pictures themselves out"
    )
    parser.add_argument(
        "--max-rejected", type=float, default=1.0, metavar="SHARE",
        help="write nothing where more of the records than this share is rejected, 0 to 1 (default 1: no limit)",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it is not empty")


def run(args: argparse.Namespace) -> int:
    """Write the data set.

    Returns:
        0, also when some records were rejected (they are in ``rejected.jsonl``).

    Raises:
        MissingFileError: The JSON file or the image directory is missing.
        UserError: An argument is wrong, ``--out`` is not empty, or no record is usable.
    """
    options = Preparation(
        location(args.json),
        None if args.images is None else location(args.images),
        args.format,
        args.annotations,
        args.image_info,
        args.per_sample,
        args.allow_urls,
        args.allow_links,
        args.samples_per_shard,
        args.by_task,
        args.name,
        args.resize,
    )
    _check_arguments(args, options)
    with new_directory(args.out, replace=args.overwrite) as partial:
        with _coder(args) as coder:
            summary = write_samples(options, partial, coder)
        share = summary.rejected / (summary.samples + summary.rejected)
        if share > args.max_rejected:
            raise UserError(
                f"{args.json}: {share:.1%} of the records are rejected ({summary.reasons}), more than --max-rejected "
                f"{args.max_rejected:g}; nothing is written; first: {summary.first_reason}"
            )
        finish(summary)
        if args.by_task:
            (partial / DATA_FILE).write_text(_data_yaml(summary.sets, args.out.absolute()), encoding="utf-8")
    tell(summary, options.data, args.out)
    if args.by_task:
        logger.info("%d tasks; train on them with --overrides %s", len(summary.sets), args.out / DATA_FILE)
    return 0


def _check_arguments(args: argparse.Namespace, options: Preparation) -> None:
    check_there(options)
    if args.samples_per_shard < 1:
        raise UserError(f"--samples-per-shard must be at least 1, not {args.samples_per_shard}")
    if not 0 <= args.max_rejected <= 1:
        raise UserError(f"--max-rejected must be a share from 0 to 1, not {args.max_rejected:g}")
    if args.resize is not None and args.resize < 1:
        raise UserError(f"--resize must be at least 1, not {args.resize}")
    if args.name is not None and not re.fullmatch(r"[A-Za-z0-9_-]+", args.name):
        raise UserError(f"--name may hold letters, digits, - and _ only, not {args.name!r}")
    if args.codes_only and args.image_codes is None:
        raise UserError("--codes-only needs --image-codes CHECKPOINT, whose encoder makes the codes; add it")
    clear_leftovers(args.out)
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out} is not a directory")
    if args.out.is_dir() and any(args.out.iterdir()) and not args.overwrite:
        raise UserError(f"--out {args.out} is not empty; choose another directory or add --overwrite")


@contextlib.contextmanager
def _coder(args: argparse.Namespace) -> Iterator[PictureCoder | None]:
    """Yield what encodes pictures, where codes are asked for."""
    if args.image_codes is None:
        yield None
        return
    from megavlm.parallel.device import prepare_device  # noqa: PLC0415 - imports torch

    prepare_device()
    from megavlm.inference.codes import picture_coder  # noqa: PLC0415 - imports Megatron-Core

    with picture_coder(args.image_codes, pictures=not args.codes_only) as coder:
        yield coder


def _data_yaml(sets: Mapping[str, ShardWriter], out: Path) -> str:
    """The data sets as keys of a recipe, drawn by their numbers of samples."""
    train = []
    for task, writer in sets.items():
        name = writer.directory.name
        train.append({"path": str(out / name), "name": name, "weight": writer.samples, "task": task})
    return yaml12.dump({"data": {"train": train}})
