"""After a training the small files of an export say what was trained: template, tokens, stop ids, pixels."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from family_cases import _TEXT, _VISION, llava, qwen_vl
from hf_makers import digest, megatron
from PIL import Image
from tokenizer_files import write_llama, write_llava, write_qwen2
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    SiglipVisionConfig,
)

from megavlm.checkpoint.hf.template import SAMPLES
from megavlm.cli import main
from megavlm.data.chat import count_images, encode_prompt
from megavlm.data.plans_single import CropPlan
from megavlm.data.render import render_with_pil
from megavlm.data.schema import IMAGE_PLACEHOLDER
from megavlm.data.tokenizer import find_tokenizer, load_tokenizer

VICUNA = "{% for m in messages %}USER: {{ m.content }} {% endfor %}ASSISTANT:"
CROP = {
    "image_processor_type": "CLIPImageProcessor", "do_center_crop": True, "size": {"shortest_edge": 28},
    "crop_size": {"height": 28, "width": 28}, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.3, 0.25, 0.2],
}  # fmt: skip
SYSTEM = "You are a helpful assistant."
WRITERS: dict[str, Callable[[Path], Path]] = {"llava": write_llava, "qwen2": write_qwen2, "llama": write_llama}


def convert(*words: object) -> None:
    assert main(["convert", *map(str, words)]) == 0


def made(root: Path, kind: str, *, siglip: bool = False) -> Path:
    """Write a LLaVA with a tokenizer of a kind, and the files of somebody else's training."""
    hf = root / "hf"
    hf.mkdir()
    WRITERS[kind](hf)
    path = find_tokenizer(hf)
    assert path is not None
    vision = SiglipVisionConfig(**_VISION, vision_use_head=False) if siglip else CLIPVisionConfig(**_VISION)
    keys = {"vision_feature_select_strategy": "full"} if siglip else {}
    model = llava(LlamaConfig(**{**_TEXT, "vocab_size": 512}, rms_norm_eps=1e-5), vision, **keys)
    model.config.image_token_index = model.config.image_token_id = load_tokenizer(path).imgpad_id
    model.save_pretrained(hf)
    (hf / "chat_template.jinja").write_text(VICUNA)
    (hf / "preprocessor_config.json").write_text(json.dumps(CROP))
    (hf / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": VICUNA, "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "keep": 7}
                   if kind != "qwen2" else {"chat_template": VICUNA, "eos_token": "<|endoftext|>", "keep": 7})
    )  # fmt: skip
    (hf / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<pad>"} if kind == "llava" else {}))
    return hf


def trained(root: Path, *changes: tuple[str, str], template: str | None = "qwen_vl") -> Path:
    """Convert ``hf`` and let the checkpoint be one of step 5, as a run would have saved it.

    Args:
        root: where ``hf`` lies.
        changes: of the recipe's text.
        template: that was trained, Qwen-VL's ChatML unless told otherwise; None for the converted one.
    """
    checkpoint = megatron(root / "hf", root / "m")
    (checkpoint / "run.json").write_text(json.dumps({"step": 5}))
    recipe = checkpoint / "recipe.yaml"
    if template is not None:
        recipe.write_text(re.sub(r"(?m)^  template: .*$", f"  template: {template}", recipe.read_text()))
    for old, new in changes:
        assert old in recipe.read_text()
        recipe.write_text(recipe.read_text().replace(old, new))
    return checkpoint


def messages(turns: tuple, *, slots: bool = True) -> list[dict]:
    """Return turns as Transformers' chat templates take them, pictures as parts."""
    found = []
    for turn in turns:
        parts: list[dict] = []
        for index, text in enumerate(turn.text.split(IMAGE_PLACEHOLDER)):
            parts += [{"type": "image"}] if index else []
            text = text.removeprefix("\n") if index else text
            text = text[: -len(f"Picture {index + 1}: ")] if text.endswith(f"Picture {index + 1}: ") else text
            parts += [{"type": "text", "text": text}] if text else []
        found.append({"role": turn.role, "content": parts if len(parts) > 1 else turn.text})
    return found


@pytest.mark.parametrize("kind", WRITERS)
def test_transformers_reads_what_was_trained(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    hf = made(tmp_path, kind, siglip=kind == "qwen2")
    before = load_tokenizer(find_tokenizer(hf))  # type: ignore[arg-type]
    home = tmp_path / "home"
    convert("megatron-to-hf", "--megatron", trained(tmp_path), "--out", home)
    assert "chat_template.jinja: ChatML, as trained (tried on 4 conversations, with the ids" in caplog.text
    ours = load_tokenizer(find_tokenizer(home))  # type: ignore[arg-type]
    assert not ours.added and ours.control_ids == before.control_ids and ours.vocab_size == before.vocab_size

    stops = GenerationConfig.from_pretrained(home).eos_token_id
    assert stops == [before.ids["<|im_end|>"], before.eos_id]
    config = json.loads((home / "config.json").read_text())
    image = config.get("image_token_id", config.get("image_token_index"))
    assert image == before.imgpad_id and config["text_config"]["eos_token_id"] == before.ids["<|im_end|>"]
    settings = json.loads((home / "tokenizer_config.json").read_text())
    assert settings["eos_token"] == "<|im_end|>" and settings["add_bos_token"] is False and settings["keep"] == 7
    assert settings["chat_template"] == (home / "chat_template.jinja").read_text() != VICUNA
    pixels = json.loads((home / "preprocessor_config.json").read_text())
    assert (pixels["do_center_crop"], pixels["size"]) == (True, {"shortest_edge": 28})
    assert pixels["image_mean"] == CROP["image_mean"] and pixels["image_std"] == CROP["image_std"]
    if kind == "llama":
        return  # Transformers 5 reads no SentencePiece model without protobuf's classes
    theirs = AutoTokenizer.from_pretrained(home)
    for turns in SAMPLES:
        ids = theirs.apply_chat_template(messages(turns), add_generation_prompt=True, tokenize=True, return_dict=False)
        if "\nwhat" not in turns[-1].text:  # as a part, a picture is always called Picture 1
            assert list(ids) == encode_prompt(turns, before, [(1,)] * count_images(turns), SYSTEM).tolist(), turns
    assert theirs.eos_token_id == before.ids["<|im_end|>"] and theirs("Hi").input_ids == before.encode("Hi")

    image = Image.fromarray(np.random.default_rng(1).integers(0, 255, (40, 90, 3), np.uint8))
    processor = AutoProcessor.from_pretrained(home)
    text = processor.apply_chat_template(messages(SAMPLES[1]), add_generation_prompt=True)
    both = processor(text=text, images=[image], return_tensors="pt")
    assert both.input_ids[0].tolist() == encode_prompt(SAMPLES[1], before, [(16,)], SYSTEM).tolist()
    plan = CropPlan(28, 1, short_side=28)
    (view,) = render_with_pil(image, plan, plan.plan(*image.size))
    square = torch.from_numpy(view).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(CROP[key])[:, None, None] for key in ("image_mean", "image_std"))
    torch.testing.assert_close(both.pixel_values[0], (square - mean) / std, rtol=0, atol=0.03)


def test_another_size_and_no_system_message(tmp_path: Path) -> None:
    made(tmp_path, "qwen2")
    checkpoint = trained(
        tmp_path, ("image_size: 28", "image_size: 30"), ("system_message: null", "system_message: ''"),
        ("    image_mean:\n      - 0.4", "    image_mean:\n      - 0.1"),
    )  # fmt: skip
    convert("megatron-to-hf", "--megatron", checkpoint, "--out", tmp_path / "home", "--family", "clip")
    pixels = json.loads((tmp_path / "home" / "preprocessor_config.json").read_text())
    assert pixels["crop_size"] == {"height": 30, "width": 30} and pixels["size"] == {"shortest_edge": 30}
    assert pixels["image_mean"][0] == 0.1
    convert("megatron-to-hf", "--megatron", checkpoint, "--out", tmp_path / "whole")
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["vision_config"]["image_size"] == 30
    whole = json.loads((tmp_path / "whole" / "preprocessor_config.json").read_text())
    assert whole["crop_size"] == {"height": 30, "width": 30}
    theirs = AutoTokenizer.from_pretrained(tmp_path / "whole")
    assert theirs.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == (
        "<|im_start|>user\nHi<|im_end|>\n"
    )


def test_who_was_not_trained_keeps_every_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    hf = made(tmp_path, "llava")
    convert("megatron-to-hf", "--megatron", megatron(hf, tmp_path / "m"), "--out", tmp_path / "home")
    assert "not trained here: chat template, stop ids and preprocessor are those" in caplog.text
    before, after = digest(hf), digest(tmp_path / "home")
    assert {name: after[name] for name in before if name.endswith((".json", ".jinja"))} == {
        name: value for name, value in before.items() if name.endswith((".json", ".jinja"))
    }


@pytest.mark.parametrize("kind", ["llava", "qwen2", "llama"])
def test_an_export_comes_in_again_with_the_same_ids(kind: str, tmp_path: Path) -> None:
    made(tmp_path, kind)
    checkpoint = trained(tmp_path)
    convert("megatron-to-hf", "--megatron", checkpoint, "--out", tmp_path / "home")
    shutil.move(tmp_path / "home", tmp_path / "again")
    again = megatron(tmp_path / "again", tmp_path / "m2")
    one, two = (load_tokenizer(find_tokenizer(path / "hf")) for path in (checkpoint, again))  # type: ignore[arg-type]
    turns = SAMPLES[1]
    assert encode_prompt(turns, one, [(3,)], SYSTEM).tolist() == encode_prompt(turns, two, [(3,)], SYSTEM).tolist()
    assert one.added and not two.added if kind != "qwen2" else not one.added


def test_pixels_that_a_family_has_no_file_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Qwen-VL's code has CLIP's numbers fixed: weights that were trained on others are not said to be Qwen-VL's."""
    qwen_vl(tmp_path / "hf")
    checkpoint = megatron(tmp_path / "hf", tmp_path / "m")
    recipe = checkpoint / "recipe.yaml"
    text = recipe.read_text()
    assert "image_mean:\n      - 0.48145466" in text
    recipe.write_text(text.replace("image_mean:\n      - 0.48145466", "image_mean:\n      - 0.5"))
    assert main(["convert", "megatron-to-hf", "--megatron", str(checkpoint), "--out", str(tmp_path / "home")]) == 2
    assert "pictures are normalised with other numbers than CLIP's" in capsys.readouterr().err
