"""CogAgent: what is told of its checkpoints beside the numbers, which test_whole.py has; what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from cogagent_models import COGAGENT, LARGE, CogAgent
from native_cases import convert
from safetensors.torch import load_file, save_file
from test_cogvlm import changed, refused
from test_qwen2_vl_sizes import model_of
from tokenizer_files import write_llava

from megavlm.cli import main
from megavlm.data.media import plan_of
from megavlm.families.known import FAMILIES
from megavlm.weights.source import Source

pytestmark = pytest.mark.family("cogagent")


@pytest.mark.long
def test_a_configuration_that_is_written_is_read_alike(tmp_path: Path) -> None:
    family = FAMILIES["cogagent"]
    COGAGENT["cogagent"][1](tmp_path / "hf")
    model = convert(tmp_path / "hf", tmp_path / "m").model
    assert family.refusal(model) is None and FAMILIES["cogvlm"].refusal(model) is not None
    before, path = family.branches(Source(tmp_path / "hf")), tmp_path / "hf" / "config.json"
    own, written = json.loads(path.read_text()), family.config(model, {})
    of_trainer = {"_name_or_path", "torch_dtype", "transformers_version", "use_cache"}
    assert written == {key: value for key, value in own.items() if key not in of_trainer}
    path.write_text(json.dumps(written))
    assert family.branches(Source(tmp_path / "hf")) == before


@pytest.mark.long
@pytest.mark.parametrize(("version", "template"), [("chat", "cogagent"), ("chat_old", "cogvlm"), ("vqa", "cogvlm_vqa")])
def test_the_template_is_what_template_version_says(version: str, template: str, tmp_path: Path) -> None:
    CogAgent(version=version).save_pretrained(tmp_path / "hf")
    write_llava(tmp_path / "hf")
    model = convert(tmp_path / "hf", tmp_path / "m").model
    assert model.template == template
    family = FAMILIES["cogagent"]
    assert family.pictures_of(model) == {"template_version": version}
    assert family.unsaid(model, template) == [] and "CogAgent's own code" in family.unsaid(model, "vicuna_v1")[0]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"cross_compute_hidden_size": 64}, "cross_compute_hidden_size is 64; only 128 is supported"),
        ({"cross_hidden_size": 64, "cross_compute_hidden_size": 64}, "cross_hidden_size is 64; only 128 is supported"),
        ({"cross_image_size": LARGE + 7}, f"cross_image_size is {LARGE + 7}; only {LARGE} is supported"),
        ({"template_version": "llama"}, "template_version is 'llama'; only 'chat' or 'chat_old' or 'vqa' or 'base'"),
    ],
)
def test_what_is_not_of_it_is_refused(
    keys: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    CogAgent().save_pretrained(tmp_path / "hf")
    changed(tmp_path / "hf", **keys)
    line = refused(tmp_path / "hf", capsys)
    assert str(tmp_path / "hf" / "config.json") in line and words in line, line


@pytest.mark.parametrize(
    ("lacking", "words"),
    [
        (
            ("language_expert", "language_mlp", "embed_tokens", "lm_head"),
            "a layer needs both: add the language model's",
        ),
        (("cross_attn.",), "model.layers.0.cross_attn."),
        (("cross_vision.",), "model.cross_vision."),
    ],
)
def test_what_a_file_lacks_is_told_by_name(
    lacking: tuple[str, ...], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The experts alone, without the language model; layers without what sees the second tower; without that tower."""
    CogAgent().save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    whole = load_file(path)
    state = {name: value for name, value in whole.items() if not any(one in name for one in lacking)}
    assert all(any(one in name for name in whole) for one in lacking) and len(state) < len(whole)
    save_file(state, path, metadata={"format": "pt"})
    assert main(["convert", "hf-to-megatron", "--hf", str(tmp_path / "hf"), "--out", str(tmp_path / "m")]) == 2
    told = capsys.readouterr().err
    assert "megavlm: error: " in told and words in told and not (tmp_path / "m").exists(), told
    assert str(tmp_path / "hf") in told


def test_a_model_that_is_none_is_not_written_as_one() -> None:
    model, family = model_of("cogagent_chat"), FAMILIES["cogagent"]
    assert family.refusal(model) is None
    for part, change, words in (
        ("vision", {"high_activation": "gelu"}, "high_activation"),
        ("vision", {"high_branch_norms": "behind"}, "high_branch_norms"),
        ("vision", {"high_positional_antialias": True}, "high_positional_antialias"),
        ("vision", {"class_position": False}, "model.vision.class_position"),
        ("vision", {"high_class_position": False}, "high_class_position"),
        ("vision", {"high_feature_table": False}, "high_feature_table"),
        ("language", {"cross_compute_hidden_size": 512}, "cross_compute_hidden_size"),
    ):
        other = dataclasses.replace(getattr(model, part), **change)
        assert words in str(family.refusal(dataclasses.replace(model, **{part: other}))), change


def test_a_picture_is_its_patches_and_two_and_the_layers_see_the_finer_ones() -> None:
    model = model_of("cogagent_chat")
    assert plan_of(model).plan(640, 480).tokens == 258
    assert (model.vision.sides, model.vision.features_past) == ((224, 1120), (25, 1024))
