"""Files of ``torch.save``, where a family's code reads those instead of safetensors."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megavlm.config.schema import ModelConfig
from megavlm.families.family import Family
from megavlm.weights.source import Source


def write_pickle(partial: Path, name: str) -> int:
    """Put what was written into one file; return how many files there are then."""
    source = Source(partial)
    torch.save({key: source.get(key).clone() for key in source.tensors}, partial / name)
    for path in (*partial.glob("*.safetensors"), *partial.glob("*.safetensors.index.json")):
        path.unlink()
    return 1


def by_part(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return tensors in a dictionary for each part, which their names begin with."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        part, _, rest = name.partition(".")
        found.setdefault(part, {})[rest] = tensor
    return found


def write_pieces(partial: Path, family: Family, model: ModelConfig) -> int:
    """Put what was written of each piece that is one file into that; return how many files there are more."""
    more = 0
    for folder, (name, key) in family.pickles.items():
        if not (partial / folder).is_dir():
            continue
        source = Source(partial / folder)
        state: Mapping[str, Any] = {one: source.get(one).clone() for one in source.tensors}
        (partial / name).parent.mkdir(exist_ok=True)
        state = by_part(state) if family.nested_pickles else state
        settings = family.settings(model)
        told = {"config": settings} if settings else {}
        torch.save(state if key is None else {key: state, **told}, partial / name)
        more += 1 - len({info.file for info in source.tensors.values()})
        shutil.rmtree(partial / folder)
    return more
