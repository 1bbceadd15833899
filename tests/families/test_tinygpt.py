"""TinyGPT-V: what the rows of test_whole.py do not try.

Norms that no file has or two have, templates, sizes counted from the parts, adapters in the trainer's file, bad input.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from minigpt_models import EvaTower
from safetensors.torch import load_file
from test_minigpt import command, refused
from tinygpt_models import STAGE_4, START, TINY, TinyGPT, TinyGPTSource, TinySizes, tinygpt_rows
from tokenizer_files import write_llava
from torch import nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel, PhiConfig, PhiForCausalLM
from whole_source import asked

from megavlm.checkpoint.hf.given import make_model, open_directory, understand
from megavlm.config.load import load_recipe
from megavlm.data.chat import encode_conversation
from megavlm.data.schema import IMAGE_PLACEHOLDER, Conversation, Turn
from megavlm.data.templates import find_template
from megavlm.data.tokenizer import load_tokenizer
from megavlm.families.known import FAMILIES
from megavlm.families.presets import expand_presets
from megavlm.weights.source import Source

pytestmark = pytest.mark.family("tinygpt_v")
ROW = tinygpt_rows("", {})["tinygpt_v"]


def test_stage_4_sees_more_pixels(tmp_path: Path) -> None:
    for name, sizes, side in (("three", TINY, 28), ("four", STAGE_4, 28), ("start", START, 28)):
        path = TinyGPT(sizes).save_pretrained(tmp_path / name)
        found = understand(*(lambda given, home: (given, {}, home))(*open_directory(path)))
        assert (found.model.vision.image_size, found.model.image.kind, found.model.tokens_per_view) == (
            side, "squash", 5,
        )  # fmt: skip
        assert found.model.vision.positional_grid == sizes.grid


def test_norms_begin_as_its_code_begins_them(tmp_path: Path) -> None:
    """Phi-2 as published, beside nothing that was trained; then home, where all are written."""
    start = TinyGPT(START).save_pretrained(tmp_path / "start")
    command("hf-to-megatron", "--hf", start, "--out", tmp_path / "m", "--seed", "1")
    command("megatron-to-hf", "--megatron", tmp_path / "m", "--out", tmp_path / "back")
    text, before = load_file(tmp_path / "back" / "llm" / "model.safetensors"), Source(start)
    made = {name: value for name, value in text.items() if f"llm/{name}" not in before}
    assert len(made) == 4 * 5
    assert all((value == (0 if name.endswith("bias") else 1)).all() for name, value in made.items())
    assert all(torch.equal(value, before.get(f"llm/{name}")) for name, value in text.items() if name not in made)
    state = torch.load(tmp_path / "back" / "checkpoint.pth", weights_only=True)["model"]
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        "llama_proj.weight": (4096, 256), "llama_proj.bias": (4096,),
        "llama_proj2.weight": (64, 4096), "llama_proj2.bias": (64,),
    }  # fmt: skip
    assert 0.9 / 64 < state["llama_proj2.weight"].abs().max() <= 1 / 64


def test_what_was_trained_counts_and_the_other_norms_are_carried(tmp_path: Path) -> None:
    source = TinyGPT(replace(TINY, bare=True)).save_pretrained(tmp_path / "hf")
    command("hf-to-megatron", "--hf", source, "--out", tmp_path / "m")
    command("megatron-to-hf", "--megatron", tmp_path / "m", "--out", tmp_path / "back")
    one, two = Source(source), Source(tmp_path / "back")
    both = [name for name in one.tensors if name.endswith("input_layernorm.weight")]
    assert len(both) == 8 and not torch.equal(one.get(both[0]), one.get(both[4]))
    assert all(torch.equal(one.get(name), two.get(name)) for name in one.tensors if "position_ids" not in name)
    made = {name for name in two.tensors if name not in one.tensors}
    assert len(made) == 8 and all(name.endswith("layernorm.bias") for name in made)


def test_the_ids_are_those_of_pieces_that_are_encoded_apart(tmp_path: Path) -> None:
    """``prompt_wrap`` and ``tokenize_conversation`` of minigpt_base.py: every exchange begins with Phi-2's token."""
    tree = json.loads(write_llava(tmp_path).read_text())
    text = json.dumps(tree).replace("<s>", "<|endoftext|>")
    (tmp_path / "tokenizer.json").write_text(text)
    for file in tmp_path.glob("*config.json"):
        file.write_text(file.read_text().replace("<s>", "<|endoftext|>"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json", find_template("tinygpt_v"))
    turns = (
        Turn("user", f"{IMAGE_PLACEHOLDER} the cat"), Turn("assistant", "a mat"),
        Turn("user", "and the cat"), Turn("assistant", "the mat"),
    )  # fmt: skip
    sample = encode_conversation(Conversation("", turns, ("a",), ""), tokenizer, [(3,)], None)
    begin, code = tokenizer.ids["<|endoftext|>"], tokenizer.encode
    answers = [code("a mat###"), code("the mat###")]
    wanted = [begin, *code("###Human: <Img>"), *[tokenizer.imgpad_id] * 3, *code("</Img> the cat ###Assistant: ")]
    wanted += [*answers[0], begin, *code("###Human: and the cat ###Assistant: "), *answers[1]]
    assert sample.tokens.tolist() == wanted
    assert [one for one in sample.labels.tolist() if one != -100] == [*answers[0], *answers[1]]


@pytest.mark.parametrize("preset", ["tinygpt_v_224", "tinygpt_v"])
def test_presets_have_the_sizes_of_their_parts(preset: str) -> None:
    model: Any = make_model({"preset": preset}, preset)
    text = FAMILIES["tinygpt_v"].config(model, {})
    with torch.device("meta"):
        phi = PhiForCausalLM(PhiConfig(**{**text, "qk_layernorm": True}))
        parts: list[nn.Module] = [
            EvaTower(16, 16, 39, 6144, 14), nn.LayerNorm(1408), phi, Blip2QFormerModel(Blip2QFormerConfig()),
            nn.Linear(768, 4096), nn.Linear(4096, 2560),
        ]  # fmt: skip
    count = sum(p.numel() for part in parts for p in part.parameters()) + 32 * 768 + 32 * 2560
    assert count == ROW.presets[preset].count  # type: ignore[index]
    assert (model.tokens_per_view, model.language.num_layers) == (32, 32)


def no_q_former(path: Path) -> None:
    (path / "blip2_pretrained_flant5xxl.pth").unlink()


def in_three(path: Path) -> None:
    PhiForCausalLM(PhiConfig.from_pretrained(path / "llm")).save_pretrained(path / "llm")


def unknown(path: Path) -> None:
    state = torch.load(path / "pretrained_minigpt.pth", weights_only=True)
    torch.save({"model": state["model"] | {"llama_proj3.weight": torch.zeros(2)}}, path / "pretrained_minigpt.pth")


BAD: dict[str, tuple[TinySizes, Callable[[Path], None], tuple[str, ...]]] = {
    "no q-former": (TINY, no_q_former, ("blip2_pretrained_flant5xxl.pth",)),
    "phi of transformers": (TINY, in_three, ("q_proj", "query_key_value", "README.md")),
    "unknown": (TINY, unknown, ("minigpt/llama_proj3.weight: unknown to the family tinygpt_v",)),
}


@pytest.mark.parametrize("name", BAD)
def test_files_that_do_not_fit(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes, spoil, words = BAD[name]
    spoil(TinyGPT(sizes).save_pretrained(tmp_path / "hf"))
    line = refused(capsys, "hf-to-megatron", "--hf", tmp_path / "hf", "--out", tmp_path / "m")
    assert str(tmp_path / "hf") in line and all(word in line for word in words), line


def test_models_that_are_none() -> None:
    for keys, word in (
        ({"image": {"kind": "pad"}}, "squashes"),
        ({"connector": {"projection_hidden_size": None}}, "one linear layer"),
        ({"connector": {"num_attention_heads": 6}}, "64 wide"),
        ({"vision": {"post_layernorm_epsilon": None}}, "epsilon 1e-5"),
        ({"language": {"attention_branch_norm": False}}, "attention_branch_norm is False"),
        ({"language": {"qk_layernorm": False}}, "qk_layernorm is False"),
    ):
        model = make_model({"preset": "tinygpt_v", **keys}, "here")  # type: ignore[dict-item]
        assert word in str(FAMILIES["tinygpt_v"].refusal(model)), keys
    other = make_model({"preset": "tinygpt_v"}, "here")  # type: ignore[dict-item]
    assert "norm stands behind attention alone" in str(FAMILIES["blip2"].refusal(other))


@pytest.mark.long
def test_adapters_in_the_trainers_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They compute what A and B do beside the one projection of its code."""
    from test_peft import close
    from test_whole import logits_of

    given: Any = TinyGPTSource(STAGE_4)
    source = given.model.save_pretrained(tmp_path / "hf")
    command("hf-to-megatron", "--hf", source, "--out", tmp_path / "m")
    file = source / "pretrained_minigpt.pth"
    command("hf-to-megatron", "--adapter", file, "--base", tmp_path / "m", "--out", tmp_path / "adapted")
    recipe = load_recipe(tmp_path / "adapted" / "recipe.yaml", [], expand_presets)
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.lora.dropout) == (4, 16, 0.05)
    assert sorted(recipe.lora.targets) == ["self_attn.dense", "self_attn.query_key_value"]
    sample = given.shown(recipe.model, *asked(28)[2])
    without, found = (logits_of(tmp_path / name, sample, given.image) for name in ("m", "adapted"))
    given.model.add_adapters()
    with torch.no_grad():
        close(given.logits(sample), found)
    assert (found - without).abs().max() > 0.01
    for name, word in (("layers.0.post_layernorm", "the norm"), ("llama_proj2", "the projection")):
        other = torch.load(file, weights_only=True)
        key = f"llama_model.base_model.model.model.{name}.weight" if "layers" in name else f"{name}.weight"
        other["model"][key] = other["model"][key] + 1
        torch.save(other, tmp_path / "other.pth")
        line = refused(capsys, "hf-to-megatron", "--adapter", tmp_path / "other.pth", "--base", tmp_path / "m",
                       "--out", tmp_path / "no")  # fmt: skip
        assert f"other.pth: what it holds of {word}" in line
