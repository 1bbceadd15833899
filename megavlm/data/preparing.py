"""A data set as it is published becomes checked shards that the reader can train from.

``megavlm prepare`` calls it, and :mod:`megavlm.data.cache` for a recipe that names plain data.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megavlm.config.errors import MissingFileError, UserError
from megavlm.config.prepared import META
from megavlm.data.codes import CARD, PictureCoder
from megavlm.data.fetch import FetchError, fetch
from megavlm.data.films.header import read_index
from megavlm.data.films.source import FilePart
from megavlm.data.formats import Broken, BrokenError, Format, Record, Source, choose
from megavlm.data.formats.films import settled_films, stored_film
from megavlm.data.formats.pictures import settled
from megavlm.data.images import MAX_BYTES, ImageError, decode_with_pil, read_header
from megavlm.data.machine import is_file, is_machine_fault
from megavlm.data.schema import FilmName, UnsafePathError, parse_conversation
from megavlm.data.shards import ShardWriter, TaskWriter, write_metadata
from megavlm.data.store import Store, is_url

logger = logging.getLogger(__name__)

REJECTED_FILE = "rejected.jsonl"
_LOGGED_REJECTIONS = 20
_TELL_EVERY = 30.0
"""Seconds."""
_FETCHED = ".source"
"""Directory of what comes from an object store, while it is read."""
_OF_FORMATS = ("annotations", "image_info", "per_sample", "boxes")
"""Options that some formats take."""
_URL_IMAGE = re.compile(r"<img>\s*(https?://[^<]*?)\s*</img>")


@dataclass(frozen=True)
class Preparation:
    """What is prepared, and how."""

    data: Path | str
    """File or directory, or its URL on an object store."""
    images: Path | str | None = None
    """Directory, or URL, that image paths start from; None for where the data is."""
    format: str | None = None
    """Name of the format; None for what the data looks like."""
    annotations: Path | None = None
    image_info: Path | None = None
    per_sample: int | None = None
    allow_urls: bool = False
    """Whether pictures that are http(s) URLs are fetched."""
    allow_links: bool = False
    """Whether symbolic links that lead out of the image directory are followed."""
    samples_per_shard: int = 1000
    by_task: bool = False
    """Whether each task becomes a data set of its own."""
    name: str | None = None
    """Start of every sample's key; None for the name of the data."""
    resize: int | None = None
    """JPEGs whose longer side has more pixels are encoded again."""
    boxes: str | None = None
    """Notation of boxes that a format gives in pixels; None for Qwen-VL's."""

    @property
    def folder(self) -> Path | str:
        """Where pictures are."""
        if self.images is not None:
            return self.images
        if isinstance(self.data, str):
            return Store(self.data).folder
        return self.data if self.data.is_dir() else self.data.absolute().parent

    @property
    def stem(self) -> str:
        """What every sample's key starts with."""
        path = Path(self.data) if isinstance(self.data, str) else self.data.resolve()
        return self.name or re.sub(r"[^A-Za-z0-9_-]+", "-", path.stem)


@dataclass
class Summary:
    """What has become of the records."""

    samples: int = 0
    images: int = 0
    films: int = 0
    causes: Counter[str] = field(default_factory=Counter)
    """Of the records that were rejected."""
    first_reason: str = ""
    sets: dict[str, ShardWriter] = field(default_factory=dict)
    """By task; the name of the only one is empty."""
    ignored: Counter[str] = field(default_factory=Counter)
    """Keys that nothing looks at, and how many records have each."""

    @property
    def shards(self) -> int:
        """Files that were written."""
        return sum(len(writer.names) for writer in self.sets.values())

    @property
    def rejected(self) -> int:
        """Records that were."""
        return self.causes.total()

    @property
    def reasons(self) -> str:
        """Causes and how often each was met, the most frequent first."""
        return ", ".join(f"{number} {cause}" for cause, number in self.causes.most_common())


def location(text: str | Path) -> Path | str:
    """Return the path that a user gave, or the URL of an object store as it is.

    Raises:
        UserError: It is a URL that is not read.
    """
    return text if isinstance(text, str) and is_url(text) else Path(text)


def check_there(options: Preparation) -> None:
    """Check that the data and its pictures are there, as far as that is seen without opening them.

    Raises:
        MissingFileError: They are not.
        UserError: The data is prepared already.
    """
    if isinstance(options.data, Path):
        if not options.data.exists():
            raise MissingFileError(f"{options.data} does not exist")
        if (options.data / META).exists():
            raise UserError(f"{options.data} is prepared already; train from it as it is")
    if isinstance(options.folder, Path) and not options.folder.is_dir():
        raise MissingFileError(f"image directory {options.folder} does not exist")


def write_samples(options: Preparation, directory: Path, coder: PictureCoder | None = None) -> Summary:
    """Write the samples and the list of what was rejected; :func:`finish` makes the data set whole.

    Args:
        options: What is prepared.
        directory: Where to, empty.
        coder: Makes codes of pictures, which go into the shards; None for none.

    Raises:
        MissingFileError: The data is not there.
        UserError: It is of no known format, or none of its records is usable.
    """
    fetched = directory / _FETCHED
    try:
        source = open_source(options, fetched)
        records = choose_format(options, source).load().read(source)
        summary = _write_shards(records, source, directory, options, coder)
    finally:
        shutil.rmtree(fetched, ignore_errors=True)
    if coder is not None:
        for writer in summary.sets.values():
            (writer.directory / CARD).write_text(coder.card.to_json(), encoding="utf-8")
    summary.ignored = source.ignored
    if not summary.samples:
        raise UserError(f"{options.data}: all {summary.rejected} records are rejected; first: {summary.first_reason}")
    return summary


def finish(summary: Summary) -> None:
    """Write the index of each data set."""
    for writer in summary.sets.values():
        write_metadata(writer.directory, writer.names, writer.samples)


def tell(summary: Summary, what: Path | str, out: Path) -> None:
    """Log what has become of the records of ``what``."""
    logger.info(
        "%s: %d samples with %d images%s in %d shards; %d rejected%s",
        out,
        summary.samples,
        summary.images,
        f" and {summary.films} films" if summary.films else "",
        summary.shards,
        summary.rejected,
        f" (see {out / REJECTED_FILE})" if summary.rejected else "",
    )
    if summary.causes:
        logger.info("rejected by cause: %s", summary.reasons)
    if summary.ignored:
        counts = ", ".join(f"{key} ({number} records)" for key, number in summary.ignored.most_common())
        logger.warning("keys of the records that are not used: %s", counts)


def open_source(options: Preparation, fetched: Path) -> Source:
    """Open the data; what lies on an object store is fetched first, its pictures when they are asked for.

    Args:
        options: What it is.
        fetched: Directory for what is fetched; it need not exist.

    Raises:
        MissingFileError: There is nothing at the URL.
        UserError, MachineError: The object store refuses, or is not reached.
    """
    path, folder = options.data, options.folder
    if isinstance(path, str):
        logger.info("%s: fetching", path)
        path = Store(path).fetch(fetched)
    extra = {name: getattr(options, name) for name in _OF_FORMATS}
    if isinstance(folder, str):
        return Source(path, fetched, store=Store(folder), **extra)
    return Source(path, folder, **extra)


def choose_format(options: Preparation, source: Source) -> Format:
    """Return the format that was named, or that the data looks like.

    Raises:
        UserError: There is none, or an option has no meaning for it.
    """
    chosen = choose(source, options.format)
    for name in _OF_FORMATS:
        if getattr(options, name) is not None and name not in chosen.options:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} has no meaning for the format {chosen.name}; leave it out")
    logger.info("%s: reading %s", options.data, chosen.summary)
    return chosen


def _write_shards(
    records: Iterator[Record | Broken], source: Source, directory: Path, options: Preparation,
    coder: PictureCoder | None,
) -> Summary:  # fmt: skip
    summary, name = Summary(), options.stem
    shown = "codes" if coder is not None else "img"
    folder = options.folder
    bases = [folder] if isinstance(folder, str) else [str(folder.absolute()), str(folder.resolve())]
    with (
        TaskWriter(directory, options.samples_per_shard, by_task=options.by_task) as writer,
        (directory / REJECTED_FILE).open("w") as rejected,
        tempfile.TemporaryDirectory(prefix=".films-", dir=directory) as folder_of_films,
    ):
        made = Path(folder_of_films)
        told = time.monotonic()
        for index, record in enumerate(records):
            if time.monotonic() - told > _TELL_EVERY:
                logger.info("%d samples so far, %d rejected", summary.samples, summary.rejected)
                told = time.monotonic()
            broken = record if isinstance(record, Broken) else None
            members: list[tuple[str, bytes | Path]] = []
            if not isinstance(record, Broken):
                try:
                    record = settled_films(settled(record, bases, source.pictures), bases, source.pictures)
                    members = list(_sample_members(record, source, options, made, coder))
                except (UserError, OSError) as error:
                    if is_machine_fault(error):
                        raise
                    broken = _broken(record, error)
            if broken is None:
                assert isinstance(record, dict)
                writer.write(str(record.get("task") or ""), f"{name}-{index:08d}", members)
                summary.samples += 1
                summary.images += sum(member.startswith(shown) for member, _ in members)
                summary.films += sum(member.startswith("filmindex") for member, _ in members)
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
    summary.sets = writer.sets
    return summary


def _broken(record: Any, error: UserError | OSError) -> Broken:
    """What to say of a record that raised ``error``."""
    if isinstance(error, BrokenError | UnsafePathError):
        cause = error.cause
    else:
        cause = "unreadable image" if isinstance(error, OSError) else "bad record"
    return Broken(record.get("id") if isinstance(record, dict) else None, cause, str(error))


def _sample_members(
    record: Any, source: Source, options: Preparation, made: Path, coder: PictureCoder | None
) -> Iterator[tuple[str, bytes | Path]]:
    """Names and contents of a sample's files: the record, its images, their codes, its films with their indices."""
    urls: dict[str, str] = {}
    if options.allow_urls:
        record, urls = _name_urls(record)
    conversation = parse_conversation(record, answers_show=coder is not None)
    if not any(turn.weight for turn in conversation.turns if turn.role == "assistant"):
        raise BrokenError("nothing to train on", "every answer of the record has weight 0")
    kept = {key: record[key] for key in ("id", "task", "conversations", "films") if key in record}
    yield "json", json.dumps(kept).encode()
    for number, path in enumerate(conversation.images):
        data = _fetch(urls[path]) if path in urls else _read_image(path, source, options)
        try:
            picture = _check_image(data, options.resize)
            if coder is None or coder.card.pictures:
                yield f"img{number}", picture
            if coder is not None:
                yield f"codes{number}", coder.member(picture)
        except ImageError as error:
            raise BrokenError(f"bad image ({error.cause})", f"image {path!r}: {error}") from None
    for number, film in enumerate(conversation.films):
        yield from _film_members(number, film, source, options, made)


def _film_members(
    number: int, film: FilmName, source: Source, options: Preparation, made: Path
) -> Iterator[tuple[str, bytes | Path]]:
    """Names and contents of a film's files: the film as it is, and its index."""
    what = repr(film.path) if film.path else f"of {len(film.frames)} frames from {film.frames[0]!r}"
    try:
        data = stored_film(film, source, made / f"{number}", allow_links=options.allow_links)
        part = data if isinstance(data, bytes) else FilePart(str(data), 0, data.stat().st_size)
        index = read_index(part)
    except ImageError as error:
        raise BrokenError(f"bad film ({error.cause})", f"film {what}: {error}") from None
    except OSError as error:
        if is_machine_fault(error):
            raise
        raise BrokenError("unreadable film", f"film {what}: {error}") from None
    yield f"film{number}", data
    yield f"filmindex{number}", index.to_bytes()


def _read_image(path: str, source: Source, options: Preparation) -> bytes:
    if path in source.pictures or source.store is not None:
        return source.read_image(path)
    resolved = source.resolved(path, "image", allow_links=options.allow_links)
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
