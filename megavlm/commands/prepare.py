"""``megavlm prepare``: a data set as it is published becomes a checked webdataset that the reader can train from.

The directory is built beside ``--out`` and renamed at the end, so a half-written one is never seen.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import logging
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megavlm.config import yaml12
from megavlm.config.errors import MissingFileError, UserError
from megavlm.data.fetch import FetchError, fetch
from megavlm.data.formats import Broken, BrokenError, Record, Source, choose, formats
from megavlm.data.formats.base import relative
from megavlm.data.images import MAX_BYTES, ImageError, decode_with_pil, read_header
from megavlm.data.machine import is_file, is_machine_fault
from megavlm.data.publish import clear_leftovers, new_directory
from megavlm.data.schema import UnsafePathError, parse_conversation
from megavlm.data.shards import ShardWriter, TaskWriter, write_metadata

logger = logging.getLogger(__name__)

REJECTED_FILE = "rejected.jsonl"
DATA_FILE = "data.yaml"
"""The data sets of --by-task as keys of a recipe."""
_LOGGED_REJECTIONS = 20
_TELL_EVERY = 30.0
"""Seconds."""
_URL_IMAGE = re.compile(r"<img>\s*(https?://[^<]*?)\s*</img>")


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
        "json", type=Path, metavar="FILE", help="the data set's file (.json, .jsonl or .parquet), or a folder of them"
    )
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="directory that image paths start from (default: where the file is)"
    )
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
    _check_arguments(args)
    records, source = _records(args)
    name = args.name or re.sub(r"[^A-Za-z0-9_-]+", "-", args.json.resolve().stem)
    with new_directory(args.out, replace=args.overwrite) as partial:
        summary = _write_shards(records, source.pictures, partial, name, args)
        if not summary.samples:
            raise UserError(f"{args.json}: all {summary.rejected} records are rejected; first: {summary.first_reason}")
        share = summary.rejected / (summary.samples + summary.rejected)
        if share > args.max_rejected:
            raise UserError(
                f"{args.json}: {share:.1%} of the records are rejected ({summary.reasons}), more than --max-rejected "
                f"{args.max_rejected:g}; nothing is written; first: {summary.first_reason}"
            )
        for writer in summary.sets.values():
            write_metadata(writer.directory, writer.names, writer.samples)
        if args.by_task:
            (partial / DATA_FILE).write_text(_data_yaml(summary.sets, args.out.absolute()), encoding="utf-8")
    logger.info(
        "%s: %d samples with %d images in %d shards; %d rejected%s",
        args.out,
        summary.samples,
        summary.images,
        summary.shards,
        summary.rejected,
        f" (see {args.out / REJECTED_FILE})" if summary.rejected else "",
    )
    if args.by_task:
        logger.info("%d tasks; train on them with --overrides %s", len(summary.sets), args.out / DATA_FILE)
    if summary.causes:
        logger.info("rejected by cause: %s", summary.reasons)
    if source.ignored:
        counts = ", ".join(f"{key} ({number} records)" for key, number in source.ignored.most_common())
        logger.warning("keys of the records that are not used: %s", counts)
    return 0


@dataclass
class _Summary:
    samples: int = 0
    images: int = 0
    causes: Counter[str] = field(default_factory=Counter)
    first_reason: str = ""
    shards: int = 0
    sets: dict[str, ShardWriter] = field(default_factory=dict)

    @property
    def rejected(self) -> int:
        return self.causes.total()

    @property
    def reasons(self) -> str:
        """Causes and how often each was met, the most frequent first."""
        return ", ".join(f"{number} {cause}" for cause, number in self.causes.most_common())


def _records(args: argparse.Namespace) -> tuple[Iterator[Record | Broken], Source]:
    """What the input holds, in the format that was named or that it looks like, and the input."""
    options = {name: getattr(args, name) for name in ("annotations", "image_info", "per_sample")}
    source = Source(args.json, args.images, **options)
    chosen = choose(source, args.format)
    for name, value in options.items():
        if value is not None and name not in chosen.options:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} has no meaning for the format {chosen.name}; leave it out")
    logger.info("%s: reading %s", args.json, chosen.summary)
    return chosen.load().read(source), source


def _check_arguments(args: argparse.Namespace) -> None:
    if not args.json.exists():
        raise MissingFileError(f"{args.json} does not exist")
    if args.images is None:
        args.images = args.json if args.json.is_dir() else args.json.absolute().parent
    if not args.images.is_dir():
        raise MissingFileError(f"image directory {args.images} does not exist")
    if args.samples_per_shard < 1:
        raise UserError(f"--samples-per-shard must be at least 1, not {args.samples_per_shard}")
    if not 0 <= args.max_rejected <= 1:
        raise UserError(f"--max-rejected must be a share from 0 to 1, not {args.max_rejected:g}")
    if args.resize is not None and args.resize < 1:
        raise UserError(f"--resize must be at least 1, not {args.resize}")
    if args.name is not None and not re.fullmatch(r"[A-Za-z0-9_-]+", args.name):
        raise UserError(f"--name may hold letters, digits, - and _ only, not {args.name!r}")
    clear_leftovers(args.out)
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out} is not a directory")
    if args.out.is_dir() and any(args.out.iterdir()) and not args.overwrite:
        raise UserError(f"--out {args.out} is not empty; choose another directory or add --overwrite")


def _write_shards(
    records: Iterable[Record | Broken],
    pictures: Mapping[str, bytes],
    directory: Path,
    name: str,
    args: argparse.Namespace,
) -> _Summary:
    summary = _Summary()
    root = args.images.resolve()
    with (
        TaskWriter(directory, args.samples_per_shard, by_task=args.by_task) as writer,
        (directory / REJECTED_FILE).open("w") as rejected,
    ):
        told = time.monotonic()
        for index, record in enumerate(records):
            if time.monotonic() - told > _TELL_EVERY:
                logger.info("%d samples so far, %d rejected", summary.samples, summary.rejected)
                told = time.monotonic()
            broken = record if isinstance(record, Broken) else None
            members: list[tuple[str, bytes]] = []
            if not isinstance(record, Broken):
                try:
                    members = list(_sample_members(record, root, pictures, args))
                except (UserError, OSError) as error:
                    if is_machine_fault(error):
                        raise
                    broken = _broken(record, error)
            if broken is None:
                assert isinstance(record, dict)
                writer.write(str(record.get("task") or ""), f"{name}-{index:08d}", members)
                summary.samples += 1
                summary.images += len(members) - 1
                continue
            reason = " ".join(broken.reason.split())
            summary.causes[broken.cause] += 1
            summary.first_reason = summary.first_reason or reason
            line = {"index": index, "id": broken.id, "cause": broken.cause, "reason": reason}
            rejected.write(json.dumps(line) + "\n")
            if summary.rejected <= _LOGGED_REJECTIONS:
                whose = "" if broken.id is None else f" (id {broken.id})"
                logger.warning("record %d%s rejected: %s", index, whose, reason)
    if summary.rejected > _LOGGED_REJECTIONS:
        logger.warning("%d more rejected; %s has them all", summary.rejected - _LOGGED_REJECTIONS, REJECTED_FILE)
    summary.shards, summary.sets = writer.shards, writer.sets
    return summary


def _data_yaml(sets: Mapping[str, ShardWriter], out: Path) -> str:
    """The data sets as keys of a recipe, drawn by their numbers of samples."""
    train = []
    for task, writer in sets.items():
        name = writer.directory.name
        train.append({"path": str(out / name), "name": name, "weight": writer.samples, "task": task})
    return yaml12.dump({"data": {"train": train}})


def _broken(record: Any, error: UserError | OSError) -> Broken:
    """What to say of a record that raised ``error``."""
    if isinstance(error, BrokenError):
        cause = error.cause
    elif isinstance(error, UnsafePathError):
        cause = "unsafe image path"
    else:
        cause = "unreadable image" if isinstance(error, OSError) else "bad record"
    return Broken(record.get("id") if isinstance(record, dict) else None, cause, str(error))


def _sample_members(
    record: Any, root: Path, pictures: Mapping[str, bytes], args: argparse.Namespace
) -> Iterator[tuple[str, bytes]]:
    """Names and contents of a sample's files: the record, then its images."""
    urls: dict[str, str] = {}
    if args.allow_urls:
        record, urls = _name_urls(record)
    record = relative(record, args.images)
    conversation = parse_conversation(record)
    if not any(turn.weight for turn in conversation.turns if turn.role == "assistant"):
        raise BrokenError("nothing to train on", "every answer of the record has weight 0")
    kept = {key: record[key] for key in ("id", "task", "conversations") if key in record}
    yield "json", json.dumps(kept).encode()
    for number, path in enumerate(conversation.images):
        if path in pictures:
            data = pictures[path]
        else:
            data = _fetch(urls[path]) if path in urls else _read_image(path, root, args.allow_links)
        try:
            yield f"img{number}", _check_image(data, args.resize)
        except ImageError as error:
            raise BrokenError(f"bad image ({error.cause})", f"image {path!r}: {error}") from None


def _read_image(path: str, root: Path, allow_links: bool) -> bytes:
    try:
        resolved = (root / path).resolve(strict=True)
    except (OSError, RuntimeError) as error:
        if is_machine_fault(error):
            raise
        raise BrokenError("image missing", f"image {path!r} does not exist in {root}") from None
    if not allow_links and not resolved.is_relative_to(root):
        raise BrokenError(
            "unsafe image path", f"image {path!r} leads out of {root} by a link; --allow-links follows it"
        )
    if not is_file(resolved):
        raise BrokenError("image missing", f"image {path!r} is not a file")
    size = resolved.stat().st_size
    if size > MAX_BYTES:
        raise BrokenError("bad image (too large)", f"image {path!r} has {size:,} bytes, at most {MAX_BYTES:,}")
    return resolved.read_bytes()


def _name_urls(record: Any) -> tuple[Any, dict[str, str]]:
    """Put a name where a URL is; shards have no URLs. Also return the URL of each name."""
    urls: dict[str, str] = {}

    def name(found: re.Match[str]) -> str:
        path = f"fetched-{hashlib.sha256(found[1].encode()).hexdigest()[:16]}"
        urls[path] = found[1]
        return f"<img>{path}</img>"

    turns = record.get("conversations") if isinstance(record, dict) else None
    if not isinstance(turns, list):
        return record, urls
    named = [
        turn | {"value": _URL_IMAGE.sub(name, turn["value"])}
        if isinstance(turn, dict) and isinstance(turn.get("value"), str)
        else turn
        for turn in turns
    ]
    return record | {"conversations": named}, urls


def _fetch(url: str) -> bytes:
    try:
        return fetch(url)
    except FetchError as error:
        raise BrokenError("image not fetched", str(error)) from None


def _check_image(data: bytes, resize: int | None) -> bytes:
    header = read_header(data)
    if not header.plain:
        # Odd files are few; decoding them now finds what the header does not tell.
        decode_with_pil(data)
    if resize is None or header.kind != "jpeg" or max(header.width, header.height) <= resize:
        return data
    image = decode_with_pil(data)
    image.thumbnail((resize, resize))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92, subsampling=0)
    return buffer.getvalue()
