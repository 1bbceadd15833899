"""Towers that come alone: features are the published class's, bad files are named, and what is trained goes home."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import llama
from megatron.core import parallel_state as mpu
from safetensors.torch import load_file, save_file
from torch import Tensor
from tower_models import EVA_GRID, EVA_PATCH, TOWERS, dinov2, eva02_model, siglip2_vision
from transformers import AutoModel

from megavlm.checkpoint.distributed import load
from megavlm.cli import main
from megavlm.config.load import load_recipe
from megavlm.config.schema import Recipe
from megavlm.families.presets import expand_presets
from megavlm.models.build import build_model, unwrap
from megavlm.parallel.state import process_groups


def compose(tower: Path, directory: Path, *words: str) -> Recipe:
    """Put a tower before a Llama."""
    llama().save_pretrained(directory / "llm")
    parts = ["--language", str(directory / "llm"), "--vision", str(tower), "--out", str(directory / "m")]
    assert main(["convert", "hf-to-megatron", *parts, *words]) == 0
    return load_recipe(directory / "m" / "recipe.yaml", [], expand_presets)


def features(recipe: Recipe, directory: Path, *inputs: Tensor) -> Tensor:
    """Return what the tower of a checkpoint makes of normalised pictures."""
    with process_groups(recipe.parallel, 1):
        assert mpu.get_tensor_model_parallel_world_size() == 1
        (model,) = build_model(recipe, 1)
        load(directory / "m", modules=[model])
        with torch.no_grad():
            return unwrap(model).vision(*inputs)


@pytest.mark.family("dinov2")
@pytest.mark.parametrize(("name", "registers"), [("dinov2_reg", 4), ("dinov2_plain", 0)])
def test_dinov2_sees_what_transformers_does(name: str, registers: int, tmp_path: Path) -> None:
    """The layer before the last, as LLaVA takes it, of pictures of another size than the table's."""
    recipe = compose(TOWERS[name][1](tmp_path / "hf"), tmp_path)
    vision = recipe.model.vision
    assert (vision.preset, vision.num_layers, vision.register_tokens) == ("dinov2_vit", 2, registers)
    assert vision.image_mean == (0.485, 0.456, 0.406) and recipe.model.connector.preset == "mlp2x_gelu"
    pictures = torch.randn(2, 3, 30, 30)
    smaller = load_recipe(tmp_path / "m" / "recipe.yaml", ["model.vision.image_size=30"], expand_presets)
    out = dinov2(registers)(pixel_values=pictures, output_hidden_states=True)
    expected = out.hidden_states[2][:, 1 + registers :]
    got = features(smaller, tmp_path, pictures).transpose(0, 1)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.family("eva02")
@pytest.mark.parametrize("name", ["eva02_timm", "eva02_authors"])
def test_eva02_sees_what_its_definition_does(name: str, tmp_path: Path) -> None:
    """Its authors' is one file, of ``torch.save``."""
    tower = TOWERS[name][1](tmp_path / "hf")
    if name == "eva02_authors":
        torch.save(load_file(tower / "model.safetensors"), tmp_path / "EVA02_CLIP_L_336_psz14_s6B.pt")
        tower = tmp_path / "EVA02_CLIP_L_336_psz14_s6B.pt"
    recipe = compose(tower, tmp_path)
    assert (recipe.model.vision.preset, recipe.model.vision.num_layers) == ("eva02_vit", 2)
    pictures = torch.randn(2, 3, EVA_PATCH * EVA_GRID, EVA_PATCH * EVA_GRID)
    with torch.no_grad():
        expected = eva02_model()(pictures, 2)[:, 1:]
    got = features(recipe, tmp_path, pictures).transpose(0, 1)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.family("siglip2")
def test_naflex_sees_what_transformers_does(tmp_path: Path) -> None:
    """Behind the last norm; its image plan comes with it."""
    tower = TOWERS["siglip2_vision"][1](tmp_path / "hf")
    recipe = compose(tower, tmp_path, "--vision-feature-layer=last_hidden_state")
    image = recipe.model.image
    assert (image.kind, image.max_num_patches, image.resample) == ("naflex", 12, "bilinear")
    assert recipe.model.vision.post_layernorm and recipe.model.connector.preset == "mlp2x_gelu"
    grid = torch.tensor([[1, 3, 4], [1, 2, 6]])
    pixels = torch.randn(24, 48)  # of two pictures, as its processor has them
    out = siglip2_vision()(
        pixel_values=pixels.view(2, 12, 48), pixel_attention_mask=torch.ones(2, 12), spatial_shapes=grid[:, 1:]
    ).last_hidden_state
    ours = pixels.view(24, 4, 4, 3).permute(0, 3, 1, 2).flatten(1)
    got = features(recipe, tmp_path, ours, grid)
    torch.testing.assert_close(got.view(2, 12, 48), out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        pytest.param("dinov2_reg", "-1", marks=pytest.mark.family("dinov2")),
        pytest.param("dinov2_swiglu", "last_hidden_state", marks=pytest.mark.family("dinov2")),
        pytest.param("eva02_timm", "last_hidden_state", marks=pytest.mark.family("eva02")),
        pytest.param("siglip2", "-2", marks=pytest.mark.family("siglip2")),
    ],
)
def test_a_tower_of_a_whole_model_goes_home_alone(name: str, layer: str, tmp_path: Path) -> None:
    """Written anew it has the same tensors as far as they run, and Transformers reads it."""
    family, make = TOWERS[name]
    tower = make(tmp_path / "hf")
    compose(tower, tmp_path, f"--vision-feature-layer={layer}")
    words = ["--megatron", str(tmp_path / "m"), "--out", str(tmp_path / "out"), "--family", family]
    assert main(["convert", "megatron-to-hf", *words]) == 0
    before, after = load_file(tower / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    prefix = "" if any(key in before for key in after) else "vision_model."
    same = [key for key, value in after.items() if (own := before.get(prefix + key)) is not None and own.equal(value)]
    assert len(same) > 0.9 * len(after), sorted(set(after) - set(same))
    if family != "eva02":
        _, told = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"], told


@pytest.mark.parametrize(
    ("name", "file", "change", "line"),
    [
        ("dinov2_reg", "config.json", {"image_size": [42, 28]}, "image_size is [42, 28]; only squares"),
        ("dinov2_reg", "config.json", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("siglip2_vision", "config.json", {"num_patches": 26}, "num_patches is 26, which is no square grid"),
        ("siglip2_vision", "preprocessor_config.json", {"patch_size": 5}, "patch_size is 5; only 4"),
        ("siglip2_vision", "preprocessor_config.json", {"max_num_patches": 0}, "max_num_patches is '0'"),
        ("siglip2_vision", "preprocessor_config.json", {"do_resize": False}, "do_resize is False"),
        ("eva02_timm", "config.json", {"pretrained_cfg": {"mean": [0.5]}}, "pretrained_cfg.mean is [0.5]"),
    ],
)
def test_what_a_tower_cannot_be_is_named(
    name: str, file: str, change: dict[str, Any], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tower = TOWERS[name][1](tmp_path / "hf")
    tree = json.loads((tower / file).read_text())
    (tower / file).write_text(json.dumps(tree | change))
    assert main(["convert", "hf-to-megatron", "--hf", str(tower), "--out", str(tmp_path / "m")]) == 2
    message = capsys.readouterr().err
    assert line in message and file in message


def test_eva02s_small_towers_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tower = TOWERS["eva02_timm"][1](tmp_path / "hf")
    state = load_file(tower / "model.safetensors")
    kept = {name: value for name, value in state.items() if "attn.q_proj" not in name}
    save_file(kept, tower / "model.safetensors", metadata={"format": "pt"})
    assert main(["convert", "hf-to-megatron", "--hf", str(tower), "--out", str(tmp_path / "m")]) == 2
    assert "EVA02's small towers (fused qkv) are not read" in capsys.readouterr().err
