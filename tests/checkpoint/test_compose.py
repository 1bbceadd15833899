"""A start point from separate checkpoints: parts of the right kinds, fresh ones by the seed, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from family_cases import (
    CODEFUSE,
    codefuse,
    codefuse_parts,
    codefuse_published,
    codefuse_state,
    load,
    make,
    qwen_config,
    visual_config,
    write,
)
from text_cases import ROWS
from tokenizer_files import write_llama
from transformers import CLIPVisionModel, LlavaForConditionalGeneration

from megavlm.cli import main
from megavlm.config import yaml12


def compose(out: Path, *words: str | Path) -> int:
    return main(["convert", "hf-to-megatron", *map(str, words), "--out", str(out)])


def export(checkpoint: Path, out: Path, *words: str) -> Path:
    assert main(["convert", "megatron-to-hf", "--megatron", str(checkpoint), "--out", str(out), *words]) == 0
    return out


def record(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "hf" / "conversion.json").read_text())


def test_codefuse_from_its_parts_equals_codefuse_whole(tmp_path: Path) -> None:
    language, tower, projector = codefuse_parts(tmp_path / "parts")
    assert compose(tmp_path / "m", "--language", language, "--vision", tower, "--connector", projector) == 0
    out = export(tmp_path / "m", tmp_path / "out", "--family", "codefuse_vlm")
    whole = load(codefuse(tmp_path / "whole"))
    parts = load(out)
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "llava_qwen" and config["mm_projector_type"] == "cross_attn"
    visual = json.loads((out / "visual_config.json").read_text())
    assert visual == {**visual, **json.loads((tower / "visual_config.json").read_text()), "image_start_id": 151857}


def test_codefuse_as_it_is_published(tmp_path: Path) -> None:
    source = codefuse_published(tmp_path / "hf")
    assert compose(tmp_path / "m", "--hf", source) == 0
    out, whole = load(export(tmp_path / "m", tmp_path / "out")), load(codefuse(tmp_path / "whole"))
    assert whole.keys() == out.keys() and all(torch.equal(whole[name], out[name]) for name in whole)
    # Its language model alone, whose config.json may be that of the whole.
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": "llava_qwen"}))
    clip = make("clip", tmp_path / "clip")
    assert compose(tmp_path / "n", "--language", source, "--vision", clip) == 0


@pytest.mark.parametrize(("dtype", "type_"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_another_number_type(dtype: str, type_: torch.dtype, tmp_path: Path) -> None:
    source = make("qwen_vl", tmp_path / "hf")
    assert compose(tmp_path / "m", "--hf", source) == 0
    out = export(tmp_path / "m", tmp_path / "out", "--dtype", dtype)
    before, after = load(source), load(out)
    assert all(value.dtype is type_ and torch.equal(value, before[name].to(type_)) for name, value in after.items())
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == str(type_).removeprefix("torch.")


def test_a_fresh_resampler_follows_the_seed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As CodeFuse-VLM starts: a Qwen LLM, Qwen-VL's tower, a new resampler."""
    qwen, qwen_vl = make("qwen", tmp_path / "qwen"), make("qwen_vl", tmp_path / "qwen_vl")
    outs = {}
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert compose(tmp_path / name, "--language", qwen, "--vision", qwen_vl, "--seed", seed) == 0
        outs[name] = load(export(tmp_path / name, tmp_path / f"{name}-hf"))
    assert "initialised: connector: resampler, " in caplog.text
    a, b, c = outs.values()
    assert all(torch.equal(a[name], b[name]) for name in a)
    differing = {name for name in a if not torch.equal(a[name], c[name])}
    assert differing and all("attn_pool" in name or name.endswith(".proj") for name in differing)
    tower, language = load(qwen_vl), load(qwen)
    for name, value in a.items():
        if "visual" not in name:
            assert torch.equal(value, language[name])
        elif name not in differing and name in tower and "attn_pool" not in name and "ln_post" not in name:
            assert torch.equal(value, tower[name])
    ignored = record(tmp_path / "a")["ignored"]
    assert any("which is not asked for" in why for why in ignored)


def test_a_recipe_says_what_is_missing(tmp_path: Path) -> None:
    """Its connector, its seed and its data; the language model and the tower are the sources'."""
    qwen, clip = make("qwen", tmp_path / "qwen"), make("clip_vision", tmp_path / "clip")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "output_dir: runs/x\nmodel: {preset: tiny, connector: {num_queries: 9, head_dim: 64}}\n"
        "data: {train: [{path: here}], sequence_length: 512, tokenizer: t.model}\noptimizer: {lr: 1e-3}\n"
        "training: {train_steps: 7, global_batch_size: 4, seed: 5}\n"
    )
    assert compose(tmp_path / "m", "--language", qwen, "--vision", clip, "--recipe", recipe) == 0
    tree = yaml12.parse((tmp_path / "m" / "recipe.yaml").read_text())
    assert tree["model"]["connector"]["num_queries"] == 9 and tree["model"]["language"]["hidden_size"] == 256
    assert tree["training"]["train_steps"] == 7 and tree["data"]["sequence_length"] == 512
    assert tree["checkpoint"]["load"] == str(tmp_path / "m")
    assert compose(tmp_path / "n", "--language", qwen, "--vision", clip, "--recipe", recipe, "--seed", "5") == 0
    assert record(tmp_path / "m")["initialised"] == record(tmp_path / "n")["initialised"]


def test_no_family_holds_an_odd_mixture_but_its_parts_go_home(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    qwen3, clip = make("qwen3", tmp_path / "qwen3"), make("clip_vision", tmp_path / "clip")
    words = ["--language", qwen3, "--vision", clip, "--connector-preset", "linear"]
    assert compose(tmp_path / "m", *words) == 0
    assert main(["convert", "megatron-to-hf", "--megatron", str(tmp_path / "m"), "--out", str(tmp_path / "o")]) == 2
    (message,) = (line for line in capsys.readouterr().err.splitlines() if "error: " in line)
    assert "no Hugging Face family holds this model whole" in message
    # Three of nearly as many families as there are; the asked one says its own reason.
    rest = r"and \d\d+ others, of which --family NAME says why\); export its"
    assert re.search(rf"\(\w+: .+; \w+: .+; \w+: .+; {rest}", message)
    assert len(message) < 1000 and message.endswith("--family mm_projector or llama or clip"), message
    asked = ["--megatron", str(tmp_path / "m"), "--out", str(tmp_path / "o"), "--family", "llava"]
    assert main(["convert", "megatron-to-hf", *asked]) == 2
    assert "--family llava: the connector is linear" in capsys.readouterr().err
    back = load(export(tmp_path / "m", tmp_path / "llm", "--family", "llama"))
    assert all(torch.equal(value, back[name]) for name, value in load(qwen3).items())
    tower = export(tmp_path / "m", tmp_path / "tower", "--family", "clip")
    CLIPVisionModel.from_pretrained(tower)
    refused = ["--megatron", str(tmp_path / "m"), "--out", str(tmp_path / "o"), "--family"]
    assert main(["convert", "megatron-to-hf", *refused, "siglip"]) == 2
    assert "the vision tower is not SigLIP's" in capsys.readouterr().err
    assert main(["convert", "megatron-to-hf", *refused, "bert"]) == 2


@pytest.mark.family("llava", "qwen3_moe", "mixtral")
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_a_language_model_with_experts_in_a_llava(name: str, tmp_path: Path) -> None:
    """As Transformers reads it; and as it is written there, where experts are counted under a newer name."""
    alone, clip = ROWS[name].make(), make("clip_vision", tmp_path / "clip")
    alone.save_pretrained(tmp_path / "llm")
    assert compose(tmp_path / "m", "--language", tmp_path / "llm", "--vision", clip) == 0
    out = export(tmp_path / "m", tmp_path / "out", "--family", "llava")
    whole, told = LlavaForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    there = whole.model.language_model.state_dict()
    assert all(torch.equal(value, there[key]) for key, value in alone.model.state_dict().items())
    again = tmp_path / "again"
    whole.save_pretrained(again)
    (again / "preprocessor_config.json").write_text('{"image_processor_type": "CLIPImageProcessor"}')
    assert compose(tmp_path / "n", "--hf", again) == 0
    home = load(export(tmp_path / "n", tmp_path / "home"))
    own = {key: value for key, value in load(out).items() if key.startswith("language_model.")}
    assert any("experts" in key for key in own) and all(torch.equal(home[key], value) for key, value in own.items())


@pytest.mark.parametrize("change", ["queries", "width of heads", "rows of the table", "grouped queries"])
def test_who_came_in_as_one_family_does_not_leave_as_another(
    change: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A resampler of 64 queries came in by CodeFuse-VLM's names; its code has 256."""
    if change == "queries":
        s = dataclasses.replace(CODEFUSE, queries=64)
        config = {**qwen_config(s), "model_type": "llava_qwen"}
        write(tmp_path / "hf", codefuse_state(s), config, **{"visual_config.json": json.dumps(visual_config(s))})
        family, reason, others = "codefuse_vlm", "the resampler has 64 queries", "--family qwen_vl"
    else:  # the recipe of a later training has another shape
        make("qwen_vl", tmp_path / "hf")
        family, others = "qwen_vl", "none"
        reason = {"width of heads": "heads are 64 wide", "rows of the table": "table has 64 rows",
                  "grouped queries": "grouped queries"}[change]  # fmt: skip
    assert main(["convert", "hf-to-megatron", "--hf", str(tmp_path / "hf"), "--out", str(tmp_path / "m")]) == 0
    recipe = tmp_path / "m" / "recipe.yaml"
    changed = {
        "width of heads": ("head_dim: 128", "head_dim: 64"),
        "rows of the table": ("positional_grid: 16", "positional_grid: 8"),
        "grouped queries": ("num_query_groups: 4", "num_query_groups: 2"),
    }
    if change in changed:
        old, new = changed[change]
        assert old in recipe.read_text()
        recipe.write_text(recipe.read_text().replace(old, new))
    out = ["--megatron", str(tmp_path / "m"), "--out", str(tmp_path / "back")]
    assert main(["convert", "megatron-to-hf", *out]) == 2
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1 and not (tmp_path / "back").exists()
    if others != "none":
        assert f"the weights came as {family}, which cannot hold the model as it is now" in error and others in error
        assert main(["convert", "megatron-to-hf", *out, "--family", "qwen_vl"]) == 0
    else:
        assert "no Hugging Face family holds this model whole" in error


def test_tokens_that_the_language_model_lacks_get_rows(tmp_path: Path) -> None:
    """Llama's tokenizer has nothing for images or turns; the embedding grows, the known rows stay."""
    vicuna, clip = make("vicuna", tmp_path / "vicuna"), make("clip", tmp_path / "clip")
    write_llama(vicuna)
    assert compose(tmp_path / "m", "--language", vicuna, "--vision", clip) == 0
    assert (tmp_path / "m" / "hf" / "tokenizer.model").read_bytes() == (vicuna / "tokenizer.model").read_bytes()
    grown = record(tmp_path / "m")["model"]["language"]["vocab_size"]
    assert grown > 120 and grown % 64 == 0 and "rows of the embedding" in record(tmp_path / "m")["initialised"][0]
    out = load(export(tmp_path / "m", tmp_path / "out", "--family", "llama"))
    before = load(vicuna)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert out[name].shape == (grown, 64) and torch.equal(out[name][:120], before[name])
        assert out[name][120:].std() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give either --hf DIR, or --language DIR and --vision DIR"),
        (["--hf", "{qwen}", "--language", "{qwen}"], "give either --hf DIR"),
        (["--connector", "{qwen_vl}"], "--connector alone makes no model"),
        (["--language", "{qwen}"], "--vision is missing; give it, or a --recipe"),
        (["--language", "{clip}", "--vision", "{clip}"], "it has no language, only vision"),
        (["--language", "{qwen}", "--vision", "{qwen}"], "it has no vision, only language"),
        (
            ["--language", "{vicuna}", "--vision", "{qwen_vl}", "--connector", "{qwen_vl}"],
            "model.connector.head_dim: 128",
        ),
        (["--language", "{qwen}", "--vision", "{clip}", "--connector", "{llava}"], "is made for another model"),
        (
            ["--language", "{qwen}", "--vision", "{clip}", "--connector-preset", "perceiver"],
            "no connector preset 'perceiver'",
        ),
        (
            ["--language", "{qwen}", "--vision", "{clip}", "--vision-feature-layer", "9"],
            "outside of the tower's 3 layers",
        ),
        (["--language", "{qwen}", "--vision", "{clip}", "--vision-feature-layer", "x"], "is neither a number"),
    ],
)
def test_refusals(words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {n: make(n, tmp_path / n) for n in ("qwen", "qwen_vl", "clip", "vicuna", "llava") if "{" + n + "}" in words}
    assert compose(tmp_path / "m", *(word.format(**names) for word in words)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "m").exists() and not (tmp_path / "m.partial").exists()
