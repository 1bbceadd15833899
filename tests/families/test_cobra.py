"""Cobra: what goes with it and what does not, its adapters, its projector's widths, and two towers of one picture."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from cobra_models import SIDE, save
from pydantic import TypeAdapter

from megavlm.checkpoint.hf.given import open_directory
from megavlm.config.errors import UserError
from megavlm.config.lora import known_targets
from megavlm.config.schema import ModelConfig
from megavlm.data.media import Box, ImageShape, plan_of
from megavlm.families.known import FAMILIES
from megavlm.families.presets import expand_presets, load_presets


def model_of(preset: str = "cobra_3b", **more: Any) -> ModelConfig:
    load_presets()
    return TypeAdapter(ModelConfig).validate_python(expand_presets({"model": {"preset": preset, **more}})["model"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"arch_specifier": "no-align+fused-ldpnet"}, "arch_specifier is 'no-align+fused-ldpnet'"),
        ({"arch_specifier": "no-align+gelu-mlp"}, "fused-gelu-mlp is supported"),
        ({"vision_backbone_id": "siglip-vit-so400m-384px"}, "vision_backbone_id is 'siglip-vit-so400m-384px'"),
        ({"llm_backbone_id": "mamba-2.8b-slimpj"}, "llm_backbone_id is 'mamba-2.8b-slimpj'"),
        ({"image_resize_strategy": "letterbox"}, "image_resize_strategy is 'letterbox'"),
        ({}, None),
    ],
)
def test_its_codes_other_models_are_refused_by_name(change: dict[str, str], words: str | None, tmp_path: Path) -> None:
    path = save(tmp_path / "hf") / "config.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps({**told, "model": {**told["model"], **change}}))
    if words is None:
        ((one,), _) = open_directory(path.parent)
        assert one.family.name == "cobra" and one.family.branches(one.source)["connector"]["input_expansion"] == 4
        return
    with pytest.raises(UserError) as caught:
        open_directory(path.parent)
    assert words in str(caught.value)


def test_the_file_without_its_towers_says_where_they_belong(tmp_path: Path) -> None:
    directory = save(tmp_path / "hf")
    for file in directory.glob("siglip_featurizer/*"):
        file.unlink()
    (directory / "siglip_featurizer").rmdir()
    with pytest.raises(UserError, match=r"put vit_large_patch14_reg4_dinov2 into .*dino_featurizer"):
        open_directory(directory)


def test_a_model_that_is_none_is_not_written_as_one() -> None:
    model, family = model_of(), FAMILIES["cobra"]
    assert family.refusal(model) is None
    for part, change, words in (
        ("vision", {"high_post_layernorm": True}, "high_post_layernorm"),
        ("vision", {"class_position": True}, "class_position"),
        ("vision", {"high_image_size": 378}, "squares of one size"),
        ("vision", {"layer_scale": False}, "layer_scale"),
        ("vision", {"activation": "quick_gelu"}, "activation"),
        ("vision", {"post_layernorm": True}, "post_layernorm"),
        ("vision", {"normalization": "RMSNorm"}, "normalization"),
        ("vision", {"rotary_base": 10000.0}, "rotary_base"),
        ("vision", {"high_rotary_base": 10000.0}, "high_rotary_base"),
        ("vision", {"high_branch_norms": "behind"}, "high_branch_norms"),
        ("vision", {"high_class_token": True}, "high_class_token"),
        ("vision", {"high_register_tokens": 4}, "high_register_tokens"),
        ("vision", {"high_layer_scale": True}, "high_layer_scale"),
        ("vision", {"high_positional_antialias": True}, "high_positional_antialias"),
        ("vision", {"high_feature_table": True}, "model.vision.high_feature_table"),
        ("vision", {"low_from": "high"}, "low_from"),
        ("vision", {"high_to": "layers"}, "high_to"),
        ("vision", {"high_num_attention_heads": 18}, "not 72 wide"),
        ("connector", {"input_expansion": None}, "the connector is not Cobra's"),
        ("language", {"tie_word_embeddings": False}, "its output layer is its own"),
    ):
        changed = dataclasses.replace(getattr(model, part), **change)
        assert words in str(family.refusal(dataclasses.replace(model, **{part: changed}))), change
    run = dataclasses.replace(model.vision, frozen_tower="low", init_method_std=0.5, layer_scale_init=0.5)
    assert family.refusal(dataclasses.replace(model, vision=run)) is None


def test_what_lora_may_name_are_mambas_layers() -> None:
    assert [target.path for target in known_targets(model_of().language)] == ["mixer.in_proj", "mixer.x_proj"]


def test_each_tower_gets_the_whole_picture_in_its_own_square() -> None:
    model = model_of()
    assert model.vision.grid == model.vision.high.grid == (27, 27) and model.vision.feature_size == 2176
    plan = plan_of(model)
    layout = plan.lay_out(ImageShape(640, 480))
    assert layout.tokens == 729 and plan.row == (2 * 3 * 384**2,) and plan.sides == (384, 384)
    assert [(one.source, one.resized) for one in layout.canvases] == [(Box(0, 0, 640, 480), (384, 384))] * 2
    smaller = dataclasses.replace(model, vision=dataclasses.replace(model.vision, image_size=SIDE))
    assert [one.resized for one in plan_of(smaller).lay_out(ImageShape(9, 7)).canvases] == [(SIDE, SIDE), (384, 384)]
