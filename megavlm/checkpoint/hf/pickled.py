"""Files of ``torch.save``, where a family's code reads those instead of safetensors."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

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


def write_pieces(partial: Path, family: Family, model: ModelConfig) -> int:
    """Put what was written of each piece that is one file into that; return how many files there are more."""
    more = 0
    for folder, (name, key) in family.pickles.items():
        if not (partial / folder).is_dir():
            continue
        source = Source(partial / folder)
        state = {one: source.get(one).clone() for one in source.tensors}
        torch.save(state if key is None else {key: state, "config": family.settings(model)}, partial / name)
        more += 1 - len({info.file for info in source.tensors.values()})
        shutil.rmtree(partial / folder)
    return more
