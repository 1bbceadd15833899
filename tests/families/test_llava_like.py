"""Bunny, Imp, Mipha, LLaVA-Phi, ALLaVA: every combination against its written-out model, templates, S2, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from llava_like_models import LLAVA_LIKE, like_answers, sources
from test_llava_original import convert_in, convert_out, edit, equal, refused, tensors
from test_whole import ABSOLUTE, GRADIENTS
from whole_source import write_reference

from megavlm.checkpoint.hf.given import make_model
from megavlm.config.load import load_recipe
from megavlm.families.known import FAMILIES
from megavlm.families.presets import expand_presets
from megavlm.weights.source import Source

TEMPLATES = {
    "bunny_phi": "vicuna_v1_endoftext", "bunny_stablelm": "vicuna_v1_endoftext", "bunny_qwen2": "vicuna_v1_endoftext",
    "imp_qwen2": "imp_qwen2", "mipha_phi": "vicuna_v1_endoftext", "llava_phi": "vicuna_v1_endoftext",
    "allava": "allava", "allava_stablelm": "allava",
}  # fmt: skip
"""Of those whose tokens the tokenizer at hand has; of the others the rows of a system say it."""
LONGER = ("bunny_phi3", "bunny_stablelm", "bunny_qwen2", "bunny_minicpm", "bunny_llama")
"""Those whose language model and projector others of these have."""
COMBINATIONS = [
    pytest.param(name, marks=[pytest.mark.family(family), *[pytest.mark.long] * (name in LONGER)])
    for name, (family, _) in LLAVA_LIKE.items()
]


@pytest.mark.parametrize("name", COMBINATIONS)
def test_a_combination_is_its_written_out_model(name: str, tmp_path: Path) -> None:
    """Features, logits, the gradient of every parameter, packed and alone, steps and answers, at one process."""
    family = LLAVA_LIKE[name][0]
    source = sources(family)[name]
    source.save(tmp_path / "hf")
    ours = convert_in(tmp_path / "m", "--hf", tmp_path / "hf")
    recipe = load_recipe(ours / "recipe.yaml", [], expand_presets)
    reference = tmp_path / "reference.safetensors"
    write_reference(source, family, recipe, reference)
    wanted = Source(reference)
    (found,) = ranks.run("whole_cases:prove", str(ours), str(reference), [], world=1, planned=False)
    assert max(found.largest.values()) <= ABSOLUTE, found.largest
    parameters = {key.removeprefix("gradient.") for key in wanted.tensors if key.startswith("gradient.")}
    assert set(found.packed) == set(found.alone) == parameters
    worst = {key: value for one in (found.packed, found.alone) for key, value in one.items() if value > GRADIENTS}
    assert not worst
    assert found.loss == pytest.approx((float(wanted.get("mean_loss")),) * 2, rel=1e-5)
    assert found.answers == [wanted.get(f"s{number}.answer").tolist() for number in range(3)]
    assert found.steps[0] > found.steps[1] > found.steps[2]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.family(LLAVA_LIKE[name][0])) for name in TEMPLATES]
)
def test_the_template_is_that_of_its_language_model(name: str, tmp_path: Path) -> None:
    ours = convert_in(tmp_path / "m", "--hf", like_answers(name, tmp_path / "hf"))
    assert load_recipe(ours / "recipe.yaml", [], expand_presets).model.template == TEMPLATES[name]


@pytest.mark.family("bunny")
def test_pictures_at_several_sizes_come_and_go(tmp_path: Path) -> None:
    """S2 in config.json, its default scales, and what does not fit the tower."""
    source = LLAVA_LIKE["bunny_phi3_s2"][1](tmp_path / "hf")
    vision = json.loads((convert_in(tmp_path / "m", "--hf", source) / "hf" / "conversion.json").read_text())["model"]
    assert vision["vision"]["s2_scales"] == [28, 56] and vision["vision"]["image_size"] == 56
    model = make_model({**vision, "image": {"kind": "pad"}}, "here")
    config = FAMILIES["bunny"].config(model, {})
    assert (config["use_s2"], config["s2_scales"], config["mm_hidden_size"]) == (True, "28,56", 96)
    assert config["vision_config.json"]["image_size"] == 28


BAD: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "projector": ("bunny_phi", {"mm_projector_type": "ldp"}, ("'ldp'", "linear and mlpNx_gelu", "mm_projector.0")),
    "depth": ("bunny_phi", {"mm_projector_type": "mlp3x_gelu"}, ("mlp3x_gelu", "those of mlp2x_gelu")),
    "language": ("bunny_phi", {"model_type": "bunny-gemma"}, ("'bunny-gemma'", "bunny-phi, bunny-phi3")),
    "tower": ("imp", {"mm_vision_tower": "openai/clip-vit-large-patch14-336"}, ("1024 wide", "clip-vit-large")),
    "layer": (
        "bunny_phi",
        {"mm_vision_tower": "google/siglip-so400m-patch14-384", "mm_vision_select_layer": -1},
        ("mm_vision_select_layer is -1", "only -2"),
    ),
    "scales": ("bunny_phi3_s2", {"s2_scales": "32,64"}, ("tiles of 32", "28 x 28")),
    "no scales": ("bunny_phi3_s2", {"s2_scales": "large"}, ("s2_scales is 'large'", "commas")),
    "several sizes": ("bunny_phi", {"use_s2": True, "s2_scales": "28,56"}, ("mm_hidden_size is 48", "96 wide")),
    "pixels": ("imp", {"image_aspect_ratio": "crop"}, ("image_aspect_ratio is 'crop'", "'pad'")),
    "activation": ("allava", {"hidden_act": "relu"}, ("hidden_act is 'relu'", "gelu_new")),
}


@pytest.mark.family("bunny")
@pytest.mark.parametrize("name", BAD)
def test_a_configuration_that_does_not_fit(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kind, keys, parts = BAD[name]
    source = LLAVA_LIKE[kind][1](tmp_path / "hf")
    if "mm_vision_tower" in keys:
        (source / "vision_config.json").unlink()
    line = refused(capsys, tmp_path / "m", "--hf", edit(source, **keys))
    assert str(source / "config.json") in line and all(part in line for part in parts), line


@pytest.mark.family("bunny")
def test_weights_that_are_not_the_familys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A projector for another tower, more tensors than the table has, a LoRA beside merged weights."""
    source = LLAVA_LIKE["bunny_phi"][1](tmp_path / "hf")
    state = tensors(source)
    (source / "model.safetensors").unlink()
    wide = {**state, "model.mm_projector.0.weight": torch.randn(80, 96)}
    torch.save(wide, source / "pytorch_model.bin")
    config = json.loads((source / "config.json").read_text())
    edit(source, mm_hidden_size=48)
    line = refused(capsys, tmp_path / "m", "--hf", source)
    assert all(part in line for part in ("model.mm_projector.0.weight", "features 96 wide", "tiny-siglip", "48 wide"))
    torch.save({**state, "model.mm_projector.extra.weight": torch.randn(3)}, source / "pytorch_model.bin")
    line = refused(capsys, tmp_path / "m", "--hf", edit(source, **config))
    assert str(source) in line and "model.mm_projector.extra.weight: unknown to the family bunny" in line
    torch.save(state, source / "pytorch_model.bin")
    (source / "adapter_config.json").write_text("{}")
    line = refused(capsys, tmp_path / "m", "--hf", source)
    assert str(source / "adapter_config.json") in line and "beside pytorch_model.bin" in line and "--adapter" in line
    (source / "adapter_config.json").unlink()
    back = convert_out(convert_in(tmp_path / "good", "--hf", source), tmp_path / "back")
    assert equal(tensors(back), state)
