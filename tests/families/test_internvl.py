"""InternVL: what it refuses, what goes home, models of parts. What it computes is in test_whole.py."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import qwen2
from internvl_models import intern_vit, internvl, internvl_6b, internvl_chat
from transformers import AutoModelForImageTextToText

from megavlm.cli import main
from megavlm.config.load import load_recipe
from megavlm.config.schema import Recipe
from megavlm.data.media import plan_of
from megavlm.families.known import FAMILIES
from megavlm.families.preprocessor import trained_preprocessor
from megavlm.families.presets import expand_presets

pytestmark = pytest.mark.family("internvl", "internvl_chat")
IMAGE = 119


def convert(source: Path, out: Path) -> Recipe:
    assert main(["convert", "hf-to-megatron", "--hf", str(source), "--out", str(out)]) == 0
    return load_recipe(out / "recipe.yaml", [], expand_presets)


def test_other_families_and_this_one_know_their_towers(tmp_path: Path) -> None:
    internvl().save_pretrained(tmp_path / "hf")
    model = convert(tmp_path / "hf", tmp_path / "m").model
    squash = dataclasses.replace(model.image, kind="squash", min_tiles=None, max_tiles=None)
    llava = dataclasses.replace(model, connector=_connector("mlp2x_gelu"), image=squash)
    assert "InternViT" in str(FAMILIES["llava"].refuses(llava))
    for changed, reason in (
        ({"image": dataclasses.replace(squash, kind="pad")}, "image plan is pad"),
        ({"image": dataclasses.replace(model.image, thumbnail=False)}, "no thumbnail"),
        ({"connector": _connector("linear")}, "connector is linear"),
        ({"vision": dataclasses.replace(model.vision, layer_scale=False)}, "no InternViT"),
    ):
        assert reason in str(FAMILIES["internvl"].refuses(dataclasses.replace(model, **changed)))
    assert FAMILIES["internvl"].refuses(model) is None


def _connector(preset: str) -> Any:
    return load_recipe("quickstart", [f"model.connector={{preset: {preset}}}"], expand_presets).model.connector


def test_what_is_written_of_pictures_is_read_again(tmp_path: Path) -> None:
    """After a training: tiles as the processor's file has them."""
    internvl().save_pretrained(tmp_path / "hf")
    model = convert(tmp_path / "hf", tmp_path / "m").model
    model = dataclasses.replace(model, image=dataclasses.replace(model.image, max_tiles=6, resample="bilinear"))
    written = trained_preprocessor(model, {}, FAMILIES["internvl"].trained_pictures(model, {}))
    (tmp_path / "hf" / "preprocessor_config.json").write_text(json.dumps(written))
    assert convert(tmp_path / "hf", tmp_path / "again").model.image == dataclasses.replace(model.image, min_tiles=1)
    assert FAMILIES["internvl"].processor(model, "x") == {"image_seq_length": 4, "processor_class": "InternVLProcessor"}


def test_a_model_of_parts(tmp_path: Path) -> None:
    """As stage 1 begins: a tower, a language model, a new connector."""
    qwen2().save_pretrained(tmp_path / "llm")
    words = ["--language", str(tmp_path / "llm"), "--vision", str(intern_vit(tmp_path / "vit"))]
    words += ["--connector-preset", "pixel_shuffle", "--out", str(tmp_path / "m")]
    assert main(["convert", "hf-to-megatron", *words]) == 0
    model = load_recipe(tmp_path / "m" / "recipe.yaml", [], expand_presets).model
    assert (model.vision.preset, model.vision.num_layers, model.connector.preset) == ("intern_vit", 3, "pixel_shuffle")
    assert model.tokens_per_view == 4


def test_a_written_config_gives_the_same_model_in_transformers(tmp_path: Path) -> None:
    """The authors' layout in, Transformers' out, written anew, dynamic positions and all."""
    model = internvl_6b()
    internvl_chat(tmp_path / "chat", model)
    convert(tmp_path / "chat", tmp_path / "m")
    out = tmp_path / "hf"
    words = ["--megatron", str(tmp_path / "m"), "--family", "internvl", "--out", str(out)]
    assert main(["convert", "megatron-to-hf", *words]) == 0
    back, info = AutoModelForImageTextToText.from_pretrained(
        out, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    assert back.config.image_token_id == IMAGE
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in model.state_dict().items())
    # And back again, to the authors' layout: nothing is lost on the way.
    convert(out, tmp_path / "again")
    words = ["--megatron", str(tmp_path / "again"), "--family", "internvl_chat", "--out", str(tmp_path / "chat-2")]
    assert main(["convert", "megatron-to-hf", *words]) == 0
    first, last = (convert(tmp_path / name, tmp_path / f"{name}-m").model for name in ("chat", "chat-2"))
    assert plan_of(first).films == plan_of(last).films  # a null is 8 frames, and a file says 8
    assert first == dataclasses.replace(last, video=first.video)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_is_tied_where_there_is_none(tied: bool, tmp_path: Path) -> None:
    """Whatever a configuration leaves to Transformers' default, which is that it is."""
    internvl(tied=tied).save_pretrained(tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    for tree in (config, config["text_config"]):
        tree.pop("tie_word_embeddings", None)
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    assert convert(tmp_path / "hf", tmp_path / "m").model.language.tie_word_embeddings is tied


_SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "vocab_size": 120}
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "ratio": ({"downsample_ratio": 0.3}, "downsample_ratio is 0.3"),
    "ratio of no whole squares": ({"downsample_ratio": 1 / 3}, "the 4 x 4 patches"),
    "no ratio": ({"downsample_ratio": 0}, "downsample_ratio is 0"),
    "a text for a ratio": ({"downsample_ratio": "half"}, "downsample_ratio is 'half'"),
    "older order of patches": ({"ps_version": "v1"}, "ps_version is 'v1'"),
    "InternLM": ({"llm_config": {"model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"]}}, "InternLM2.5"),
    "GPT-OSS": ({"llm_config": {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"]}}, "GPT-OSS"),
    "several layers": ({"select_layer": [-1, -2]}, "feature layer"),
    "tiles by a word": ({"dynamic_image_size": "false"}, "dynamic_image_size is 'false'; it must be true or false"),
    "a thumbnail by a word": ({"use_thumbnail": "no"}, "use_thumbnail is 'no'; it must be true or false"),
    "more heads than there are": (
        {"llm_config": {"model_type": "llama", **_SHAPE, "num_attention_heads": 10**30}},
        "num_attention_heads = 1000000000000000000000000000000: ",
    ),
    # The tensors of the tower's layers are none of a layer behind them.
    "norms that no one asks for": (
        {"vision_config": {"qk_normalization": False}},
        "vision_model.encoder.layers.0.attn.k_norm.weight: unknown to the family",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_known_is_said(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed, message = BAD[name]
    directory = internvl_chat(tmp_path / "hf")
    config = json.loads((directory / "config.json").read_text())
    changed = {key: config[key] | value if key == "vision_config" else value for key, value in changed.items()}
    (directory / "config.json").write_text(json.dumps(config | changed))
    words = ["convert", "hf-to-megatron", "--hf", str(directory), "--out", str(tmp_path / "m")]
    assert main(words) == 2
    assert message in capsys.readouterr().err
