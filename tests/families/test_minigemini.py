"""MiniGemini: sizes, templates by tokenizer, what a configuration lacks of the second tower, parts put together."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import vicuna
from minigemini_models import MINIGEMINI, OpenCLIPTower, minigemini
from minigemini_rows import COUNTS
from safetensors.torch import load_file, save_file
from test_spliced_families import LLAMA_3, WIDE, command, edit, refused, tokenized
from transformers import AutoConfig, AutoModelForCausalLM, CLIPVisionModel

from megavlm.checkpoint.hf.given import make_model, open_directory, understand
from megavlm.config.help import to_tree
from megavlm.config.load import load_recipe
from megavlm.config.schema import ModelConfig
from megavlm.data.media import plan_of
from megavlm.families.known import FAMILIES
from megavlm.families.presets import expand_presets
from megavlm.weights.source import Source

pytestmark = pytest.mark.family("minigemini")
FAMILY = "minigemini"


def of(preset: str, **more: Any) -> ModelConfig:
    return make_model({"preset": preset, **more}, preset)  # type: ignore[dict-item]


@pytest.mark.parametrize("size", COUNTS)
def test_presets_have_the_sizes_of_their_parts(size: str) -> None:
    """CLIP and language models as Transformers' classes have them, ConvNeXt and mining as they are written out."""
    model, family = of(f"minigemini_{size}"), FAMILIES[FAMILY]
    tree = family.config(model, {})
    vision, _ = family.tower_of(tree, Path())
    kind = tree["model_type"].replace("mgm_", "").replace("mgm", "llama")
    own = {key: value for key, value in tree.items() if key not in ("model_type", "architectures")}
    with torch.device("meta"):
        language = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **own))
        tower: Any = CLIPVisionModel(AutoConfig.for_model(**vision))
        aux = OpenCLIPTower(model.vision.high_depths, model.vision.high_widths)
    tower = getattr(tower, "vision_model", tower)
    kept = [tower.embeddings, tower.pre_layrnorm, *tower.encoder.layers[: model.vision.num_layers], aux, language]
    low, high, embed = tree["mm_hidden_size"], tree["mm_hidden_size_aux"], model.language.hidden_size
    mining = sum(2 * one + low * (one + 1) for one in (low, high, high))
    mlp = embed * (low + 1) + embed * (embed + 1)
    assert (low, high) == (1024, 2880)
    assert COUNTS[size] == sum(p.numel() for one in kept for p in one.parameters()) + mining + mlp


def test_published_shapes_and_keys() -> None:
    """As the published config.json files have them (``mgm/train/train.py`` writes these keys)."""
    plain, hd = of("minigemini_7b"), of("minigemini_7b_hd")
    assert [plan_of(one).plan(640, 480).tokens for one in (plain, hd)] == [576, 2880]
    assert [plan_of(one).row for one in (plain, hd)] == [(3, 768, 768), (3, 1536, 1536)]
    assert plain.vision.ratio == hd.vision.ratio == 8 and hd.vision.views == 5
    keys = ("image_aspect_ratio", "image_global", "image_grid", "image_size_aux")
    trees = [FAMILIES[FAMILY].config(one, {}) for one in (plain, hd)]
    assert [[tree[key] for key in keys] for tree in trees] == [["pad", False, 1, 768], ["pad", True, 2, 1536]]
    assert trees[0]["mm_vision_tower"] == "openai/clip-vit-large-patch14-336"
    assert trees[0]["mm_vision_tower_aux"].endswith("openclip-convnext-large-d-320-laion2B-s29B-b131K-ft-soup")
    assert (trees[0]["model_type"], of("minigemini_2b").connector.output_multiplier) == ("mgm", 2048**0.5)


TEMPLATES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "vicuna": ("llama", (), "vicuna_v1"),
    "llama 3": ("llama", LLAMA_3, "mgm_llama_3"),
    "gemma": ("gemma", ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "mgm_gemma"),
    "mixtral": ("mixtral", (), "mgm_mistral"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_template_by_language_model_and_tokenizer(name: str, tmp_path: Path) -> None:
    kind, tokens, wanted = TEMPLATES[name]
    minigemini(kind, text_keys=WIDE).save_pretrained(tmp_path)
    tokenized(tmp_path, *tokens)
    found = understand(*(lambda given, home: (given, {}, home))(*open_directory(tmp_path)))
    assert found.model.template == wanted


def _keys(**keys: Any) -> Callable[[Path], None]:
    return lambda source: edit(source / "config.json", **keys)


def _without(word: str) -> Callable[[Path], None]:
    def change(source: Path) -> None:
        path = source / "model.safetensors"
        save_file({n: v for n, v in load_file(path).items() if word not in n}, path, metadata={"format": "pt"})

    return change


BAD: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "one rendering: no size": (
        _keys(image_size_aux=None), ("has no image_size_aux, the side, in pixels, of the larger of two renderings",)
    ),
    "one rendering: no name": (_keys(mm_vision_tower_aux=None), ("has no mm_vision_tower_aux, the tower of",)),
    "one rendering: no tower": (_without("vision_tower_aux"), ("no whole second tower", "rendered for two", "(none")),
    "a stage of it": (_without("vision_stages.1.blocks"), ("no whole second tower", "not all in a row")),
    "no first tower": (_without("vision_tower.vision_tower"), ("without a vision tower",)),
    "another second tower": (
        _keys(mm_vision_tower_aux="openai/clip-vit-large-patch14"), ("'openai/clip-vit-large-patch14'", "ConvNeXt")
    ),
    "its name": (
        _keys(mm_vision_tower_aux="x/openclip-convnext-large-d-320-laion2B-s29B-b131K-ft-soup"),
        ("[192, 384, 768, 1536]", "[16, 24, 40]"),
    ),
    "its width": (_keys(mm_hidden_size_aux=96), ("mm_hidden_size_aux is 96", "80 wide")),
    "tiles": (_keys(image_grid=0), ("image_grid is '0'",)),
    "whole of no tiles": (_keys(image_global=True), ("image_global is true, and image_grid 1",)),
    "layers": (_keys(mm_vision_select_layer=[-2, -3]), ("mm_vision_select_layer is [-2, -3]",)),
    "projector": (_keys(mm_projector_type="linear"), ("linear", "mlp2x_gelu")),
    "mistral": (_keys(model_type="mgm_mistral"), ("'mgm_mistral'", "mgm_mixtral")),
    "tiles of LLaVA": (_keys(image_aspect_ratio="anyres"), ("image_aspect_ratio is 'anyres'",)),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_configuration_that_does_not_fit(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, words = BAD[name]
    source = MINIGEMINI["minigemini"][1](tmp_path / "hf")
    change(source)
    line = refused(capsys, "hf-to-megatron", "--hf", source, "--out", tmp_path / "m")
    assert all(word in line for word in words), line
    assert not (tmp_path / "m").exists()


def test_towers_before_another_language_model_are_written_anew(tmp_path: Path) -> None:
    """As the recipes' headers say: Vicuna, the towers of a MiniGemini, a fresh connector; home, and the same again."""
    source = MINIGEMINI["minigemini"][1](tmp_path / "towers")
    vicuna().save_pretrained(tmp_path / "text")
    tokenized(tmp_path / "text")
    command(
        "hf-to-megatron", "--language", tmp_path / "text", "--vision", source, "--connector-preset", "patch_mining",
        "--out", tmp_path / "a",
    )  # fmt: skip
    command("megatron-to-hf", "--megatron", tmp_path / "a", "--family", FAMILY, "--out", tmp_path / "hf")
    command("hf-to-megatron", "--hf", tmp_path / "hf", "--out", tmp_path / "b")
    models = [load_recipe(tmp_path / name / "recipe.yaml", [], expand_presets).model for name in "ab"]
    trees = [to_tree(one) for one in models]
    assert trees[0]["image"] == trees[1]["image"] and models[0].image.kind == "pad"
    for part in ("vision", "connector", "language"):
        one, two = ({k: v for k, v in tree[part].items() if k not in ("preset", "init_method_std")} for tree in trees)
        assert one == two
    before, after = Source(source), Source(tmp_path / "hf")
    # CLIP's own norm behind its layers, which no feature passes and its code loads all the same, is made anew.
    towers = [name for name in after.tensors if "vision_tower" in name]
    behind = [name for name in towers if ".post_layernorm." in name]
    assert len(behind) == 2 and len(towers) > 2
    assert all(torch.equal(before.get(name), after.get(name)) for name in towers if name not in behind)


def test_a_training_says_what_became_of_pictures(tmp_path: Path) -> None:
    """HD trained from what was not: config.json says it, and that the towers of the checkpoint are to be taken."""
    source = MINIGEMINI["minigemini"][1](tmp_path / "hf")
    command("hf-to-megatron", "--hf", source, "--out", tmp_path / "m")
    run, recipe = tmp_path / "m" / "run.json", tmp_path / "m" / "recipe.yaml"
    run.write_text(json.dumps(json.loads(run.read_text()) | {"step": 3}))
    text = recipe.read_text().replace("low_tiles: 1", "low_tiles: 2").replace("low_whole: false", "low_whole: true")
    recipe.write_text(text.replace("high_image_size: 64", "high_image_size: 128"))
    command("megatron-to-hf", "--megatron", tmp_path / "m", "--out", tmp_path / "home")
    tree = json.loads((tmp_path / "home" / "config.json").read_text())
    told = {key: tree[key] for key in ("image_grid", "image_global", "image_size_aux", "optimize_vision_tower_aux")}
    assert told == {"image_grid": 2, "image_global": True, "image_size_aux": 128, "optimize_vision_tower_aux": True}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "connector": ({"connector": {"preset": "mlp2x_gelu"}}, "the architecture mlp, not patch_mining"),
    "multiplied": ({"connector": {"output_multiplier": 2.0}}, "multiplied by 2.0"),
    "epsilon": ({"connector": {"layernorm_epsilon": 1e-6}}, "epsilon of 1e-06"),
    "stages": ({"vision": {"high_feature_stages": [1, 2, 4]}}, "high_feature_stages"),
    "epsilon of the tower": ({"vision": {"high_layernorm_epsilon": 1e-5}}, "timm's have"),
    "patches": ({"vision": {"high_patch_size": 8}}, "patches are of 8 pixels"),
    "rendering": ({"vision": {"low_from": "plan"}}, "model.vision.low_from"),
    "mean": ({"vision": {"image_mean": [0.5] * 3}}, "CLIP's mean"),
    "plan": ({"image": {"kind": "squash"}}, "the image plan is squash"),
    "filter": ({"image": {"resample": "bilinear"}}, "otherwise than bicubic"),
    "fill": ({"image": {"fill": [0, 0, 0]}}, "mean colour"),
    "crop": ({"image": {"kind": "crop", "short_side": 1000}}, "short_side"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_goes_home_as_none(name: str) -> None:
    more, reason = REFUSED[name]
    assert FAMILIES[FAMILY].refusal(of("minigemini_7b")) is None
    assert reason in str(FAMILIES[FAMILY].refusal(of("minigemini_7b", **more)))


def test_older_names_are_the_same_family(tmp_path: Path) -> None:
    source = MINIGEMINI["minigemini_gemma"][1](tmp_path / "hf")
    config = json.loads((source / "config.json").read_text())
    assert config["model_type"] == "mini_gemini_gemma"
    model = understand(*(lambda given, home: (given, {}, home))(*open_directory(source))).model
    assert model.connector.output_multiplier == model.language.embedding_multiplier == 8.0
    home = FAMILIES[FAMILY].config(dataclasses.replace(model, preset=None), {})
    assert (home["model_type"], home["architectures"]) == ("mgm_gemma", ["MGMGemmaForCausalLM"])
