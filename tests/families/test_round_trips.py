"""HF -> Megatron -> HF gives back every tensor bit for bit, and the same configuration, for every family."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from family_cases import MAKERS, TRANSFORMERS
from family_cases import make as make_other
from internvl_models import INTERNVL

from megavlm.cli import main
from megavlm.families.known import FAMILIES, detect
from megavlm.weights.source import Source

CASES = [*MAKERS, *TRANSFORMERS, *INTERNVL]


def make(name: str, directory: Path) -> Path:
    return INTERNVL[name](directory) if name in INTERNVL else make_other(name, directory)


def convert_in(source: Path, out: Path) -> Path:
    assert main(["convert", "hf-to-megatron", "--hf", str(source), "--out", str(out)]) == 0
    return out


def convert_out(checkpoint: Path, out: Path, *more: str) -> Path:
    assert main(["convert", "megatron-to-hf", "--megatron", str(checkpoint), "--out", str(out), *more]) == 0
    return out


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    source = Source(directory)
    return {name: source.get(name) for name in source.tensors}


@pytest.mark.parametrize("name", CASES)
def test_there_and_back(name: str, tmp_path: Path) -> None:
    source = make(name, tmp_path / "hf")
    checkpoint = convert_in(source, tmp_path / "megatron")
    record = json.loads((checkpoint / "hf" / "conversion.json").read_text())
    back = convert_out(checkpoint, tmp_path / "back", "--max-shard-size", "0.00005")
    before, after = tensors(source), tensors(back)
    ignored = {tensor for names in record["ignored"].values() for tensor in names}
    assert set(after) == set(before) - ignored
    for tensor, value in after.items():
        assert value.dtype == before[tensor].dtype and torch.equal(value, before[tensor]), tensor
    assert len(list(back.glob("model-*.safetensors"))) > 1 and (back / "model.safetensors.index.json").is_file()
    for file in (file for file in source.glob("*.json") if not file.name.endswith(".index.json")):
        assert (back / file.name).read_text() == file.read_text()
    assert detect(Source(back)).name == detect(Source(source)).name


def test_every_family_is_tried(tmp_path: Path) -> None:
    found = {detect(Source(make(name, tmp_path / name))).name for name in CASES}
    assert found | {"mm_projector", "llava_original_apart"} == set(FAMILIES)
