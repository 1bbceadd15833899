"""A checkpoint of weights that is made of another one's, and goes on with its small files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megavlm.checkpoint import assets, manifest
from megavlm.checkpoint.paths import read_run
from megavlm.checkpoint.publish import publishing
from megavlm.checkpoint.stream import ParameterToWrite, write_checkpoint
from megavlm.config import yaml12

DERIVED_FROM = "derived_from"
"""In ``run.json``: the checkpoint that it was made of, which tells what was trained."""


def write_derived(checkpoint: Path, out: Path, pieces: Sequence[ParameterToWrite], recipe: Mapping[str, Any]) -> int:
    """Write a checkpoint with no training state, published whole or not at all.

    Args:
        checkpoint: the one that it comes of.
        out: directory to write; it must not exist, or be empty.
        pieces: every parameter.
        recipe: its recipe, as a tree; ``checkpoint.load`` of it becomes ``out``.

    Returns:
        The bytes of the parameters.
    """
    total = sum(torch.Size(piece.slot.shape).numel() * piece.dtype.itemsize for piece in pieces)
    tree = {**recipe, "checkpoint": {**(recipe.get("checkpoint") or {}), "load": str(out.absolute())}}
    with publishing(out, needed_bytes=total) as partial:
        with tqdm(total=total, unit="B", unit_scale=True, desc="writing", disable=None) as bar:
            write_checkpoint(partial, pieces, bar.update)
        assets.inherit(checkpoint, None, partial)
        (partial / "recipe.yaml").write_text(yaml12.dump(tree), encoding="utf-8")
        run = {**read_run(checkpoint), DERIVED_FROM: str(checkpoint.absolute())}
        (partial / "run.json").write_text(json.dumps(run, indent=2), encoding="utf-8")
        manifest.write_manifest(partial, {})
    return total
