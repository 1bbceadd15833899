"""Plain data in a recipe: prepared on the fly, once, into a directory that all runs share.

``data.train.0.path`` may name what ``megavlm prepare`` reads. What is made of it lies in ``data.cache`` under a name
that says what it was made of (:func:`_key`): the bytes of the data files, the image directory, the format, and the
version of this code. It is published whole. Of several ranks and runs that want it one writes and the others wait; the
lock of a writer that was killed is taken over (:mod:`megavlm.parallel.lock`).

The identity that a reader's state asks for is a digest of the shards themselves: prepared again, on another machine or
at another place, the same samples are the same data set, and a run goes on with them where it stopped.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from megavlm.config.checks import source_name
from megavlm.config.errors import MachineError, UserError, disk_problem
from megavlm.config.prepared import META
from megavlm.config.schema import DataConfig, DataSource
from megavlm.data.formats.columns import FILE as COLUMNS_FILE
from megavlm.data.preparing import (
    REJECTED_FILE,
    Preparation,
    check_there,
    finish,
    location,
    tell,
    write_samples,
)
from megavlm.data.publish import new_directory, write_whole
from megavlm.data.store import Store, is_data
from megavlm.parallel.lock import HeldError, held

logger = logging.getLogger(__name__)

VERSION = 2
"""Of what is prepared: another number is another data set."""
CARD = "cache.json"
"""What a prepared data set was made of."""
_MEMOS = "known"
"""Directory of the keys of data that was read before, by names, sizes and times of its files."""
_POLL_SECONDS = 0.5
_TELL_EVERY = 30.0
_PIECE = 1 << 22
_DEPTH = 2
"""Directories below the one that is named, in which data files are looked for."""

T = TypeVar("T")


def is_prepared(path: str | Path) -> bool:
    """Whether a path is a directory that ``megavlm prepare`` wrote."""
    return (Path(path) / META).is_dir()


def cache_directory(data: DataConfig) -> Path:
    """Return where plain data is prepared: ``data.cache``, or the user's cache directory."""
    if data.cache is not None:
        return Path(data.cache)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "megavlm" / "data"


def located(source: DataSource, data: DataConfig) -> DataSource:
    """Return a data set of a recipe as it can be read: prepared, and under the name that it has in the recipe.

    Raises:
        UserError: The data is missing or of no known format, too much of it is rejected, or the cache is damaged.
        MachineError: The cache cannot be written.
    """
    if is_prepared(source.path):
        return source
    name = source_name(source)
    directory = _prepared(source.path, source.images, source.format, cache_directory(data).absolute())
    card = _card(directory)
    rejected, samples = card["rejected"], card["samples"]
    if rejected + samples >= data.max_bad_after_samples and rejected > data.max_bad_fraction * (rejected + samples):
        raise UserError(
            f"{source.path}: {rejected} of {rejected + samples} records are rejected ({card['reasons']}), more than "
            f"data.max_bad_fraction ({data.max_bad_fraction:g}); {directory / REJECTED_FILE} lists them. If "
            f"pictures were missing or broken and are not any more, remove {directory}"
        )
    return replace(source, path=str(directory), name=name, images=None, format=None)


@functools.lru_cache(maxsize=256)
def _prepared(path: str, images: str | None, data_format: str | None, cache: Path) -> Path:
    """Return the directory of what is prepared of a path, and prepare it where nobody has yet."""
    options = Preparation(location(path), None if images is None else location(images), data_format)
    check_there(options)
    try:
        (cache / _MEMOS).mkdir(parents=True, exist_ok=True)
        files = _files(options)
        where = str(options.data if isinstance(options.data, str) else options.data.absolute())
        memo = cache / _MEMOS / f"{_digest([where, files, _about(options)])}.json"
        key = _known(memo, cache)
        if key is None:
            key = _waiting(path, lambda: _keyed(memo, files, options, cache))
        out = cache / key
        if out.exists():
            card = _card(out)
            logger.info("%s: prepared before, in %s: %d samples, %d records rejected", path, out, card["samples"],
                        card["rejected"])  # fmt: skip
        else:
            _waiting(path, lambda: _write(options, out, key))
    except OSError as error:
        problem = None if isinstance(error, UserError) else disk_problem(error, cache)
        if problem is None:
            raise
        raise MachineError(f"data.cache: {problem}") from error
    _card(out)
    return out


def _keyed(memo: Path, files: list[list[Any]], options: Preparation, cache: Path) -> str:
    """Return the key of the data, and note it; one process at a time reads the files for it."""
    with held(memo.with_suffix(".lock"), "prepare", f"data.cache: {cache}"):
        key = _known(memo, cache)
        if key is None:
            key = _key(files, options)
            write_whole(memo, json.dumps({"key": key}).encode())
    return key


def _known(memo: Path, cache: Path) -> str | None:
    """Return the key that a memo has; None where there is none, or it is no whole one."""
    try:
        key = json.loads(memo.read_text(encoding="utf-8"))["key"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return key if isinstance(key, str) and (cache / key).parent == cache else None


def _key(files: list[list[Any]], options: Preparation) -> str:
    """Return the name of what is prepared of some files: readable, and a digest."""
    if isinstance(options.data, str):
        contents: list[Any] = files  # the store's own versions: nothing need be fetched to ask
    else:
        base = options.data if options.data.is_dir() else options.data.parent
        contents = [[name, _digest_of(base / name)] for name, *_ in files]
    return f"{options.stem[:60]}-{_digest([contents, _about(options)])[:20]}"


def _about(options: Preparation) -> list[Any]:
    """Return what else decides what the samples are."""
    folder = options.folder
    return [VERSION, options.stem, folder if isinstance(folder, str) else str(folder.resolve()), options.format]


def _files(options: Preparation) -> list[list[Any]]:
    """Return name, size and version (or time) of each data file, by name; pictures are not among them."""
    if isinstance(options.data, str):
        items = Store(options.data).listing()
        return [list(item) for item in items if len(items) == 1 or is_data(item[0])]
    data = options.data
    found = [data]
    if data.is_dir():
        found = [path for depth in range(_DEPTH) for path in data.glob("/".join(["*"] * (depth + 1)))]
        found = [path for path in found if is_data(path.name) and not path.name.startswith(".") and path.is_file()]
    beside = data.absolute().parent / COLUMNS_FILE
    if beside.is_file() and data.name != COLUMNS_FILE:
        found.append(beside)
    base = data if data.is_dir() else data.parent
    return [[os.path.relpath(path, base), path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(found)]


def _digest_of(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while piece := content.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _waiting(what: str, act: Callable[[], T]) -> T:
    """Do something that one process at a time may do, and wait for another that does it."""
    told = 0.0
    while True:
        try:
            return act()
        except HeldError as error:
            if time.monotonic() - told > _TELL_EVERY:
                logger.info("%s: another process prepares it; waiting (%s)", what, error)
                told = time.monotonic()
            time.sleep(_POLL_SECONDS)


def _write(options: Preparation, out: Path, key: str) -> None:
    """Prepare the data, unless another has done so meanwhile."""
    with _made_by_another(out), new_directory(out, replace=False) as partial:
        if out.exists():
            raise FileExistsError
        logger.info("%s: preparing it, once, in %s", options.data, out)
        summary = write_samples(options, partial)
        finish(summary)
        (writer,) = summary.sets.values()
        # In the place of Energon's random one: what is equal is the same data set, wherever it was prepared.
        identity = uuid.uuid5(uuid.NAMESPACE_OID, writer.digest.hexdigest())
        (partial / META / "index.uuid").write_text(str(identity), encoding="utf-8")
        card = {"version": VERSION, "key": key, "data": str(options.data), "images": str(options.folder),
                "samples": summary.samples, "rejected": summary.rejected, "reasons": summary.reasons}  # fmt: skip
        write_whole(partial / CARD, json.dumps(card).encode())
        tell(summary, options.data, out)


@contextlib.contextmanager
def _made_by_another(out: Path) -> Iterator[None]:
    try:
        yield
    except (FileExistsError, UserError) as error:
        if isinstance(error, HeldError) or not (out / CARD).is_file():
            raise


def _card(directory: Path) -> dict[str, Any]:
    """Return what a prepared data set says of itself.

    Raises:
        UserError: It was not made by this version, or is not whole any more.
    """
    remedy = "remove the directory, or name another data.cache"
    try:
        card = json.loads((directory / CARD).read_text(encoding="utf-8"))
        version, key = card["version"], card["key"]
        numbers = [card["samples"], card["rejected"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"data.cache: {directory} is damaged: it has no whole {CARD}; {remedy}") from None
    if version != VERSION:
        raise UserError(f"data.cache: {directory} is of version {version!r}, this megavlm's is {VERSION}; {remedy}")
    if key != directory.name or not all(isinstance(number, int) for number in numbers) or "reasons" not in card:
        raise UserError(f"data.cache: {directory} is damaged: its {CARD} is of {key!r}; {remedy}")
    found: dict[str, Any] = card
    return found
