"""Mean, deviation and size of pictures come from the checkpoint's own files, and they must agree with config.json."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_cases import clip, llava, llava_qwen_siglip, siglip_vision
from PIL import Image
from transformers import CLIPImageProcessorPil, PreTrainedModel
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from megavlm.cli import main
from megavlm.config.load import load_recipe
from megavlm.config.schema import ImageConfig
from megavlm.data.media import plan_of
from megavlm.data.render import render_with_pil
from megavlm.families.preprocessor import image_branch, trained_preprocessor
from megavlm.families.presets import expand_presets
from megavlm.models.build import build_model, unwrap
from megavlm.parallel.state import process_groups
from megavlm.weights.source import Source

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
CLIP = [0.48145466, 0.4578275, 0.40821073]
OWN = {"image_mean": MEAN, "image_std": STD}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llava": llava, "llava_siglip": llava_qwen_siglip, "clip": clip, "siglip_vision": siglip_vision,
}  # fmt: skip
FILES: dict[str, tuple[dict[str, Any], list[float] | None, list[float] | None]] = {
    "own": ({"preprocessor_config.json": OWN}, MEAN, STD),
    "in the processor's": ({"processor_config.json": {"image_processor": {**OWN}}}, MEAN, STD),
    "both": (
        {"preprocessor_config.json": OWN,
         "processor_config.json": {"image_processor": {"image_mean": MEAN}}}, MEAN, STD,
    ),
    "one number": ({"preprocessor_config.json": {"image_mean": 0.1, "image_std": 0.2}}, [0.1] * 3, [0.2] * 3),
    "not at all": ({"preprocessor_config.json": {"do_normalize": False}}, [0.0] * 3, [1.0] * 3),
    "its class's": ({"preprocessor_config.json": {"image_processor_type": "CLIPImageProcessorFast"}}, CLIP, None),
    "size": (
        {"preprocessor_config.json": {**OWN, "do_center_crop": True,
                                      "size": {"shortest_edge": 56}, "crop_size": {"height": 28, "width": 28}}},
        MEAN, STD,
    ),
}  # fmt: skip
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "two that disagree": (
        {"preprocessor_config.json": OWN, "processor_config.json": {"image_processor": {"image_mean": STD}}},
        "processor_config.json: image_mean is [0.229, 0.224, 0.225], but",
    ),
    "two numbers": ({"preprocessor_config.json": {"image_mean": [1, 2]}}, "image_mean is [1, 2]; it must be three"),
    "no spread": ({"preprocessor_config.json": {"image_std": [0.1, 0, 0.1]}}, "image_std is [0.1, 0, 0.1]; it must be"),
    "text": ({"preprocessor_config.json": {"image_std": ["a", "b", "c"]}}, "image_std is ['a', 'b', 'c']; it must be"),
    "not divided": ({"preprocessor_config.json": {"do_rescale": False}}, "pixels must be divided by 255"),
    "divided by 127": ({"preprocessor_config.json": {"rescale_factor": 0.00784}}, "pixels must be divided by 255"),
    "another size": (
        {"preprocessor_config.json": {"size": {"height": 56, "width": 56}, "do_center_crop": False}},
        "makes pictures of 56 x 56, but config.json's tower is for 28 x 28; correct one",
    ),
    "another cut": (
        {"preprocessor_config.json": {"crop_size": {"height": 14, "width": 28}}},
        "makes pictures of 14 x 28, but config.json",
    ),
    "another filter": ({"preprocessor_config.json": {"resample": 5}}, "resample is 5; there are"),
    "not resized": ({"preprocessor_config.json": {"do_resize": False}}, "do_resize is false"),
    "a list": ({"processor_config.json": {"image_processor": [1]}}, "image_processor is no object"),
    "a size in words": ({"preprocessor_config.json": {"size": "28"}}, "size is '28'; it must be an object of height"),
    "half a size": ({"preprocessor_config.json": {"crop_size": {"height": 28}}}, "crop_size is \"{'height': 28}\"; it"),
    "a side in words": ({"preprocessor_config.json": {"size": {"shortest_edge": "28"}}}, "size is \"{'shortest_edge'"),
    "a switch in words": ({"preprocessor_config.json": {"do_center_crop": "false"}}, "do_center_crop is 'false'; it"),
    "not square": ({"preprocessor_config.json": {"size": 28, "do_center_crop": False}}, "pictures that are not square"),
    "cut from a square": (
        {"preprocessor_config.json": {"size": {"height": 32, "width": 32}, "do_center_crop": True, "crop_size": 28}},
        "resizes pictures to 32 x 32 and cuts 28 x 28 out of that",
    ),
    "padded and cut": (
        {"preprocessor_config.json": {"size": {"shortest_edge": 32}, "do_pad": True, "crop_size": 28}},
        "resizes padded pictures to 32 (size), but the tower is for 28 x 28",
    ),
    "two geometries": (
        {"preprocessor_config.json": {"do_center_crop": True},
         "processor_config.json": {"image_processor": {"do_pad": True}}},
        "'fill': 'mean'}, but by",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for name, make in MODELS.items():
        make().save_pretrained(root / name)
    return {name: root / name for name in MODELS}


def with_files(source: Path, root: Path, files: dict[str, Any]) -> Path:
    root.mkdir()
    for file in source.iterdir():
        if file.name != "preprocessor_config.json":  # the tests say which there is
            (root / file.name).symlink_to(file)
    for name, tree in files.items():
        (root / name).unlink(missing_ok=True)
        (root / name).write_text(json.dumps(tree))
    return root


def branch(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "hf" / "conversion.json").read_text())["model"]["vision"]


@pytest.mark.parametrize("case", FILES)
def test_the_checkpoints_own_file_says(case: str, directories: dict[str, Path], tmp_path: Path) -> None:
    files, mean, std = FILES[case]
    for name in MODELS if case == "own" else ("llava",):
        hf, out = with_files(directories[name], tmp_path / name, files), tmp_path / f"{name}-m"
        assert main(["convert", "hf-to-megatron", "--hf", str(hf), "--out", str(out)]) == 0
        got = branch(out)
        assert got["image_mean"] == mean and (std is None or got["image_std"] == std), name


def test_pixels_are_normalised_with_it(directories: dict[str, Path], tmp_path: Path) -> None:
    """What the model makes of a picture of one colour is what Transformers' numbers make of it."""
    hf = with_files(directories["llava"], tmp_path / "hf", FILES["own"][0])
    assert main(["convert", "hf-to-megatron", "--hf", str(hf), "--out", str(tmp_path / "m")]) == 0
    recipe = load_recipe(tmp_path / "m" / "recipe.yaml", [], expand_presets)
    images = torch.full((1, 3, 28, 28), 128, dtype=torch.uint8)
    expected = (torch.full((1, 3, 28, 28), 128 / 255) - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[
        :, None, None
    ]
    with process_groups(recipe.parallel, 1), torch.no_grad():
        tower = unwrap(build_model(recipe, 119)[0]).vision
        torch.testing.assert_close(tower(images), tower(expected))


GEOMETRIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llava-hf": (FILES["size"][0]["preprocessor_config.json"], {"kind": "crop", "short_side": 56}),
    "bilinear": ({**OWN, "do_center_crop": True, "crop_size": 28, "size": {"shortest_edge": 28}, "resample": 2},
                 {"kind": "crop", "short_side": None, "resample": "bilinear"}),
    "padded": ({**OWN, "image_processor_type": "LlavaImageProcessor", "do_pad": True, "crop_size": 28,
                "size": {"shortest_edge": 28}}, {"kind": "pad", "fill": "mean"}),
    "class of CLIP": ({"image_processor_type": "CLIPImageProcessor"}, {"kind": "crop"}),
    "square, then cut": ({**OWN, "do_center_crop": True, "size": {"height": 28, "width": 28}, "crop_size": 28},
                         {"kind": "squash"}),
    "squashed": ({**OWN, "do_center_crop": False, "size": {"height": 28, "width": 28}}, {"kind": "squash"}),
}  # fmt: skip


@pytest.mark.parametrize("case", GEOMETRIES)
def test_llava_has_its_own_geometry(case: str, directories: dict[str, Path], tmp_path: Path) -> None:
    """In the recipe, in pixels as Transformers' processor makes them, and in the file of a trained export."""
    tree, expected = GEOMETRIES[case]
    hf = with_files(directories["llava"], tmp_path / "hf", {"preprocessor_config.json": tree})
    assert main(["convert", "hf-to-megatron", "--hf", str(hf), "--out", str(tmp_path / "m")]) == 0
    recipe = load_recipe(tmp_path / "m" / "recipe.yaml", [], expand_presets)
    assert {key: getattr(recipe.model.image, key) for key in expected} == expected
    plan = plan_of(recipe.model)
    picture = Image.effect_noise((61, 40), 80).convert("RGB")
    (ours,) = render_with_pil(picture, plan, plan.plan(61, 40))
    written = trained_preprocessor(recipe.model, {}, None)
    for settings in (tree, written):
        kind = LlavaImageProcessorPil if settings.get("do_pad") else CLIPImageProcessorPil
        sizes = {} if "size" in settings else {"size": {"shortest_edge": 28}, "crop_size": 28}
        plain = {key: value for key, value in settings.items() if key != "image_processor_type"}
        theirs = kind(**{**plain, **sizes, "do_rescale": False, "do_normalize": False})(picture)["pixel_values"][0]
        assert np.array_equal(ours.transpose(2, 0, 1), np.asarray(theirs))
    # What an export writes comes in again as the same plan.
    again = with_files(directories["llava"], tmp_path / "again", {"preprocessor_config.json": written})
    branch = image_branch(Source(again), 28, clip=True)
    assert plan_of(dataclasses.replace(recipe.model, image=ImageConfig(**branch))) == plan


def test_llavas_original_configuration_says_how_pictures_are_padded(
    directories: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((directories["llava"] / "config.json").read_text())
    for aspect, expected in (("pad", {"kind": "pad", "fill": "mean"}), ("square", {"kind": "squash"})):
        files = {"config.json": config | {"image_aspect_ratio": aspect}}
        branch = image_branch(Source(with_files(directories["llava"], tmp_path / aspect, files)), 28, clip=False)
        assert {"kind": "squash", **branch} == {**expected, "resample": "bicubic"}
    hf = with_files(directories["llava"], tmp_path / "odd", {"config.json": config | {"image_aspect_ratio": "odd"}})
    assert main(["convert", "hf-to-megatron", "--hf", str(hf), "--out", str(tmp_path / "m")]) == 2
    assert "image_aspect_ratio is 'odd'; there are square, pad, anyres" in capsys.readouterr().err


def test_processors_of_tiles(directories: dict[str, Path], tmp_path: Path) -> None:
    """The families come later; their files are read here."""
    pinpoints = [[28, 56], [56, 28]]
    for number, (tree, expected) in enumerate((
        ({"image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": pinpoints},
         {"kind": "anyres", "pinpoints": pinpoints}),
        ({"image_processor_type": "LlavaOnevisionImageProcessorFast", "image_grid_pinpoints": pinpoints},
         {"kind": "anyres_max", "pinpoints": pinpoints}),
        ({"image_processor_type": "GotOcr2ImageProcessorFast", "crop_to_patches": True, "max_patches": 6},
         {"kind": "dynamic_tiles", "min_tiles": 1, "max_tiles": 6}),
    )):  # fmt: skip
        hf = with_files(directories["llava"], tmp_path / str(number), {"preprocessor_config.json": tree})
        assert image_branch(Source(hf), 28, clip=True) == {**expected, "resample": "bicubic"}


def test_the_report_of_a_tower_tells_of_another_geometry(
    directories: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    hf = with_files(directories["clip"], tmp_path / "hf", FILES["size"][0])
    assert main(["convert", "hf-to-megatron", "--hf", str(hf), "--out", str(tmp_path / "m")]) == 0
    assert f"note: {hf}/preprocessor_config.json cuts a square out of pictures; here they are squashed" in caplog.text


@pytest.mark.parametrize("case", WRONG)
def test_files_that_disagree_or_say_what_is_not_done(
    case: str, directories: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files, message = WRONG[case]
    hf = with_files(directories["llava"], tmp_path / "hf", files)
    assert main(["convert", "hf-to-megatron", "--hf", str(hf), "--out", str(tmp_path / "m")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "m").exists()
