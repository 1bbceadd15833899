"""CogVLM: what is told of its checkpoints beside the numbers, which test_whole.py has; boxes; what is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cogvlm_models import COGVLM, CogVLM
from native_cases import convert
from PIL import Image
from safetensors.torch import load_file, save_file
from test_qwen2_vl_sizes import model_of
from tokenizer_files import write_llava

from megavlm.cli import main
from megavlm.data.media import plan_of
from megavlm.families.known import FAMILIES
from megavlm.inference.boxes import box_space, draw_boxes
from megavlm.weights.source import Source

pytestmark = pytest.mark.family("cogvlm")


def changed(directory: Path, **keys: Any) -> None:
    """Change keys of config.json, or of its vision_config; None removes one."""
    path = directory / "config.json"
    tree = json.loads(path.read_text())
    for key, value in keys.items():
        own = tree["vision_config"] if key in tree["vision_config"] and key != "hidden_size" else tree
        own[key] = value
    path.write_text(json.dumps(tree))


def refused(directory: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Convert what cannot be converted; return the line that says so."""
    out = directory.parent / "refused"
    assert main(["convert", "hf-to-megatron", "--hf", str(directory), "--out", str(out)]) == 2
    assert not out.exists()
    (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("megavlm: error: ")]
    return line


@pytest.mark.long
@pytest.mark.parametrize("name", COGVLM)
def test_a_configuration_that_is_written_is_read_alike(name: str, tmp_path: Path) -> None:
    family = FAMILIES[COGVLM[name][0]]
    COGVLM[name][1](tmp_path / "hf")
    model = convert(tmp_path / "hf", tmp_path / "m").model
    assert family.refusal(model) is None
    before, path = family.branches(Source(tmp_path / "hf")), tmp_path / "hf" / "config.json"
    own, written = json.loads(path.read_text()), family.config(model, {})
    of_trainer = {"_name_or_path", "torch_dtype", "transformers_version", "use_cache"}
    assert written == {key: value for key, value in own.items() if key not in of_trainer}
    path.write_text(json.dumps(written))
    assert family.branches(Source(tmp_path / "hf")) == before


@pytest.mark.long
@pytest.mark.parametrize(("version", "template"), [("chat", "cogvlm"), ("vqa", "cogvlm_vqa"), ("base", "cogvlm_base")])
def test_the_template_is_what_template_version_says(version: str, template: str, tmp_path: Path) -> None:
    """With Vicuna's tokenizer beside it, which the published directories leave to lmsys/vicuna-7b-v1.5, and without."""
    CogVLM(version=version).save_pretrained(tmp_path / "hf")
    assert convert(tmp_path / "hf", tmp_path / "bare").model.template == template
    write_llava(tmp_path / "hf")
    model = convert(tmp_path / "hf", tmp_path / "m").model
    assert model.template == template
    family = FAMILIES["cogvlm"]
    assert family.pictures_of(model) == {"template_version": version}
    assert family.unsaid(model, template) == [] and "vicuna_v1" in family.unsaid(model, "vicuna_v1")[0]


@pytest.mark.parametrize(
    ("there", "lacking"),
    [
        ("self_attn.vision_expert_query_key_value", "self_attn.language_expert_query_key_value"),
        ("self_attn.vision_expert_dense", "self_attn.language_expert_dense"),
        ("mlp.vision_mlp.up_proj", "mlp.language_mlp.up_proj"),
        ("mlp.language_mlp.gate_proj", "mlp.vision_mlp.gate_proj"),
    ],
)
def test_an_expert_without_the_language_model_is_told_with_both_names(
    there: str, lacking: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    CogVLM().save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    state = {name: value for name, value in load_file(path).items() if lacking not in name}
    save_file(state, path, metadata={"format": "pt"})
    line = refused(tmp_path / "hf", capsys)
    names = (f"model.layers.0.{there}.weight", f"model.layers.0.{lacking}.weight")
    assert all(name in line for name in (str(tmp_path / "hf"), *names)), line
    assert "a layer needs both" in line


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"num_multi_query_heads": 2}, "num_multi_query_heads is a key of CogVLM2"),
        ({"num_positions": 26}, "num_positions is 26, but pictures of 28 pixels have 4 x 4 patches of 7"),
        ({"template_version": "chat_old"}, "template_version is 'chat_old'; only 'chat' or 'vqa' or 'base'"),
        ({"rope_theta": 500000.0}, "rope_theta is 500000.0; only 10000 is supported"),
        ({"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu'; only 'gelu' is supported"),
    ],
)
def test_what_is_not_of_it_is_refused(
    keys: dict[str, Any], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    CogVLM().save_pretrained(tmp_path / "hf")
    changed(tmp_path / "hf", **keys)
    line = refused(tmp_path / "hf", capsys)
    assert str(tmp_path / "hf" / "config.json") in line and words in line, line


def test_a_picture_is_its_patches_and_two() -> None:
    for preset, patches in (("cogvlm_base_224", 256), ("cogvlm_chat", 1225)):
        assert plan_of(model_of(preset)).plan(640, 480).tokens == patches + 2


def test_its_boxes_are_drawn() -> None:
    """As cogvlm-grounding-generalist writes them; thousandths of the picture itself, which is squashed."""
    shown = io.BytesIO()
    Image.new("RGB", (200, 100), "white").save(shown, "PNG")
    space = box_space(FAMILIES["cogvlm"], model_of("cogvlm_grounding_generalist"))
    drawn = draw_boxes(shown.getvalue(), "The dog [[100,200,500,900]] sleeps.", space)
    assert drawn is not None
    places = np.argwhere((np.asarray(drawn) != 255).any(-1))
    assert places[:, 1].min() in (19, 20, 21) and places[:, 1].max() in (99, 100, 101)
    assert places[:, 0].min() in (19, 20, 21) and places[:, 0].max() in (89, 90, 91)
