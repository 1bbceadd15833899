"""LLaVA-1.6 and LLaVA-OneVision: what they refuse, and what goes home. What they compute is in test_whole.py."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from family_cases import _TEXT
from llava_next_models import (
    IMAGE,
    VIDEO,
    llava_next,
    llava_next_mistral,
    llava_onevision,
)
from tokenizer_files import write_llava
from transformers import AutoModelForImageTextToText, LlamaConfig, PreTrainedModel, Qwen2Config

from megavlm.cli import main
from megavlm.config.load import load_recipe
from megavlm.config.schema import Recipe
from megavlm.families.known import FAMILIES
from megavlm.families.preprocessor import trained_preprocessor
from megavlm.families.presets import expand_presets

FAMILY = {"next": "llava_next", "mistral": "llava_next", "onevision": "llava_onevision"}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "next": llava_next,
    "mistral": llava_next_mistral,
    "onevision": llava_onevision,
}


def of(name: str, *, long: bool = False) -> Any:
    marks = [pytest.mark.family(FAMILY[name]), *([pytest.mark.long] if long else [])]
    return pytest.param(name, marks=marks)


def convert(source: Path, out: Path) -> Recipe:
    assert main(["convert", "hf-to-megatron", "--hf", str(source), "--out", str(out)]) == 0
    return load_recipe(out / "recipe.yaml", [], expand_presets)


@pytest.mark.parametrize("name", [of("next"), of("onevision")])
def test_what_is_written_anew_is_read_again(name: str, tmp_path: Path) -> None:
    """The files of a trained export, with other tiles than came in; and a config.json that Transformers loads."""
    family = FAMILIES[FAMILY[name]]
    MODELS[name]().save_pretrained(tmp_path / "hf")
    model = convert(tmp_path / "hf", tmp_path / "m").model
    fewer = dataclasses.replace(model.image, pinpoints=((28, 56), (56, 28)), resample="bilinear")
    if name == "onevision":
        fewer = dataclasses.replace(fewer, max_tiles=1)
    changed = dataclasses.replace(model, image=fewer)
    config = json.loads((tmp_path / "hf" / "config.json").read_text()) | family.config(changed, {"image": IMAGE})
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    old = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    (tmp_path / "hf" / "preprocessor_config.json").write_text(
        json.dumps(trained_preprocessor(changed, old, family.trained_pictures(changed, old)))
    )
    (tmp_path / "hf" / "processor_config.json").write_text(json.dumps(family.processor(changed, "<image>")))
    again = convert(tmp_path / "hf", tmp_path / "again").model
    assert again.image == fewer
    assert (again.vision, again.language, again.connector) == (model.vision, model.language, model.connector)
    back = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    assert back.config.image_grid_pinpoints == [[28, 56], [56, 28]]
    assert back.config.vision_config.num_hidden_layers == model.vision.num_layers
    assert family.refuses(model) is None
    for other, reason in (
        ({"image": dataclasses.replace(model.image, kind="squash", pinpoints=(), max_tiles=None)}, "squash"),
        ({"image": dataclasses.replace(model.image, fill=(9, 9, 9))}, "pads with black"),
        ({"image": dataclasses.replace(model.image, pinpoints=((28, 30),))}, "28 x 30"),
    ):
        assert reason in str(family.refuses(dataclasses.replace(model, **other)))
    assert "image plan" in str(FAMILIES["llava"].refuses(model))


@pytest.mark.parametrize("name", [of("next", long=True), of("onevision", long=True)])
def test_a_trained_export_is_what_was_trained(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Transformers' processor, model and template, of a checkpoint as it came, and as it goes home with other tiles."""
    text = {**_TEXT, "vocab_size": 448, "eos_token_id": 2}
    model = llava_onevision(Qwen2Config(**text)) if name == "onevision" else llava_next(LlamaConfig(**text))
    model.config.image_token_index = 329
    model.save_pretrained(tmp_path / "hf")
    write_llava(tmp_path / "hf")
    family = FAMILIES[FAMILY[name]]
    recipe = convert(tmp_path / "hf", tmp_path / "m")
    processor = family.processor(recipe.model, "<image>")
    (tmp_path / "hf" / "processor_config.json").write_text(json.dumps(processor))
    with caplog.at_level(logging.INFO):
        assert main(["convert", "check", "--hf", str(tmp_path / "hf")]) == 0, caplog.text
    assert caplog.text.count("greedy answers: equal") == 3 and "all within the tolerance" in caplog.text
    path = tmp_path / "m" / "recipe.yaml"
    tree = yaml.safe_load(path.read_text())
    tree["model"]["image"]["pinpoints"] = [[28, 56], [56, 28]]
    if name == "onevision":
        tree["model"]["image"]["max_tiles"] = 1
    path.write_text(yaml.safe_dump(tree))
    state = json.loads((tmp_path / "m" / "run.json").read_text()) if (tmp_path / "m" / "run.json").is_file() else {}
    (tmp_path / "m" / "run.json").write_text(json.dumps(state | {"step": 3}))
    out = tmp_path / "trained"
    assert main(["convert", "megatron-to-hf", "--megatron", str(tmp_path / "m"), "--out", str(out)]) == 0
    config, pixels = (json.loads((out / f"{kind}config.json").read_text()) for kind in ("", "preprocessor_"))
    assert config["image_grid_pinpoints"] == pixels["image_grid_pinpoints"] == [[28, 56], [56, 28]]
    if name == "onevision":
        assert config["vision_aspect_ratio"] == "anyres_max_1"
        assert json.loads((out / "processor_config.json").read_text())["vision_aspect_ratio"] == "anyres_max_1"
        assert config["video_token_index"] == VIDEO
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert main(["convert", "check", "--hf", str(out)]) == 0, caplog.text
    assert caplog.text.count("greedy answers: equal") == 3 and "all within the tolerance" in caplog.text
    if name == "next":  # without torchvision there is no processor of films, and so no processor, of the other
        assert caplog.text.count("token ids equal") == 3 and "not compared:" not in caplog.text


BAD: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None, tuple[str, ...]]] = {
    "tiles": ("next", {"image_grid_pinpoints": [[28, 50]]}, {"image_grid_pinpoints": [[28, 50]]},
              ("28 x 50", "preprocessor_config.json", "28 x 28", "config.json")),
    "other pinpoints": ("next", {}, {"image_grid_pinpoints": [[28, 56]]},
                        ("image_grid_pinpoints is 28 x 56", "28 x 56, 56 x 28", "/config.json")),
    "no pinpoints": ("next", {"image_grid_pinpoints": []}, {"image_grid_pinpoints": []}, ("is empty",)),
    "class token": ("next", {"vision_feature_select_strategy": "full"}, {}, ("'full'", "class token", "'default'")),
    "no class token": ("onevision", {"vision_feature_select_strategy": "default"}, {}, ("'default'", "'full'")),
    "no processor": ("next", {}, None, ("neither preprocessor_config.json nor", "config.json's tower")),
    "another processor": ("onevision", {}, {"image_processor_type": "CLIPImageProcessor"},
                          ("CLIPImageProcessor", "llava_onevision")),
    "another side": ("next", {}, {"size": {"shortest_edge": 56}}, ("tiles of 56", "28 x 28")),
    "limit": ("onevision", {"vision_aspect_ratio": "square"}, {}, ("vision_aspect_ratio is 'square'",)),
    "window": ("mistral", {"text_config": {"sliding_window": 64}}, {}, ("sliding_window", "64", "256")),
    "not resized": ("next", {}, {"do_resize": False}, ("do_resize is false",)),
}  # fmt: skip


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiles")
    for name, model in MODELS.items():
        model().save_pretrained(root / name)
    return {name: root / name for name in MODELS}


@pytest.mark.family("llava_next", "llava_onevision")
@pytest.mark.parametrize("case", BAD)
def test_what_is_not_known_is_said(
    case: str, directories: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, config, processor, words = BAD[case]
    hf = tmp_path / "hf"
    hf.mkdir()
    (hf / "model.safetensors").symlink_to(directories[name] / "model.safetensors")
    old = json.loads((directories[name] / "config.json").read_text())
    if "text_config" in config:
        config = {"text_config": {**old["text_config"], **config["text_config"]}}
    (hf / "config.json").write_text(json.dumps(old | config))
    if processor is not None:
        tree = json.loads((directories[name] / "preprocessor_config.json").read_text())
        (hf / "preprocessor_config.json").write_text(json.dumps(tree | processor))
    assert main(["convert", "hf-to-megatron", "--hf", str(hf), "--out", str(tmp_path / "m")]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert not (tmp_path / "m").exists()
