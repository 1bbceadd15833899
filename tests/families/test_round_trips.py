"""HF -> Megatron -> HF gives back every tensor bit for bit, and the same configuration, for every family."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from blip2_models import BLIP2
from chameleon_models import CHAMELEON
from cobra_models import COBRA
from cogagent_models import COGAGENT
from cogvlm_models import COGVLM
from deepseek_models import DEEPSEEK
from family_cases import FAMILY_OF, MAKERS, TRANSFORMERS
from family_cases import make as make_other
from family_choice import PARTS
from gemma_models import GEMMA3, PALIGEMMA
from glm4v_models import GLM4V
from idefics3_models import IDEFICS3
from internvl_models import INTERNVL
from llava_connectors_models import CONNECTORS
from llava_like_models import LLAVA_LIKE
from llava_next_models import LLAVA_TILES
from minicpm_v_models import MINICPM_V
from minigemini_models import MINIGEMINI
from minigpt_models import MINIGPT
from mllama_models import MLLAMA
from moe_llava_models import MOE_LLAVA
from pieces_models import PIECES
from qwen2_vl_models import QWEN2_VL
from qwen3_vl_models import QWEN3_VL
from rice_models import RICE
from t5_models import T5
from text_cases import ROWS
from tinygpt_models import TINYGPT
from tinyllava_models import TINYLLAVA
from tower_models import TOWERS
from vary_models import VARY

from megavlm.cli import main
from megavlm.config.architecture import BRANCHES
from megavlm.families.known import FAMILIES, detect
from megavlm.families.presets import load_presets
from megavlm.weights.source import Source

OTHERS = (
    TINYLLAVA
    | PIECES
    | CONNECTORS
    | MINIGEMINI
    | LLAVA_TILES
    | QWEN2_VL
    | QWEN3_VL
    | GLM4V
    | RICE
    | PALIGEMMA
    | GEMMA3
    | LLAVA_LIKE
    | MINICPM_V
    | COGVLM
    | CHAMELEON
    | COGAGENT
    | COBRA
    | TOWERS
    | BLIP2
    | MINIGPT
    | TINYGPT
    | DEEPSEEK
    | IDEFICS3
    | MLLAMA
    | MOE_LLAVA
    | T5
    | VARY
)
CASES = {
    **FAMILY_OF,
    **dict.fromkeys(INTERNVL, "internvl"),
    **dict.fromkeys(("internvl_chat", "internvl_chat_moe"), "internvl_chat"),
    "intern_vit": "intern_vit",
    **{name: family for name, (family, _) in OTHERS.items()},
    **{name: row.family for name, row in ROWS.items()},
}
"""Checkpoints, and their families."""
ALONE = {"mm_projector", "llava_original_apart"}
"""Families that are a part, or parts in several places, which other tests make."""


def make(name: str, directory: Path) -> Path:
    if name in OTHERS:
        return OTHERS[name][1](directory)
    if name in ROWS and name not in TRANSFORMERS:
        ROWS[name].make().save_pretrained(directory)
        return directory
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


@pytest.mark.proves("round_trip", entry="name")
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.family(CASES[name])) for name in CASES])
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
    # A checkpoint in pieces has its weights in folders.
    assert len(list(back.rglob("model-*.safetensors"))) > 1 and list(back.rglob("model.safetensors.index.json"))
    for file in (file for file in source.rglob("*.json") if not file.name.endswith(".index.json")):
        assert (back / file.relative_to(source)).read_text() == file.read_text()
    assert detect(Source(back)).name == detect(Source(source)).name == CASES[name]


def test_every_family_is_tried_and_its_parts_are_known(tmp_path: Path) -> None:
    """PARTS is what picks the tests of a family (make test-families)."""
    load_presets()
    found: dict[str, set[str]] = defaultdict(set)
    for name in CASES:
        source = Source(make(name, tmp_path / name))
        family = detect(source)
        for branch, values in family.branches(source).items():
            if branch not in BRANCHES:
                continue
            architecture = BRANCHES[branch].find(values["preset"]).architecture
            assert architecture is not None
            found[family.name].add(
                architecture.build.removeprefix("megavlm.architectures.").removesuffix(".build:build")
            )
    assert FAMILY_OF.keys() == {*MAKERS, *TRANSFORMERS}
    assert found.keys() | ALONE == FAMILIES.keys() == PARTS.keys()
    # A pair of towers is built of them, and its connector of an MLP's layers.
    found["minigemini"] |= {"towers.vit", "towers.convnext", "connectors.mlp"}
    found["deepseek_vl_hybrid"] |= {"towers.vit", "towers.sam", "connectors.mlp"}
    found["vary"] |= {"towers.vit", "towers.sam"}
    for name in ("cobra", "cogagent"):
        found[name].add("towers.vit")
    assert found == {name: set(PARTS[name]) for name in found}
