"""Qwen3-VL computes what Transformers' class computes, deepstack and all, at one process and cut over four.

Weights there and back are in test_round_trips.py.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import ranks
import torch
from internvl_cases import compare
from native_cases import LAYOUT, answers_are_theirs, convert, write_reference
from qwen3_vl_models import qwen3_vl, save
from test_qwen2_vl_sizes import count, model_of
from transformers import AutoConfig, AutoModelForImageTextToText

from megavlm.architectures.context import BuildContext
from megavlm.checkpoint.hf.shapes import alone
from megavlm.config.errors import UserError
from megavlm.config.schema import ParallelConfig
from megavlm.families.known import FAMILIES
from megavlm.models.vlm import VisionLanguageModel
from megavlm.weights.source import Source

pytestmark = pytest.mark.family("qwen3_vl")


def test_features_logits_gradients_and_steps(tmp_path: Path) -> None:
    """Three levels on stages of two layers: one travels."""
    model = qwen3_vl()
    save(model, tmp_path / "hf")
    recipe = convert(tmp_path / "hf", tmp_path / "m")
    assert recipe.model.template == "qwen3_vl"
    assert recipe.model.vision.image_mean == (0.5, 0.5, 0.5)
    assert recipe.model.language.rotary_sections_interleaved
    write_reference(model, recipe, tmp_path / "reference.safetensors")
    paths = str(tmp_path / "m"), str(tmp_path / "reference.safetensors")
    found, losses = compare(*paths, [])
    assert sum("deepstack" in name for name in found) == 3 * 6
    assert losses[0] > losses[1] > losses[2]
    for _, there in ranks.run("internvl_cases:compare", *paths, LAYOUT, world=4, timeout=600):
        assert there == pytest.approx(losses, rel=1e-4)


@pytest.mark.long
def test_four_stages(tmp_path: Path) -> None:
    """Three levels, of which two travel."""
    model = qwen3_vl()
    save(model, tmp_path / "hf")
    recipe = convert(tmp_path / "hf", tmp_path / "m")
    write_reference(model, recipe, tmp_path / "reference.safetensors")
    paths = str(tmp_path / "m"), str(tmp_path / "reference.safetensors")
    _, losses = compare(*paths, [])
    layout = ["parallel.pipeline_model_parallel_size=4"]
    for _, there in ranks.run("internvl_cases:compare", *paths, layout, world=4, timeout=600):
        assert there == pytest.approx(losses, rel=1e-4)


def test_greedy_answers_are_theirs(tmp_path: Path) -> None:
    """Of pictures that are not square: two, one, none."""
    model = qwen3_vl(tied=True, levels=(0, 2))
    save(model, tmp_path / "hf")
    answers_are_theirs(model, tmp_path)


def test_families_know_their_own(tmp_path: Path) -> None:
    save(qwen3_vl(), tmp_path / "hf")
    model = convert(tmp_path / "hf", tmp_path / "m").model
    family = FAMILIES["qwen3_vl"]
    assert family.refusal(model) is None
    plain = dataclasses.replace(model.language, rotary_sections_interleaved=False)
    twice = dataclasses.replace(model.vision, deepstack_layers=(1, 1))
    assert "interleaved sections" in str(family.refusal(dataclasses.replace(model, language=plain)))
    assert "do not rise" in str(family.refusal(dataclasses.replace(model, vision=twice)))
    flat = dataclasses.replace(model.vision, deepstack_layers=())
    for other in ("qwen2_vl", "qwen2_5_vl"):
        assert "deepstack" in str(FAMILIES[other].refusal(model))
        assert "not in sections" in str(FAMILIES[other].refusal(dataclasses.replace(model, vision=flat)))
        assert FAMILIES[other].refusal(dataclasses.replace(model, language=plain)) is not None
    assert "rotary positions" in str(FAMILIES["llama"].refusal(model))


@pytest.mark.parametrize(
    ("vision", "expected"),
    [
        ({"num_position_embeddings": 35}, "num_position_embeddings 35 is no square"),
        ({"deepstack_visual_indexes": [2, 1]}, "deepstack_visual_indexes [2, 1] do not rise"),
        ({"out_hidden_size": 32}, "vision_config makes vectors of 32, but the language model takes 64"),
    ],
)
def test_configurations_that_are_refused(vision: dict[str, object], expected: str, tmp_path: Path) -> None:
    save(qwen3_vl(), tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    tree = json.loads(path.read_text())
    tree["vision_config"] |= vision
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError) as raised:
        FAMILIES["qwen3_vl"].branches(Source(tmp_path / "hf"))
    assert expected in str(raised.value)


# As the hub counts the parameters of Qwen/Qwen3-VL-*-Instruct.
PUBLISHED = {
    "qwen3_vl_2b": 2_127_532_032, "qwen3_vl_4b": 4_437_815_808, "qwen3_vl_8b": 8_767_123_696,
    "qwen3_vl_32b": 33_357_390_064,
}  # fmt: skip


@pytest.mark.parametrize(
    "preset", [name if name == "qwen3_vl_2b" else pytest.param(name, marks=pytest.mark.long) for name in PUBLISHED]
)
def test_a_preset_has_the_published_size(preset: str) -> None:
    model, family = model_of(preset), FAMILIES["qwen3_vl"]
    assert family.refusal(model) is None
    config = AutoConfig.for_model(**family.config(model, {}))
    with alone(), torch.device("meta"):
        ours = VisionLanguageModel(model, BuildContext(ParallelConfig(), initialize=False), 0)
        theirs = AutoModelForImageTextToText.from_config(config)
    assert count(ours) == count(theirs) == PUBLISHED[preset]
    assert count(theirs.model.visual) == count(ours.vision) + count(ours.connector)
