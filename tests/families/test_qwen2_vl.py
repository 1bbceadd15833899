"""Qwen2-VL and Qwen2.5-VL compute what Transformers' classes compute, at one process and cut over four.

Weights there and back are in test_round_trips.py.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import pytest
import ranks
import torch
from internvl_cases import compare
from native_cases import LAYOUT, answers_are_theirs, convert, merged, write_reference
from PIL import Image
from pydantic import TypeAdapter
from qwen2_vl_models import publish, qwen2_5_vl, qwen2_vl, save
from tokenizers import Tokenizer
from transformers import PreTrainedModel, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from megavlm.cli import main
from megavlm.config.schema import ModelConfig
from megavlm.families.known import FAMILIES
from megavlm.families.presets import expand_presets

pytestmark = pytest.mark.family("qwen2_vl", "qwen2_5_vl")
MODELS: dict[str, tuple[str, Callable[[], PreTrainedModel]]] = {
    "qwen2-vl": ("qwen2_vl", qwen2_vl),
    "qwen2.5-vl": ("qwen2_5_vl", qwen2_5_vl),
    "uneven": ("qwen2_5_vl", lambda: qwen2_5_vl(heads=3)),
}


@pytest.fixture(
    scope="module",
    params=["qwen2.5-vl", *(pytest.param(name, marks=pytest.mark.long) for name in ("qwen2-vl", "uneven"))],
)
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    tmp = tmp_path_factory.mktemp("qwen2_vl")
    model = MODELS[request.param][1]()
    save(model, tmp / "hf")
    recipe = convert(tmp / "hf", tmp / "m")
    assert recipe.model.template == "qwen2_vl"
    image = recipe.model.image
    assert (image.kind, image.min_pixels, image.max_pixels) == ("native", 256, 4096)
    write_reference(model, recipe, tmp / "reference.safetensors")
    return str(tmp / "m"), str(tmp / "reference.safetensors")


def test_features_logits_gradients_and_steps(converted: tuple[str, str]) -> None:
    """At one process and at TP 2 x PP 2 with sequence parallelism."""
    found, losses = compare(*converted, [])
    assert sum(name.startswith("vision.transformer") for name in found) >= 3 * 10
    assert losses[0] > losses[1] > losses[2]
    results = ranks.run("internvl_cases:compare", *converted, LAYOUT, world=4, timeout=600)
    assert {name.split(".")[0] for name in results[0][0]} == {"vision", "connector", "language"}  # on the first stage
    assert set().union(*(there for there, _ in results)) == set(found)
    for _, there in results:
        assert there == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize("name", ["qwen2-vl", "qwen2.5-vl"])
def test_greedy_answers_are_theirs(name: str, tmp_path: Path) -> None:
    """Of pictures that are not square: two, one, none."""
    model = MODELS[name][1]()
    save(model, tmp_path / "hf")
    answers_are_theirs(model, tmp_path)


def test_check_compares_a_published_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its processor cannot be made without torchvision: patches and ids are ours, and that is said."""
    with caplog.at_level("INFO"):
        assert main(["convert", "check", "--hf", str(publish(tmp_path / "hf", qwen2_5_vl))]) == 0, caplog.text
    text = "\n".join(record.getMessage() for record in caplog.records)
    assert "Qwen2_5_VLForConditionalGeneration, fp32" in text and text.count("greedy answers: equal") == 3
    assert "all within the tolerance" in text


@pytest.mark.long
def test_prepare_train_and_export(tmp_path: Path) -> None:
    """Pictures of several sizes; Transformers gives the same logits with what was trained, and the same pixels."""
    source = publish(tmp_path / "hf", qwen2_vl)
    recipe = convert(source, tmp_path / "m")
    assert recipe.model.template.startswith("checkpoint")
    records = []
    (tmp_path / "pictures").mkdir()
    for i, size in enumerate(((30, 90), (64, 64), (17, 40), (80, 20))):
        Image.effect_noise(size, 60).convert("RGB").save(tmp_path / "pictures" / f"{i}.png")
        shown = f"Picture 1: <img>{i}.png</img>\n" if i else ""
        turns = [{"from": "user", "value": f"{shown}What is it?"}, {"from": "assistant", "value": f"The number {i}."}]
        records.append({"id": str(i), "conversations": turns})
    (tmp_path / "records.json").write_text(json.dumps(records))
    words = ["prepare", str(tmp_path / "records.json"), "--images", str(tmp_path / "pictures")]
    assert main([*words, "--out", str(tmp_path / "data")]) == 0
    run = tmp_path / "run"
    train = [
        "train",
        str(tmp_path / "m" / "recipe.yaml"),
        f"data.train.0.path={tmp_path / 'data'}",
        f"output_dir={run}",
    ]
    small = ["training.train_steps=3", "training.global_batch_size=2", "data.sequence_length=256", "data.num_workers=0"]
    small += ["optimizer.warmup_steps=0", "optimizer.lr=1e-3"]
    ranks.megavlm([*train, *small, *LAYOUT, "training.precision=fp32", "model.image.max_pixels=2048"], world=4)
    out = tmp_path / "out"
    assert main(["convert", "megatron-to-hf", "--megatron", str(run), "--out", str(out)]) == 0
    told = json.loads((out / "preprocessor_config.json").read_text())
    assert told == {**told, "min_pixels": 256, "max_pixels": 2048, "image_processor_type": "Qwen2VLImageProcessor"}
    trained, before = (Qwen2VLForConditionalGeneration.from_pretrained(path) for path in (out, source))
    changed = dict(before.named_parameters())
    assert all(not torch.equal(p, changed[name]) for name, p in trained.named_parameters() if p.dim() > 1)
    assert main(["convert", "check", "--hf", str(out)]) == 0
    picture = tmp_path / "pictures" / "0.png"
    words = ["generate", str(run), "--image", str(picture), "--prompt", "What is it?", "--max-new-tokens=8"]
    answer = ranks.megavlm(words, apart=True).stdout
    assert answer.strip() == theirs(trained, out, picture, "What is it?", 8).strip() != ""


def theirs(model: PreTrainedModel, directory: Path, picture: Path, question: str, most: int) -> str:
    """Return Transformers' greedy answer, from the picture's file, with the PIL variant of its processor."""
    processor = Qwen2VLImageProcessorPil.from_pretrained(directory)
    made = processor(Image.open(picture).convert("RGB"), return_tensors="pt")
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    content = [{"type": "image"}, {"type": "text", "text": question}]
    template = json.loads((directory / "tokenizer_config.json").read_text())["chat_template"]
    messages = [{"role": "user", "content": content}]
    text = jinja2.Template(template).render(messages=messages, add_generation_prompt=True)
    slots = int(made["image_grid_thw"].prod()) // processor.merge_size**2
    text = text.replace("<|image_pad|>", "<|image_pad|>" * slots)
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids)
    kinds = (ids == model.config.image_token_id).int()[None]
    whole = model.generate(
        input_ids=ids[None], attention_mask=torch.ones(1, len(ids)), mm_token_type_ids=kinds, do_sample=False,
        max_new_tokens=most, pad_token_id=0, **made,
    )  # fmt: skip
    return tokenizer.decode(whole[0, len(ids) :].tolist())


@pytest.mark.parametrize(
    ("file", "values", "said"),
    [
        ("preprocessor_config.json", {"merge_size": 4}, "merge_size is 4, but config.json's tower has 2"),
        ("preprocessor_config.json", {"do_resize": False}, "do_resize is False"),
        ("preprocessor_config.json", {"max_pixels": "many"}, "max_pixels is 'many'"),
        ("preprocessor_config.json", {"min_pixels": 8192}, "4096 is less than model.image.min_pixels (8192)"),
        ("preprocessor_config.json", {"image_processor_type": "CLIPImageProcessor"}, "image_processor_type"),
        ("preprocessor_config.json", None, "neither preprocessor_config.json nor processor_config.json"),
        ("config.json", {"vision_config": {"window_size": 0}}, "window_size"),
        ("config.json", {"vision_config": {"out_hidden_size": 32}}, "vectors of 32, but the language model takes 64"),
        ("config.json", {"vision_config": {"hidden_act": "gelu"}}, "hidden_act is 'gelu'"),
        ("config.json", {"text_config": {"rope_parameters": {"mrope_section": None}}}, "mrope_section"),
        ("config.json", {"text_config": {"use_sliding_window": True}}, "use_sliding_window is True"),
    ],
)
def test_what_is_not_supported_is_said(
    file: str, values: dict[str, Any] | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save(qwen2_5_vl(), tmp_path / "hf")
    path = source / file
    if values is None:
        path.unlink()
    else:
        path.write_text(json.dumps(merged(json.loads(path.read_text()), values)))
    assert main(["convert", "hf-to-megatron", "--hf", str(source), "--out", str(tmp_path / "m")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def test_other_models_are_refused() -> None:
    """An export says why a model is none of the family."""
    tree = {"model": {"preset": "qwen2_5_vl_7b"}}
    model: ModelConfig = TypeAdapter(ModelConfig).validate_python(expand_presets(tree)["model"])
    family = FAMILIES["qwen2_5_vl"]
    assert family.refusal(model) is None
    assert "gated_mlp" in str(FAMILIES["qwen2_vl"].refusal(model)) or "normalization" in str(
        FAMILIES["qwen2_vl"].refusal(model)
    )
    for part, keys, said in (
        ("language", {"rotary_sections": ()}, "not in sections"),
        ("language", {"add_qkv_bias": False}, "no bias"),
        ("vision", {"window_size": None, "full_attention_layers": ()}, "whole pictures"),
        ("connector", {"normalization": "LayerNorm"}, "another norm"),
        ("image", {"min_pixels": 10**9}, "less than model.image.min_pixels"),
    ):
        other = dataclasses.replace(model, **{part: dataclasses.replace(getattr(model, part), **keys)})
        assert said in str(family.refusal(other)), part
