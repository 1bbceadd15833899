"""What a checkpoint holds, in words or JSON: a Megatron checkpoint or Hugging Face weights."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megavlm.checkpoint.base import RECORD, holds_adapters
from megavlm.checkpoint.paths import read_run, resolve
from megavlm.config.errors import MissingFileError, UserError
from megavlm.config.json_object import read_json

Tree = dict[str, Any]


def describe(path: Path, *, as_json: bool, every: bool) -> str:
    """Return the description of the checkpoint, directory or weight file at ``path``.

    Raises:
        FileNotFoundError, ValueError: it is neither, or damaged.
    """
    facts = inspect_checkpoint(path)
    if as_json:
        return json.dumps(facts, indent=2)
    tensors = facts.pop("tensors")
    shown = tensors if every else _together(tensors)
    width = max((len(name) for name in shown), default=0)
    lines = [f"{key}: {value if isinstance(value, str | int) else json.dumps(value)}" for key, value in facts.items()]
    for name, (shape, dtype, where) in shown.items():
        lines.append(f"  {name:{width}}  {dtype:8} {shape!s:24} {where}")
    return "\n".join(lines)


def inspect_checkpoint(path: Path) -> Tree:
    """Return the facts of a checkpoint; ``tensors`` maps names to [shape, type, where]."""
    if not path.exists():
        raise MissingFileError(f"{path}: no such file or directory")
    megatron = _megatron_directory(path)
    return _megatron(megatron) if megatron is not None else _hugging_face(path)


def _megatron_directory(path: Path) -> Path | None:
    try:
        return resolve(path)
    except FileNotFoundError:
        return None


def _megatron(path: Path) -> Tree:
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata  # noqa: PLC0415

    from megavlm.checkpoint import assets  # noqa: PLC0415
    from megavlm.checkpoint.safe import read_metadata  # noqa: PLC0415

    metadata = read_metadata(path)
    tensors: Tree = {}
    optimizer_bytes = weight_bytes = weights = 0
    for key, entry in sorted(metadata.state_dict_metadata.items()):
        if isinstance(entry, BytesStorageMetadata):
            continue
        nbytes = entry.size.numel() * entry.properties.dtype.itemsize
        if key.startswith("optimizer."):
            optimizer_bytes += nbytes
        else:
            weight_bytes += nbytes
            weights += entry.size.numel()
        chunks = f"{len(entry.chunks)} chunk" + "s" * (len(entry.chunks) != 1)
        tensors[key] = [list(entry.size), _dtype(entry.properties.dtype), chunks]
    record, run = assets.read_record(path), read_run(path)
    facts: Tree = {
        "kind": "Megatron distributed checkpoint",
        "path": str(path),
        "step": run.get("step"),
        "made by": f"megavlm {run.get('megavlm')}",
        "parameters": weights,
        "weights": f"{weight_bytes / 2**30:.2f} GiB",
        "optimizer state": f"{optimizer_bytes / 2**30:.2f} GiB" if optimizer_bytes else "none",
        "parts": sorted({key.split(".", 1)[0] for key in tensors if not key.startswith("optimizer.")}),
    }
    if holds_adapters(path):
        facts["adapters for"] = str(read_json(path / RECORD).get("base"))
    if record:
        facts |= {"family": record.get("family"), "origin": record.get("origin"), "ignored": record.get("ignored")}
        facts |= {"carried": len(record.get("carried") or []), "initialised": record.get("initialised")}
    return {**facts, "tensors": tensors}


def _hugging_face(path: Path) -> Tree:
    from megavlm.parallel.device import prepare_device  # noqa: PLC0415
    from megavlm.weights.source import Source  # noqa: PLC0415 - torch

    source = Source(path)
    prepare_device()
    from megavlm.families.known import detect  # noqa: PLC0415

    try:
        family = detect(source)
        name = f"{family.name} ({family.title})"
    except UserError:
        name = "unknown"
    tensors: Tree = {
        key: [list(info.shape), _dtype(info.dtype), info.file.name] for key, info in sorted(source.tensors.items())
    }
    count = sum(math.prod(info.shape) for info in source.tensors.values())
    return {
        "kind": "Hugging Face weights",
        "path": str(path),
        "family": name,
        "model_type": source.config.get("model_type"),
        "parameters": count,
        "weights": f"{source.size_bytes() / 2**30:.2f} GiB",
        "files": sorted({info.file.name for info in source.tensors.values()}),
        "tensors": tensors,
    }


def _dtype(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _together(tensors: Mapping[str, Any]) -> Tree:
    """Show tensors that differ by a layer's number alone as one."""
    groups: dict[tuple[str, str, str], list[tuple[int, str]]] = {}
    shown: Tree = {}
    for name, (shape, dtype, where) in tensors.items():
        match = re.search(r"\.(\d+)\.", name)
        if match is None:
            shown[name] = (shape, dtype, where)
            continue
        pattern = name[: match.start()] + ".{}." + name[match.end() :]
        groups.setdefault((pattern, str(shape), dtype), []).append((int(match[1]), where))
    for (pattern, shape, dtype), members in groups.items():
        numbers = sorted(number for number, _ in members)
        span = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}..{numbers[-1]}"
        note = "" if len(numbers) == numbers[-1] - numbers[0] + 1 else f" ({len(numbers)} of them)"
        shown[pattern.replace("{}", span)] = (shape, dtype, f"{members[0][1]}{note}")
    return dict(sorted(shown.items()))
