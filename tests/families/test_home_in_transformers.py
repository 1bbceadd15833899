"""What goes home answers in Transformers as here, token by token: processor, chat template, tokens, stop ids, weights.

``AutoProcessor`` + ``apply_chat_template`` + ``generate`` on pictures that are not square, beside the session of
``megavlm generate`` on the checkpoint that was exported; for each family that Transformers has a class for.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import family_cases
import glm4v_models
import numpy as np
import pytest
import qwen2_vl_models
import qwen3_vl_models
import torch
from deepseek_models import BEGIN, END, PLACEHOLDER, deepseek_vl
from family_cases import _TEXT, llava, llava_qwen_siglip
from glm4v_models import glm4v
from idefics3_models import TOKENS, idefics3
from internvl_models import internvl
from llava_next_models import llava_next, llava_onevision
from PIL import Image
from qwen2_vl_models import qwen2_5_vl, qwen2_vl
from qwen3_vl_models import qwen3_vl
from ranks import megavlm
from tokenizer_files import GLM_ADDED, write_qwen2
from tokenizers import AddedToken, Tokenizer
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, Qwen2Config
from transformers.models.auto.video_processing_auto import AutoVideoProcessor
from transformers.processing_utils import ProcessorMixin

from megavlm.cli import main
from megavlm.inference.checkpoint import load_for_inference
from megavlm.inference.sampling import Sampling
from megavlm.inference.session import Asked, Session, session
from megavlm.inference.turns import user_turn

NEW_TOKENS = 10
ANSWERS = list[tuple[list[int], list[int]]]
"""Prompt and answer of each question, in ids."""


def _qwen(rows: int) -> Qwen2Config:
    return Qwen2Config(**{**_TEXT, "vocab_size": rows}, tie_word_embeddings=False)


def _with_rows(model: Callable[[], PreTrainedModel], rows: int) -> PreTrainedModel:
    one = model()
    one.config.text_config.vocab_size = rows
    return family_cases.made(type(one), one.config)


MODELS: dict[str, tuple[Callable[[int], PreTrainedModel], tuple[str, ...]]] = {
    "llava": (lambda rows: llava(_qwen(rows)), ("<image>",)),
    "llava_next": (lambda rows: llava_next(_qwen(rows)), ("<image>",)),
    "llava_onevision": (lambda rows: llava_onevision(_qwen(rows)), ("<image>", "<video>")),
    "deepseek_vl": (lambda rows: deepseek_vl(_qwen(rows)), (BEGIN, END, PLACEHOLDER)),
    "idefics3": (lambda rows: idefics3(_qwen(rows)), ("<|begin_of_text|>", *TOKENS)),
    "internvl": (lambda rows: internvl(_qwen(rows)), ("<img>", "</img>", "<IMG_CONTEXT>")),
    "qwen2_vl": (lambda rows: _with_rows(qwen2_vl, rows), ()),
    "qwen2_5_vl": (lambda rows: _with_rows(qwen2_5_vl, rows), ()),
    "qwen3_vl": (lambda rows: _with_rows(qwen3_vl, rows), ()),
    "glm4v": (lambda rows: _with_rows(glm4v, rows), ()),
}
"""A small model with as many rows as its tokenizer has tokens, and the tokens of pictures; the image's by name."""
IMAGE_TOKENS = {
    "internvl": "<IMG_CONTEXT>",
    "deepseek_vl": PLACEHOLDER,
    "glm4v": "<|image|>",
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), "<|image_pad|>"),
}
QWEN = {
    "video_token_id": "<|video_pad|>", "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}  # fmt: skip
GLM = {
    "video_token_id": "<|video|>", "image_start_token_id": "<|begin_of_image|>",
    "image_end_token_id": "<|end_of_image|>", "video_start_token_id": "<|begin_of_video|>",
    "video_end_token_id": "<|end_of_video|>",
}  # fmt: skip
SAVERS = {
    "qwen2_vl": qwen2_vl_models.save, "qwen2_5_vl": qwen2_vl_models.save, "qwen3_vl": qwen3_vl_models.save,
    "glm4v": glm4v_models.save,
}  # fmt: skip

SAME = {*SAVERS, "idefics3"}
"""Put together with a language model of their own kind: no other has their positions, or tokens around tiles."""


class _NoVideos(dict[str, Any]):
    """Stands for a video processor, which needs torchvision; no picture and no text goes through it."""

    model_input_names: tuple[str, ...] = ()


@pytest.fixture(autouse=True)
def _without_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = ProcessorMixin.check_argument_for_proper_class
    monkeypatch.setattr(AutoVideoProcessor, "from_pretrained", classmethod(lambda *_, **__: _NoVideos()))
    monkeypatch.setattr(
        ProcessorMixin,
        "check_argument_for_proper_class",
        lambda self, name, one: None if isinstance(one, _NoVideos) else checked(self, name, one),
    )


def made(name: str, directory: Path) -> Path:
    """Write a model with a tokenizer that has its tokens; nothing else says how to talk to it."""
    directory.mkdir()
    path = write_qwen2(directory, GLM_ADDED, ()) if name == "glm4v" else write_qwen2(directory)
    tokenizer = Tokenizer.from_file(str(path))
    maker, tokens = MODELS[name]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in tokens])
    tokenizer.save(str(path))
    model = maker(tokenizer.get_vocab_size())
    image = tokenizer.token_to_id(IMAGE_TOKENS.get(name, "<image>"))
    model.config.image_token_id = image
    if hasattr(model.config, "image_token_index"):
        model.config.image_token_index = image
    for key, token in (GLM if name == "glm4v" else QWEN).items() if name in SAVERS else ():
        setattr(model.config, key, tokenizer.token_to_id(token))
    if name in SAVERS:
        SAVERS[name](model, directory)
    else:
        model.save_pretrained(directory)
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|endoftext|>" if name == "glm4v" else "<|im_end|>"})
    )
    return directory


def convert(*words: object) -> None:
    assert main(["convert", *map(str, words)]) == 0


def exported(checkpoint: Path, out: Path, *, trained: bool) -> Path:
    """Export, as after a training if that is asked for."""
    if trained:
        (checkpoint / "run.json").write_text(json.dumps({"step": 5}))
    convert("megatron-to-hf", "--megatron", checkpoint, "--out", out)
    return out


def _photograph(width: int, height: int, seed: int) -> bytes:
    small = np.random.default_rng(seed).integers(0, 255, (4, 5, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


ASKED = ((_photograph(120, 44, 1), "How many?"), (_photograph(40, 90, 2), "Who sat? \n a red mat"))


def ours(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> ANSWERS:
    """Ask as ``megavlm generate`` does."""
    recipe, path, tokenizer = load_for_inference(checkpoint, ["training.precision=fp32"])
    chosen: list[int] = []
    piece = Session._piece

    def told(self: Session, prompt: Any, one: Any, *rest: Any) -> Any:
        chosen.append(one.token)
        return piece(self, prompt, one, *rest)

    monkeypatch.setattr(Session, "_piece", told)
    found: ANSWERS = []
    with session(recipe, path, tokenizer) as model:
        for picture, text in ASKED:
            asked = Asked((user_turn(text, 1),), (picture,))
            chosen.clear()
            for _ in model.answer(asked, max_new_tokens=NEW_TOKENS, sampling=Sampling()):
                pass
            found.append((model.cut(asked, NEW_TOKENS)[1].tolist(), list(chosen)))
    return found


def theirs(home: Path) -> ANSWERS:
    """Ask as a user of Transformers does, with nothing but what lies in the directory."""
    processor = AutoProcessor.from_pretrained(home)
    model, info = AutoModelForImageTextToText.from_pretrained(
        home, output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    found: ANSWERS = []
    for picture, text in ASKED:
        content = [{"type": "image", "image": Image.open(io.BytesIO(picture))}, {"type": "text", "text": text}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt",
        )  # fmt: skip
        prompt = inputs["input_ids"][0].tolist()
        with torch.no_grad():
            whole = model.eval().generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        found.append((prompt, whole[0, len(prompt) :].tolist()))
    return found


def check(checkpoint: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> ANSWERS:
    expected = ours(checkpoint, monkeypatch)
    assert theirs(home) == expected
    return expected


CASES = [
    pytest.param(name, marks=[pytest.mark.family(name), *([] if name == "llava" else [pytest.mark.long])])
    for name in MODELS
]


@pytest.mark.parametrize("name", CASES)
def test_after_a_training(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert("hf-to-megatron", "--hf", made(name, tmp_path / "hf"), "--out", tmp_path / "m")
    told = check(tmp_path / "m", exported(tmp_path / "m", tmp_path / "home", trained=True), monkeypatch)
    assert told[0] != told[1]


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_as_it_came(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the first export wrote comes in again, and goes home untouched."""
    convert("hf-to-megatron", "--hf", made(name, tmp_path / "hf"), "--out", tmp_path / "first")
    home = exported(tmp_path / "first", tmp_path / "home", trained=True)
    convert("hf-to-megatron", "--hf", home, "--out", tmp_path / "m")
    check(tmp_path / "m", exported(tmp_path / "m", tmp_path / "again", trained=False), monkeypatch)


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_put_together(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tower and connector of one model and the language model of another, and the other way round."""
    one = made(name, tmp_path / "one")
    # A tower of any size goes with a language model that counts positions by rows and columns, and no other.
    other = made(name if name in SAME else "llava", tmp_path / "other")
    if (
        name != "internvl"
    ):  # alone, its tower and connector are its authors' InternVL, which Transformers has no class for
        words = ["--language", other, "--vision", one, "--connector", one]
        convert("hf-to-megatron", *words, "--out", tmp_path / "m")
        check(tmp_path / "m", exported(tmp_path / "m", tmp_path / "home", trained=False), monkeypatch)
    if name in SAVERS:
        return
    other = other if name not in SAME else made("llava", tmp_path / "tower")
    convert("hf-to-megatron", "--language", one, "--vision", other, "--out", tmp_path / "back")
    check(tmp_path / "back", exported(tmp_path / "back", tmp_path / "home2", trained=True), monkeypatch)


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_with_adapters_merged(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraConfig, get_peft_model

    hf = made(name, tmp_path / "hf")
    convert("hf-to-megatron", "--hf", hf, "--out", tmp_path / "m")
    model = AutoModelForImageTextToText.from_pretrained(hf, dtype=torch.float32)
    targets = r".*(language|text)_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=16, target_modules=targets, init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    convert("hf-to-megatron", "--adapter", tmp_path / "adapter", "--base", tmp_path / "m", "--out", tmp_path / "a")
    before = ours(tmp_path / "m", monkeypatch)
    home = exported(tmp_path / "a", tmp_path / "home", trained=True)
    check(tmp_path / "a", home, monkeypatch)
    assert ours(tmp_path / "a", monkeypatch) != before


def _records(directory: Path) -> Path:
    """Write conversations about pictures of many sizes."""
    directory.mkdir()
    records = []
    for i in range(12):
        (directory / f"{i}.png").write_bytes(_photograph(40 + 9 * i, 90 - 4 * i, i))
        turns = [("user", f"Picture 1: <img>{i}.png</img>\nHow many on the mat?"), ("assistant", f"a cat sat on {i}")]
        records.append({"id": str(i), "conversations": [{"from": who, "value": said} for who, said in turns]})
    (directory / "records.json").write_text(json.dumps(records))
    return directory / "records.json"


@pytest.mark.long
@pytest.mark.parametrize("start", ["whole", "put-together", "lora"])
@pytest.mark.parametrize("name", CASES)
def test_trained_for_two_steps(name: str, start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``checkpoint.export_hf`` writes beside the checkpoints of a run that has learnt something."""
    load = made(name, tmp_path / "hf")
    if start == "put-together":
        other = made(name if name in SAME or name == "internvl" else "llava", tmp_path / "other")
        words = ["--language", other, "--vision", load, "--connector", load]
        if name == "internvl":  # as in test_put_together: its tower has no class of its own
            words = ["--language", load, "--vision", made("llava", tmp_path / "tower")]
        load = tmp_path / "m"
        convert("hf-to-megatron", *words, "--out", load)
    keys = [
        f"checkpoint.load={load}", f"output_dir={tmp_path / 'run'}", f"data.train.0.path={_records(tmp_path / 'data')}",
        f"data.cache={tmp_path / 'cache'}", "data.sequence_length=256", "data.num_workers=0", "optimizer.lr=5e-3",
        "optimizer.warmup_steps=0", "training.train_steps=2", "training.global_batch_size=1", "training.precision=fp32",
        "checkpoint.export_hf=last",
    ]  # fmt: skip
    megavlm(["train", "lora" if start == "lora" else "sft", *keys])
    home = tmp_path / "run" / "hf" / "step-00000002"
    check(tmp_path / "run", home, monkeypatch)
    trained, came = family_cases.load(home), family_cases.load(tmp_path / "hf")
    if start == "whole":
        assert trained.keys() == came.keys() and any(not torch.equal(trained[one], came[one]) for one in came)


@pytest.mark.family("llava")
def test_what_the_family_has_no_place_for_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    model = llava_qwen_siglip()
    model.save_pretrained(tmp_path / "hf")
    convert("hf-to-megatron", "--hf", tmp_path / "hf", "--out", tmp_path / "m")
    exported(tmp_path / "m", tmp_path / "home", trained=True)
    assert "the family cannot say: data.image_alpha: white was trained" in caplog.text
