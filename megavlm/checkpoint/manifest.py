"""What makes a checkpoint whole: a list of its files with sizes and digests, written last.

A directory without a manifest was never published. One whose files differ from it is damaged.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
_VERSION = 1

Files = dict[str, dict[str, Any]]
"""By path relative to the checkpoint: ``bytes`` and, unless only sizes are kept, ``sha256``."""


def digest(path: Path) -> dict[str, Any]:
    """Return size and SHA-256 of a file, after flushing it to disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def list_files(checkpoint: Path) -> list[str]:
    """Return the relative paths of all files but the manifest, sorted."""
    found = (path for path in checkpoint.rglob("*") if path.is_file())
    return sorted(name for path in found if (name := path.relative_to(checkpoint).as_posix()) != MANIFEST)


def write_manifest(checkpoint: Path, known: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the manifest of the files that are there, and flush directories.

    Args:
        checkpoint: the directory.
        known: digests that are known already; the others are computed.
    """
    files: Files = {}
    for name in list_files(checkpoint):
        files[name] = dict(known.get(name) or digest(checkpoint / name))
    write_text(checkpoint / MANIFEST, json.dumps({"version": _VERSION, "files": files}, indent=1))
    for root, _, _ in os.walk(checkpoint):
        sync_directory(Path(root))


def read_manifest(checkpoint: Path) -> Files:
    """Return the files that a checkpoint should have.

    Raises:
        ValueError: there is no manifest, or it is broken.
    """
    path = checkpoint / MANIFEST
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        sizes = {name: int(entry["bytes"]) for name, entry in files.items()}
    except FileNotFoundError:
        raise ValueError(f"{checkpoint}: has no {MANIFEST}, so it was never finished") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: broken: {error}") from None
    for name in sizes:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{path}: names {name!r}, outside of the checkpoint")
    result: Files = files
    return result


def check(checkpoint: Path, share: int = 0, shares: int = 1) -> None:
    """Check a checkpoint against its manifest.

    Args:
        checkpoint: the directory.
        share: which share of the files to read (their sizes are all checked).
        shares: how many shares there are; ranks read one each.

    Raises:
        ValueError: a file is missing, or differs; the message names it.
    """
    files = read_manifest(checkpoint)
    for position, name in enumerate(sorted(files)):
        path = checkpoint / name
        if not path.is_file():
            raise ValueError(f"{path}: missing")
        if path.stat().st_size != files[name]["bytes"]:
            raise ValueError(f"{path}: has {path.stat().st_size} bytes instead of {files[name]['bytes']}")
        expected = files[name].get("sha256")
        if expected is not None and position % shares == share and digest(path)["sha256"] != expected:
            raise ValueError(f"{path}: its contents are not those that were saved")


def write_text(path: Path, text: str) -> None:
    """Write a small file and flush it to disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_text(path: Path, text: str) -> None:
    """Replace a small file atomically."""
    beside = path.with_name(path.name + ".new")
    write_text(beside, text)
    beside.replace(path)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Flush a directory's entries to disk."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
