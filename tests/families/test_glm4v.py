"""GLM-4.1V computes what Transformers' class computes, at one process and cut over four.

Weights there and back are in test_round_trips.py, tokens of 500 sizes in tests/data/test_native_plan.py.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from glm4v_models import GLM4V, glm4v, save
from internvl_cases import compare
from native_cases import LAYOUT, answers_are_theirs, convert, merged, write_reference
from test_qwen2_vl_sizes import count, model_of
from transformers import AutoConfig, AutoModelForImageTextToText

from megavlm.architectures.connectors.downsample_merger import cost
from megavlm.architectures.context import BuildContext
from megavlm.checkpoint.hf.shapes import alone
from megavlm.config.errors import UserError
from megavlm.config.schema import ParallelConfig
from megavlm.families.known import FAMILIES
from megavlm.families.preprocessor import trained_preprocessor
from megavlm.models.vlm import VisionLanguageModel
from megavlm.weights.source import Source

pytestmark = pytest.mark.family("glm4v")


def test_features_logits_gradients_and_steps(tmp_path: Path) -> None:
    """At one process and at TP 2 x PP 2 with sequence parallelism."""
    model = glm4v()
    save(model, tmp_path / "hf")
    recipe = convert(tmp_path / "hf", tmp_path / "m")
    assert recipe.model.template == "glm4v"
    image = recipe.model.image
    assert (image.kind, image.min_pixels, image.max_pixels, image.enlarge_to_block) == ("native", 256, 4096, True)
    write_reference(model, recipe, tmp_path / "reference.safetensors")
    paths = str(tmp_path / "m"), str(tmp_path / "reference.safetensors")
    found, losses = compare(*paths, [])
    assert sum(name.startswith("connector.") for name in found) == 8
    assert losses[0] > losses[1] > losses[2]
    results = ranks.run("internvl_cases:compare", *paths, LAYOUT, world=4, timeout=600)
    assert set().union(*(there for there, _ in results)) == set(found)
    for _, there in results:
        assert there == pytest.approx(losses, rel=1e-4)


def test_greedy_answers_are_theirs(tmp_path: Path) -> None:
    """Of pictures that are not square: two, one, none."""
    model = glm4v(tied=True)
    save(model, tmp_path / "hf")
    answers_are_theirs(model, tmp_path)


def test_a_flat_configuration_is_the_same_model(tmp_path: Path) -> None:
    made = [GLM4V[name][1](tmp_path / name) for name in ("glm4v", "glm4v_flat")]
    one, other = (FAMILIES["glm4v"].branches(Source(directory)) for directory in made)
    assert one == other and one["language"]["rotary_percent"] == 0.5


def test_pictures_go_home_as_they_came(tmp_path: Path) -> None:
    """The file counts both frames of a patch, as its processor does."""
    save(glm4v(), tmp_path / "hf")
    model = convert(tmp_path / "hf", tmp_path / "m").model
    old = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    assert trained_preprocessor(model, old, FAMILIES["glm4v"].trained_pictures(model, old))["size"] == old["size"]
    new = trained_preprocessor(model, {}, FAMILIES["glm4v"].trained_pictures(model, {}))
    assert (new["size"], new["image_processor_type"]) == (old["size"], "Glm4vImageProcessor")


def test_families_know_their_own(tmp_path: Path) -> None:
    save(glm4v(), tmp_path / "hf")
    model = convert(tmp_path / "hf", tmp_path / "m").model
    family = FAMILIES["glm4v"]
    assert family.refusal(model) is None
    for part, keys, said in (
        ("language", {"rotary_sections": ()}, "not in sections"),
        ("language", {"add_qkv_bias": False}, "no bias"),
        ("language", {"post_layernorms": False}, "post_layernorms"),
        ("vision", {"post_layernorm": False}, "post_layernorm"),
        ("vision", {"ffn_hidden_size": 60}, "not as wide as the language model"),
        ("connector", {"layernorm_epsilon": 1e-6}, "another epsilon"),
        ("image", {"enlarge_to_block": False}, "not enlarged first"),
    ):
        other = dataclasses.replace(model, **{part: dataclasses.replace(getattr(model, part), **keys)})
        assert said in str(family.refusal(other)), part
    for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4"):
        assert FAMILIES[name].refusal(model) is not None, name


@pytest.mark.parametrize(
    ("file", "values", "said"),
    [
        ("config.json", {"vision_config": {"out_hidden_size": 32}}, "vectors of 32, but the language model takes 64"),
        ("config.json", {"vision_config": {"hidden_act": "gelu"}}, "hidden_act is 'gelu'"),
        ("config.json", {"vision_config": {"image_size": 30}}, "image_size 30 is no multiple of patch_size (4)"),
        ("config.json", {"text_config": {"head_dim": 32}}, "head_dim is 32"),
        ("config.json", {"text_config": {"hidden_act": "gelu"}}, "hidden_act is 'gelu'"),
        ("preprocessor_config.json", {"size": {"shortest_edge": 513}}, "513 is no multiple of temporal_patch_size (2)"),
        ("preprocessor_config.json", {"image_processor_type": "Qwen2VLImageProcessor"}, "image_processor_type"),
        ("preprocessor_config.json", {"merge_size": 4}, "merge_size is 4, but config.json's tower has 2"),
    ],
)
def test_what_is_not_supported_is_said(file: str, values: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = save(glm4v(), tmp_path / "hf") / file
    path.write_text(json.dumps(merged(json.loads(path.read_text()), values)))
    with pytest.raises(UserError) as raised:
        FAMILIES["glm4v"].branches(Source(tmp_path / "hf"))
    assert said in str(raised.value)


def test_the_preset_has_the_published_size() -> None:
    """zai-org/GLM-4.1V-9B-Thinking, as Transformers builds it."""
    model, family = model_of("glm4_1v_9b"), FAMILIES["glm4v"]
    assert family.refusal(model) is None
    config = AutoConfig.for_model(**family.config(model, {}))
    with alone(), torch.device("meta"):
        ours = VisionLanguageModel(model, BuildContext(ParallelConfig(), initialize=False), 0)
        theirs = AutoModelForImageTextToText.from_config(config)
    assert count(ours) == count(theirs) == 10_292_777_472
    assert count(theirs.model.visual) == count(ours.vision) + count(ours.connector)
    sizes = sorted(one.elements for one in cost.parameters(model, 1))
    assert sizes == sorted(p.numel() for p in ours.connector.parameters())
