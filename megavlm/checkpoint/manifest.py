"""What makes a checkpoint whole: a list of its files with sizes and digests, written last.

A directory without a manifest was never published. One whose files differ from it is damaged.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megavlm.config.errors import UserError

MANIFEST = "manifest.json"
_VERSION = 1
_PROOF = 1
"""How a proven checkpoint was proven (:mod:`megavlm.checkpoint.proof`); raise it with what is compared."""
NEEDED = ("run.json", "common.pt", "metadata.json", ".metadata")
"""Files without which nothing can be read, beside the tensors' own."""
_SHARD = re.compile(rb"__[0-9]+_[0-9]+\.distcp")
_INDEX = ".metadata"

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


def write_manifest(checkpoint: Path, known: Mapping[str, Mapping[str, Any]], *, proven: bool = False) -> None:
    """Write the manifest of the files that are there, and flush directories.

    Args:
        checkpoint: the directory.
        known: digests that are known already; the others are computed.
        proven: what is in the files was compared with what was in memory.
    """
    files: Files = {}
    for name in list_files(checkpoint):
        files[name] = dict(known.get(name) or digest(checkpoint / name))
    proof = {"proof": _PROOF} if proven else {}
    write_text(checkpoint / MANIFEST, json.dumps({"version": _VERSION, **proof, "files": files}, indent=1))
    for root, _, _ in os.walk(checkpoint):
        sync_directory(Path(root))


def read_manifest(checkpoint: Path) -> Files:
    """Return the files that a checkpoint should have.

    Raises:
        UserError: there is no manifest, or it is broken: not of this form, or without a file that makes a checkpoint.
    """
    path = checkpoint / MANIFEST
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{checkpoint}: has no {MANIFEST}, so it was never finished") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: broken: {str(error) or type(error).__name__}") from None
    problem = _malformed(tree)
    if problem is None:
        named, there = set(tree["files"]), list_files(checkpoint)
        left_out = next((name for name in _belonging(checkpoint, there) if name not in named), None)
        problem = f"does not name {left_out}" if left_out is not None else None
    if problem is not None:
        raise UserError(f"{path}: broken: {problem}")
    files: Files = tree["files"]
    return files


def _malformed(tree: Any) -> str | None:
    """Return what is wrong with the form of a manifest, or None."""
    if not isinstance(tree, dict) or not isinstance(tree.get("files"), dict):
        return 'it is no object with "files"'
    if type(tree.get("version")) is not int or tree["version"] > _VERSION:
        return f"version {tree.get('version')!r} is not known to this megavlm, which writes {_VERSION}"
    for name, entry in tree["files"].items():
        parts = Path(name).parts
        if not parts or Path(name).is_absolute() or ".." in parts or "\0" in name:
            return f"names {name!r}, outside of the checkpoint"
        if not isinstance(entry, dict):
            return f"says {entry!r} of {name}"
        size, digested = entry.get("bytes"), entry.get("sha256")
        if type(size) is not int or size < 0:
            return f"says that {name} has {size!r} bytes"
        if digested is not None and not (isinstance(digested, str) and re.fullmatch("[0-9a-f]{64}", digested)):
            return f"says that {name} has the digest {digested!r}"
    return None


def _belonging(checkpoint: Path, there: list[str]) -> Iterator[str]:
    """Yield the files that a manifest has to name: those without which it is no checkpoint, and all that it holds."""
    yield from NEEDED
    index = checkpoint / _INDEX
    if index.is_file():
        # A pickle that is not to be opened here; the names of the shards stand in it as they are.
        yield from sorted({name.decode() for name in _SHARD.findall(index.read_bytes())})
    yield from (name for name in there if name.endswith(".distcp") or re.fullmatch(r"(reader|random)-\d+\.json", name))


def is_proven(checkpoint: Path) -> bool:
    """Whether what is in a checkpoint was compared with memory when it was saved; False for older versions' too."""
    try:
        proof = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8")).get("proof")
    except (OSError, ValueError, RecursionError, AttributeError):
        return False
    return type(proof) is int and proof >= 1


def check(checkpoint: Path, share: int = 0, shares: int = 1) -> None:
    """Check a checkpoint against its manifest.

    Args:
        checkpoint: the directory.
        share: which share of the files to read (their sizes are all checked).
        shares: how many shares there are; ranks read one each.

    Raises:
        UserError: a file is missing, or differs; the message names it.
    """
    files = read_manifest(checkpoint)
    _check_sizes(checkpoint, files)
    for position, name in enumerate(sorted(files)):
        path, expected = checkpoint / name, files[name].get("sha256")
        if expected is not None and position % shares == share and digest(path)["sha256"] != expected:
            raise UserError(f"{path}: its contents are not those that were saved")


def _check_sizes(checkpoint: Path, files: Files) -> None:
    for name in sorted(files):
        path = checkpoint / name
        if not path.is_file():
            raise UserError(f"{path}: missing")
        if path.stat().st_size != files[name]["bytes"]:
            raise UserError(f"{path}: has {path.stat().st_size} bytes instead of {files[name]['bytes']}")


def check_for_answers(checkpoint: Path) -> None:
    """Check that the files that answers are made of have the sizes that were saved, where there is a manifest.

    Contents are not compared: that reads every byte. Nor are the recipe and the tokenizer's files, which a user may
    correct, or what only training goes on from.

    Raises:
        UserError: the manifest is broken, or a file is missing or has another size; the message names it.
    """
    if not (checkpoint / MANIFEST).is_file():  # converted, and never trained
        return
    files = read_manifest(checkpoint)
    read = {name: entry for name, entry in files.items() if name in NEEDED or name.endswith(".distcp")}
    try:
        _check_sizes(checkpoint, read)
    except UserError as error:
        raise UserError(f"{error}; the checkpoint is damaged: take another") from None


def check_shards(checkpoint: Path) -> None:
    """Check that the tensors' files have the contents that were saved, as far as a manifest says so.

    For who reads the tensors and nothing else: what is missing or cannot be read, its reader says.

    Raises:
        UserError: one differs; the message names it.
    """
    try:
        files = read_manifest(checkpoint)
    except UserError:  # of another kind, or damaged elsewhere
        return
    for name, entry in sorted(files.items()):
        path, expected = checkpoint / name, entry.get("sha256")
        if not name.endswith(".distcp") or expected is None or not path.is_file():
            continue
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != expected:
            raise UserError(
                f"{path}: its contents are not those that were saved; take another checkpoint, or export what can"
                " be had of this one with convert megatron-to-hf --no-verify"
            )


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
