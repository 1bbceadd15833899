"""MiniGPT-4 and MiniGPT-v2: what the rows of test_whole.py do not try.

What no file has, templates, sizes counted from the parts, adapters in the trainer's own file, and bad input.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from minigpt_models import ADAPTED, LLAMA_2, MINIGPT, QUERIES, V2, EvaTower, MiniGPT, MiniGPTSource, Sizes, minigpt_rows
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from tokenizer_files import write_llava
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Blip2QFormerConfig, Blip2QFormerModel
from whole_source import asked

from megavlm.checkpoint.hf.given import SourceOfParts, make_model, open_directory, understand
from megavlm.cli import main
from megavlm.config.load import load_recipe
from megavlm.data.chat import encode_conversation, last_question
from megavlm.data.schema import IMAGE_PLACEHOLDER, Conversation, Turn
from megavlm.data.templates import find_template
from megavlm.data.tokenizer import load_tokenizer
from megavlm.families import minigpt
from megavlm.families.known import FAMILIES
from megavlm.families.presets import expand_presets
from megavlm.weights.source import Source

pytestmark = pytest.mark.family("minigpt_v2")
ROWS = minigpt_rows("", {})


def command(*words: object) -> None:
    assert main(["convert", *map(str, words)]) == 0


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main(["convert", *map(str, words)]) == 2
    (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("megavlm: error: ")]
    return line


TEMPLATES = {
    "minigpt4": (QUERIES, 28),
    "minigpt_v2": (replace(ADAPTED, norm=False), 28),
    "minigpt4_llama_2": (LLAMA_2, 28),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_template_and_the_pictures_are_those_of_the_system(name: str, tmp_path: Path) -> None:
    sizes, side = TEMPLATES[name]
    MiniGPT(replace(sizes, vocab=448)).save_pretrained(tmp_path)
    write_llava(tmp_path / "llm")
    found = understand(*(lambda given, home: (given, {}, home))(*open_directory(tmp_path)))
    assert found.model.template == name and found.tokenizer == tmp_path / "llm" / "tokenizer.json"
    assert (found.model.vision.image_size, found.model.image.kind) == (side, "squash")
    assert found.model.tokens_per_view == (5 if name == "minigpt4" else 4)
    made = [note for note in found.notes if "ln_vision" in note]
    assert len(made) == (2 if name == "minigpt_v2" else 0)


def test_the_ids_are_those_of_pieces_that_are_encoded_apart(tmp_path: Path) -> None:
    """``prompt_wrap`` and ``tokenize_conversation`` of minigpt_base.py: text around a picture, and each answer."""
    path = write_llava(tmp_path)
    turns = (Turn("user", f"{IMAGE_PLACEHOLDER} [refer] the cat"), Turn("assistant", "a mat"))
    for name, pieces, answer in (
        ("minigpt_v2", ("[INST] <Img>", "</Img> [refer] the cat [/INST]"), "a mat"),
        ("minigpt4_llama_2", ("[INST] <Img>", "</Img> [refer] the cat [/INST] "), "a mat"),
        ("minigpt4", ("###Human: <Img>", "</Img> [refer] the cat ###Assistant: "), "a mat###"),
    ):
        tokenizer = load_tokenizer(path, find_template(name))
        sample = encode_conversation(Conversation("", turns, ("a",), ""), tokenizer, [(3,)], None)
        begin, end = tokenizer.ids["<s>"], [] if name == "minigpt4" else [tokenizer.ids["</s>"]]
        before, behind = (tokenizer.encode(piece) for piece in pieces)
        spoken = tokenizer.encode(answer) + end
        wanted = [begin, *before, *[tokenizer.imgpad_id] * 3, *behind, *spoken]
        assert sample.tokens.tolist() == wanted, name
        assert sample.labels.tolist()[-len(spoken) :] == spoken and (sample.labels[: -len(spoken)] == -100).all()
        assert (
            last_question(sample.tokens[: -len(spoken)].tolist(), tokenizer) == f"{IMAGE_PLACEHOLDER} [refer] the cat"
        )
    hashes = tokenizer.encode("a###")[len(tokenizer.encode("a")) :]
    assert tokenizer.stop_ids == (hashes[0], tokenizer.eos_id)


@pytest.mark.parametrize(("family", "preset"), [(name, preset) for name, row in ROWS.items() for preset in row.presets])
def test_presets_have_the_sizes_of_their_parts(family: str, preset: str) -> None:
    model: Any = make_model({"preset": preset}, preset)  # type: ignore[dict-item]
    text = {key: value for key, value in FAMILIES[family].config(model, {}).items() if key != "model_type"}
    with torch.device("meta"):
        parts: list[nn.Module] = [
            EvaTower(16, 16, 39, 6144, 14), nn.LayerNorm(1408),
            AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **text)),
        ]  # fmt: skip
        queries = family == "minigpt4"
        if queries:
            parts.append(Blip2QFormerModel(Blip2QFormerConfig()))
        parts.append(nn.Linear(768 if queries else 4 * 1408, model.language.hidden_size))
    count = sum(p.numel() for part in parts for p in part.parameters()) + (32 * 768 if queries else 0)
    assert count == ROWS[family].presets[preset].count  # type: ignore[index]
    assert model.tokens_per_view == {"minigpt_v2_7b": 256, "minigpt4_llama_2_7b": 64}.get(preset, 32)


def test_what_no_file_has_is_made_and_goes_home(tmp_path: Path) -> None:
    """MiniGPT-v2 as it is published: adapters and ``llama_proj``; and what the first stage begins with."""
    published = MiniGPT(replace(ADAPTED, norm=False)).save_pretrained(tmp_path / "v2")
    command("hf-to-megatron", "--hf", published, "--out", tmp_path / "m")
    record = json.loads((tmp_path / "m" / "hf" / "conversion.json").read_text())
    (why,) = [why for why in record["ignored"] if "--adapter" in why]
    assert len(record["ignored"][why]) == 4 * 2 * 2
    command("megatron-to-hf", "--megatron", tmp_path / "m", "--out", tmp_path / "back")
    state = torch.load(tmp_path / "back" / "checkpoint.pth", weights_only=True)
    assert state["config"]["model"] == {"arch": "minigpt_v2", "image_size": 28, "model_type": "pretrain"}
    assert sorted(state["model"]) == ["llama_proj.bias", "llama_proj.weight", "ln_vision.bias", "ln_vision.weight"]
    assert (state["model"]["ln_vision.weight"] == 1).all() and (state["model"]["ln_vision.bias"] == 0).all()
    tower = torch.load(tmp_path / "back" / "eva_vit_g.pth", weights_only=True)
    assert all(torch.equal(value, tower[name]) for name, value in MiniGPT(ADAPTED).visual_encoder.state_dict().items())
    start = MiniGPT(replace(QUERIES, projection=False)).save_pretrained(tmp_path / "start")
    for seed, out in (("1", "a"), ("1", "b"), ("2", "c")):
        command("hf-to-megatron", "--hf", start, "--out", tmp_path / out, "--seed", seed)
        command("megatron-to-hf", "--megatron", tmp_path / out, "--out", tmp_path / f"{out}-hf")
    one, same, other = (Source(tmp_path / f"{out}-hf").get("minigpt/llama_proj.weight") for out in "abc")
    assert torch.equal(one, same) and not torch.equal(one, other) and 0.9 / 16 < one.abs().max() <= 1 / 16


def test_the_last_layer_of_the_tower_is_carried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minigpt, "_LAYERS", 1)  # of the published file's 40 it is 39
    source = MINIGPT["minigpt4_llama_2"][1](tmp_path / "hf")
    assert SourceOfParts.open(source).branches["vision"]["num_layers"] == 1
    command("hf-to-megatron", "--hf", source, "--out", tmp_path / "m")
    command("megatron-to-hf", "--megatron", tmp_path / "m", "--out", tmp_path / "back")
    one, two = Source(source), Source(tmp_path / "back")
    assert one.tensors.keys() == two.tensors.keys()
    assert all(torch.equal(one.get(name), two.get(name)) for name in one.tensors)


def twice(path: Path) -> None:
    torch.save({}, path / "second.pth")


def narrow(path: Path) -> None:
    torch.save({"model": {"llama_proj.weight": torch.zeros(64, 256), "llama_proj.bias": torch.zeros(64)}},
               path / "pretrained_minigpt.pth")  # fmt: skip


def unknown(path: Path) -> None:
    state = torch.load(path / "pretrained_minigpt.pth", weights_only=True)
    torch.save({"model": state["model"] | {"llama_proj2.weight": torch.zeros(2)}}, path / "pretrained_minigpt.pth")


def other_text(path: Path) -> None:
    tree = json.loads((path / "llm" / "config.json").read_text())
    (path / "llm" / "config.json").write_text(json.dumps(tree | {"model_type": "gemma"}))


BAD: dict[str, tuple[Sizes, Callable[[Path], None], tuple[str, ...]]] = {
    "two files": (V2, twice, ("pretrained_minigpt.pth", "second.pth", "move one elsewhere")),
    "no q-former": (LLAMA_2, narrow, ("llama_proj.weight takes 256", "704", "blip2_pretrained_flant5xxl.pth")),
    "unknown": (V2, unknown, ("minigpt/llama_proj2.weight: unknown to the family minigpt_v2",)),
    "language": (QUERIES, other_text, ("llm/config.json", "'gemma'", "'llama'")),
}


@pytest.mark.parametrize("name", BAD)
def test_files_that_do_not_fit(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes, spoil, words = BAD[name]
    spoil(MiniGPT(sizes).save_pretrained(tmp_path / "hf"))
    line = refused(capsys, "hf-to-megatron", "--hf", tmp_path / "hf", "--out", tmp_path / "m")
    assert str(tmp_path / "hf") in line and all(word in line for word in words), line


def test_models_that_are_none() -> None:
    family = FAMILIES["minigpt_v2"]
    for keys, word in (
        ({"vision": {"key_bias": True}}, "EVA01"),
        ({"vision": {"post_layernorm_epsilon": None}}, "epsilon 1e-5"),
        ({"vision": {"num_attention_heads": 32}}, "heads are 44 wide"),
        ({"vision": {"num_layers": 40}}, "40 layers"),
        ({"connector": {"patches": 8}}, "8 patches"),
        ({"connector": {"merge": "square"}}, "patches of a row"),
        ({"connector": {"add_bias_linear": False}}, "no bias"),
        ({"image": {"kind": "pad"}}, "squashes"),
        ({"language": {"add_qkv_bias": True}}, "qwen2"),
    ):
        model = make_model({"preset": "minigpt_v2_7b", **keys}, "here")  # type: ignore[dict-item]
        assert word in str(family.refusal(model)), keys
    for keys, word in (
        ({"connector": {"num_attention_heads": 6}}, "64 wide"),
        ({"connector": {"cross_attention_frequency": 1}}, "every second layer"),
    ):
        model = make_model({"preset": "minigpt4_7b", **keys}, "here")  # type: ignore[dict-item]
        assert word in str(FAMILIES["minigpt4"].refusal(model)), keys


@pytest.mark.long
def test_adapters_in_the_trainers_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They compute what PEFT's do with its code's rank, alpha and targets."""
    from test_peft import close
    from test_whole import logits_of

    given: Any = MiniGPTSource("minigpt_v2", ADAPTED)
    source = given.model.save_pretrained(tmp_path / "hf")
    command("hf-to-megatron", "--hf", source, "--out", tmp_path / "m")
    file = source / "pretrained_minigpt.pth"
    command("hf-to-megatron", "--adapter", file, "--base", tmp_path / "m", "--out", tmp_path / "adapted")
    recipe = load_recipe(tmp_path / "adapted" / "recipe.yaml", [], expand_presets)
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.lora.dropout) == (4, 16, 0.05)
    sample = given.shown(recipe.model, *asked(28)[2])
    without, found = (logits_of(tmp_path / name, sample, given.image) for name in ("m", "adapted"))
    wanted = LoraConfig(r=4, lora_alpha=16, lora_dropout=0.05, target_modules=["q_proj", "v_proj"])
    text = get_peft_model(given.model.llama_model, wanted).eval()
    state = {name.removeprefix("llama_model."): value for name, value in given.model.adapters().items()}
    assert not set_peft_model_state_dict(text, state).unexpected_keys
    given.model.llama_model = text.base_model.model
    with torch.no_grad():
        close(given.logits(sample), found)
    assert (found - without).abs().max() > 0.01
    torch.save({"model": {"llama_proj.bias": torch.zeros(3)}}, tmp_path / "none.pth")
    line = refused(capsys, "hf-to-megatron", "--adapter", tmp_path / "none.pth", "--base", tmp_path / "m",
                   "--out", tmp_path / "no")  # fmt: skip
    assert "none.pth: holds no adapters of MiniGPT-v2" in line
    other = torch.load(file, weights_only=True)
    other["model"]["llama_proj.weight"] = other["model"]["llama_proj.weight"] + 1
    torch.save(other, tmp_path / "other.pth")
    line = refused(capsys, "hf-to-megatron", "--adapter", tmp_path / "other.pth", "--base", tmp_path / "m",
                   "--out", tmp_path / "no")  # fmt: skip
    assert "other.pth: what it holds of the projection (llama_proj.weight) is not what" in line
