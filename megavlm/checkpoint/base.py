"""The base of a checkpoint of adapters: where it lies, and whether its weights are those that the adapters are for.

``adapter.json`` beside the tensors has the base's path, the same relative to itself (so that both may move together),
and a digest. Nothing here imports torch: commands ask before a process group starts.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from megavlm.checkpoint.paths import resolve
from megavlm.config.errors import UserError
from megavlm.config.json_object import read_json

RECORD = "adapter.json"

_SAMPLES, _SAMPLE_BYTES = 8, 1 << 14
_REMEDY = "name the checkpoint that they were trained on: checkpoint.load=DIR (megavlm convert: --base DIR)"


def weights_digest(checkpoint: Path) -> str:
    """Return the SHA-256 of sizes and samples (up to 128 KiB) of a checkpoint's tensor files.

    A step of training changes nearly every number, so samples tell weights apart, also 30 GB of them in no time.
    """
    found = hashlib.sha256()
    for path in sorted(checkpoint.glob("*.distcp")):
        size = path.stat().st_size
        found.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for i in range(_SAMPLES):
                file.seek(max(size - _SAMPLE_BYTES, 0) * i // (_SAMPLES - 1))
                found.update(file.read(_SAMPLE_BYTES))
    return found.hexdigest()


def record(base: Path, checkpoint: Path) -> str:
    """Return the text of ``adapter.json`` for adapters of ``base`` in ``checkpoint`` (or a directory beside it)."""
    relative = os.path.relpath(base.absolute(), checkpoint.absolute())
    entry = {"base": str(base.absolute()), "relative": relative, "weights_sample_sha256": weights_digest(base)}
    return json.dumps(entry, indent=2) + "\n"


def holds_adapters(checkpoint: Path) -> bool:
    """Whether a checkpoint has adapters, and not the weights that they are for."""
    return (checkpoint / RECORD).is_file()


def base_of(checkpoint: Path, named: str | Path | None = None) -> Path:
    """Return the checkpoint whose weights the adapters of ``checkpoint`` are for.

    Args:
        checkpoint: one that :func:`holds_adapters`.
        named: a checkpoint or a run's directory where it may lie as well, if it has been moved.

    Raises:
        UserError: it is gone, or its weights are others now.
    """
    found = read_json(checkpoint / RECORD)
    path, wanted, other = Path(str(found.get("base"))), found.get("weights_sample_sha256"), None
    for candidate in (path, checkpoint / str(found.get("relative", "")), *_named(named, path.name)):
        if not (candidate / "run.json").is_file() or holds_adapters(candidate):
            continue
        if wanted in (None, weights_digest(candidate)):
            return candidate if candidate == path else candidate.resolve()
        other = other or candidate
    if other is not None:
        raise UserError(f"{checkpoint}: its adapters are for other weights than {other} has now; {_REMEDY}")
    raise UserError(f"{checkpoint}: holds adapters for {path}, which is not there; {_REMEDY}")


def _named(named: str | Path | None, name: str) -> Iterator[Path]:
    """Yield what a user may mean: that directory, the checkpoint of that name in it, or its newest."""
    if named is None:
        return
    root = Path(named)
    yield from (root, root / name, root / "checkpoints" / name)
    try:
        yield resolve(root)
    except FileNotFoundError:
        return


def base_for(checkpoint: Path, named: str | Path | None) -> Path | None:
    """Return :func:`base_of` a checkpoint of adapters, and None for one of whole weights.

    Args:
        checkpoint: any.
        named: the recipe's ``checkpoint.load``.

    Raises:
        UserError: as :func:`base_of`.
    """
    return base_of(checkpoint, named) if holds_adapters(checkpoint) else None
