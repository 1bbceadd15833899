"""DeepSeek-VL, Idefics3 and SmolVLM: layouts that are one model, bad input, and what goes home as none of theirs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepseek_models import deepseek_hybrid, deepseek_vl, deepseek_vl_original
from family_cases import llama, load
from idefics3_models import idefics3

from megavlm.cli import main
from megavlm.config.errors import UserError
from megavlm.config.load import load_recipe
from megavlm.config.schema import ModelConfig
from megavlm.families.known import FAMILIES
from megavlm.families.presets import expand_presets

Tree = dict[str, Any]
DEEPSEEK = pytest.mark.family("deepseek_vl", "deepseek_vl_original")
IDEFICS3 = pytest.mark.family("idefics3", "smolvlm")


def converted(source: Path, out: Path) -> ModelConfig:
    assert main(["convert", "hf-to-megatron", "--hf", str(source), "--out", str(out)]) == 0
    return load_recipe(out / "recipe.yaml", [], expand_presets).model


@DEEPSEEK
def test_both_layouts_are_one_model(tmp_path: Path) -> None:
    """What its authors' names become, Transformers' class has under its own; and the other way round."""
    one = deepseek_vl()
    one.save_pretrained(tmp_path / "hf")
    for name, source, family in (
        ("a", deepseek_vl_original(tmp_path / "original"), "deepseek_vl"),
        ("b", tmp_path / "hf", "deepseek_vl_original"),
    ):
        model = converted(source, tmp_path / name)
        assert (model.template, model.vision.activation, model.image.kind) == ("deepseek", "gelu", "fit")
        words = ["--megatron", str(tmp_path / name), "--out", str(tmp_path / f"{name}-home"), "--family", family]
        assert main(["convert", "megatron-to-hf", *words]) == 0
    twice = "vision_model.vision_model."  # as the hub's files, which every version of Transformers reads
    home = {name.replace(twice, "vision_model."): value for name, value in load(tmp_path / "a-home").items()}
    assert home.keys() == one.state_dict().keys()
    assert all(torch.equal(home[name], value) for name, value in one.state_dict().items())
    original = {name: value for name, value in load(tmp_path / "original").items() if "attn_pool" not in name}
    back = load(tmp_path / "b-home")
    assert back.keys() == original.keys() and all(torch.equal(back[name], value) for name, value in original.items())
    tree = json.loads((tmp_path / "b-home" / "config.json").read_text())
    assert tree["vision_config"]["params"]["model_name"] == "siglip_tiny_patch7_28"


@pytest.mark.family("deepseek_vl_hybrid")
def test_two_towers_before_another_language_model(tmp_path: Path) -> None:
    """With the plan that makes both renderings."""
    deepseek_hybrid().save_pretrained(tmp_path / "hf")
    llama().save_pretrained(tmp_path / "llm")
    parts = ["--language", str(tmp_path / "llm"), "--vision", str(tmp_path / "hf"), "--out", str(tmp_path / "m")]
    assert main(["convert", "hf-to-megatron", *parts]) == 0
    model = load_recipe(tmp_path / "m" / "recipe.yaml", [], expand_presets).model
    assert (model.image.kind, model.connector.preset, len(model.vision.towers)) == ("fit_pair", "mlp2x_gelu", 2)


Change = Callable[[Tree, Tree], None]
"""Changes config.json and preprocessor_config.json."""


def _set(*keys: str, value: Any, pixels: bool = False) -> Change:
    def change(config: Tree, files: Tree) -> None:
        tree = files if pixels else config
        for key in keys[:-1]:
            tree = tree[key]
        tree[keys[-1]] = value

    return change


ORIGINAL: dict[str, tuple[Change, str]] = {
    "the 7B": (_set("vision_config", "cls", value="HybridVisionTower"), "a SAM tower beside a SigLIP"),
    "a tower of no name": (
        _set("vision_config", "params", "model_name", value="siglip_huge"), "the tower 'siglip_huge'; CLIPVisionTower"
    ),
    "another width": (
        _set("aligner_config", "params", "input_dim", value=99),
        "input_dim is 99, but the tower of vision_config gives features 48 wide",
    ),
    "one layer": (_set("aligner_config", "params", "depth", value=1), "aligner_config.params: depth is 1; only 2"),
    "a hybrid aligner": (
        _set("aligner_config", "params", "projector_type", value="low_high_hybrid_split_mlp_gelu"), "only 'mlp_gelu'"
    ),
    "a layer in words": (_set("vision_config", "params", "select_layer", value="last"), "select_layer is 'last'"),
    "pixels normalised twice": (
        _set("vision_config", "params", "pixel_mean", value=[0.5] * 3), "vision_config.params: pixel_mean is [0.5, 0.5"
    ),
    "a pooled tower": (_set("vision_config", "params", "ignore_head", value=False), "ignore_head is False; only True"),
    "pictures of another size": (_set("image_size", value=56, pixels=True), "image_size is 56, but config.json's"),
    "a side too long": (_set("min_size", value=29, pixels=True), "min_size is '29'; it must be a length from 1 to 28"),
}  # fmt: skip
TILES: dict[str, tuple[Change, str]] = {
    "squares that do not fit": (_set("scale_factor", value=3), "scale_factor is 3; it must be a whole number that"),
    "half a square": (_set("scale_factor", value=1.5), "scale_factor is 1.5; it must be a whole number"),
    "tiles of another size": (
        _set("max_image_size", value={"longest_edge": 56}, pixels=True),
        "makes tiles of 56 (max_image_size), but config.json's tower is for 28 x 28",
    ),
    "no tile": (_set("size", value={"longest_edge": 14}, pixels=True), "longest_edge of size is '14'; it must be"),
    "pictures as they are": (_set("do_resize", value=False, pixels=True), "do_resize is false"),
    "another processor": (
        _set("image_processor_type", value="CLIPImageProcessor", pixels=True), "is 'CLIPImageProcessor'; Idefics3's or"
    ),
    "rounded positions": (
        lambda config, files: (
            config["vision_config"].update(image_size=133), files.update(max_image_size={"longest_edge": 133})
        )[0],
        "a tile of 19 x 19 patches, some of which share a position",
    ),
    "an oblong tile": (_set("vision_config", "image_size", value=[28, 56]), "image_size of vision_config is [28, 56]"),
    "norms on queries": (_set("text_config", "qk_layer_norms", value=True), "qk_layer_norms is True"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "line", "make"),
    [pytest.param(*case, deepseek_vl_original, marks=DEEPSEEK, id=name) for name, case in ORIGINAL.items()]
    + [
        pytest.param(*case, lambda path: idefics3().save_pretrained(path), marks=IDEFICS3, id=name)
        for name, case in TILES.items()
    ],
)
def test_bad_input(
    change: Change, line: str, make: Callable[[Path], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "hf")
    trees = {}
    for name in ("config.json", "preprocessor_config.json"):
        trees[name] = json.loads((tmp_path / "hf" / name).read_text())
    change(*trees.values())
    for name, tree in trees.items():
        (tmp_path / "hf" / name).write_text(json.dumps(tree))
    assert main(["convert", "hf-to-megatron", "--hf", str(tmp_path / "hf"), "--out", str(tmp_path / "m")]) == 2
    assert not (tmp_path / "m").exists()
    (said,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("megavlm: error: ")]
    assert line in said and str(tmp_path / "hf") in said, said


@DEEPSEEK
def test_janus_is_no_deepseek_vl() -> None:
    class Source:
        config: Tree = {"model_type": "multi_modality", "gen_vision_config": {}}  # noqa: RUF012

    assert not FAMILIES["deepseek_vl_original"].detect(Source())  # type: ignore[arg-type]


def of(preset: str, *words: str) -> ModelConfig:
    recipe = "deepseek_vl_1_3b/sft" if preset.startswith("deepseek") else f"{preset}/sft"
    return load_recipe(recipe, [*words], expand_presets).model


@DEEPSEEK
@IDEFICS3
def test_what_goes_home_as_none_of_theirs() -> None:
    for preset, families, words, reason in (
        ("deepseek_vl_1_3b", ("deepseek_vl", "deepseek_vl_original"), "model.connector={preset: linear}", "connector"),
        ("deepseek_vl_1_3b", ("deepseek_vl_original",), "model.vision.activation=gelu_tanh", "knows the towers"),
        ("deepseek_vl_1_3b", ("deepseek_vl_original",), "model.image.resample=lanczos", "has bicubic"),
        ("deepseek_vl_1_3b", ("deepseek_vl_original",), "model.image={kind: pad}", "own code is fit"),
        ("smolvlm_256m", ("idefics3", "smolvlm"), "model.connector.add_bias_linear=true", "add_bias_linear is True"),
        ("smolvlm_256m", ("idefics3", "smolvlm"), "model.image={kind: squash}", "Idefics3's is split_tiles"),
        ("smolvlm_256m", ("smolvlm",), "model.vision={image_size: 400, positional_grid: 25}", "25 x 25 patches"),
    ):
        for family in families:
            assert FAMILIES[family].refusal(of(preset)) is None
            assert reason in str(FAMILIES[family].refusal(of(preset, words))), (family, words)
    fitted = of("deepseek_vl_1_3b")
    filled = dataclasses.replace(fitted, image=dataclasses.replace(fitted.image, fill=(1, 2, 3)))
    with pytest.raises(UserError, match="processor fills with"):
        FAMILIES["deepseek_vl"].trained_pictures(filled, {})


def _sam(key: str, value: Any) -> Change:
    return _set("high_res_vision_config", key, value=value)


HYBRID: dict[str, tuple[Change, str]] = {
    "one rendering": (
        _set("image_processor_type", value="DeepseekVLImageProcessor", pixels=True),
        "'DeepseekVLImageProcessor', which makes one rendering of a picture, and DeepSeek-VL-7B takes two",
    ),
    "a rendering of another size": (
        _set("high_res_size", value={"height": 32, "width": 32}, pixels=True), "high_res_vision_config is for 64 x 64"
    ),
    "the smaller of another size": (
        _set("size", value={"height": 32, "width": 32}, pixels=True), "tower is for 28 x 28"
    ),
    "two filters": (_set("high_res_resample", value=2, pixels=True), "resample is bicubic and high_res_resample bilin"),
    "colours of two": (_set("high_res_image_std", value=[1, 1], pixels=True), "high_res_image_std is [1, 1]; it must"),
    "no padding": (_set("do_pad", value=False, pixels=True), "do_pad or do_resize is false"),
    "no second tower": (lambda config, _: config.pop("high_res_vision_config"), "high_res_vision_config"),
    "another tower": (_sam("model_type", "clip_vision_model"), "high_res_vision_config: model_type is 'clip_vision"),
    "no positions": (_sam("use_rel_pos", value=False), "use_rel_pos is False; only True"),
    "no global layer": (_sam("global_attn_indexes", []), "names no layer whose map a second neck takes"),
    "an oblong": (_sam("image_size", [64, 32]), "image_size is [64, 32]; only squares"),
}  # fmt: skip


@pytest.mark.family("deepseek_vl_hybrid")
@pytest.mark.parametrize("name", HYBRID)
def test_bad_input_of_two_towers(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, line = HYBRID[name]
    test_bad_input(change, line, lambda path: deepseek_hybrid().save_pretrained(path), tmp_path, capsys)


@pytest.mark.family("deepseek_vl_hybrid")
def test_what_goes_home_as_no_pair() -> None:
    family = FAMILIES["deepseek_vl_hybrid"]
    fitted = load_recipe("deepseek_vl_7b/sft", [], expand_presets).model
    assert family.refusal(fitted) is None
    for words, reason in (
        ("model.connector={preset: mlp2x_gelu}", "the architecture mlp, not hybrid_split"),
        ("model.vision.high_second_neck_layer=5", "not that of the first global layer"),
        ("model.vision.high_output_grid=48", "makes several features of a place"),
    ):
        other = load_recipe("deepseek_vl_7b/sft", [words], expand_presets).model
        assert reason in str(family.refusal(other)), words
    assert "architecture vit_sam, not vit" in str(FAMILIES["deepseek_vl"].refusal(fitted))
