"""A converted model computes what Transformers computes: logits, and the gradient of every parameter.

Each case is a LLaVA of another tower and another language model, so that the one test covers CLIP (OpenAI's and LAION's
activation), SigLIP, Llama (2, and 3's positions), Qwen2 (tied too) and Qwen3.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import _TEXT, _VISION, IMAGE, TRANSFORMERS, llama, llava, llava_qwen_siglip, sample
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3TextConfig,
    GemmaConfig,
    Glm4Config,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
    StableLmConfig,
)

from megavlm.checkpoint.distributed import load
from megavlm.checkpoint.hf.shapes import family_slots, make_rules
from megavlm.cli import main
from megavlm.config.load import load_recipe
from megavlm.data.media import arrange, plan_of
from megavlm.evaluation.parity import Sample, _batch
from megavlm.families.known import FAMILIES
from megavlm.families.presets import expand_presets
from megavlm.inference.generate import generate
from megavlm.inference.prompt import Prompt
from megavlm.models.build import build_model, unwrap
from megavlm.parallel.state import process_groups

pytestmark = pytest.mark.family("llava")
SHORT = ("clip-llama", "siglip-qwen3", "clip-gemma")
"""Cases of ``make test``: all parts in their extremes, and a multiplier that image features must not see; the others
are combinations of these parts, or kinds that ``test_text_kinds.py`` holds alone."""
TOLERANCE = 2e-5


def _qwen2_tied() -> PreTrainedModel:
    return llava(Qwen2Config(**_TEXT, tie_word_embeddings=True), CLIPVisionConfig(**_VISION, hidden_act="gelu"),
                 tie_word_embeddings=True)  # fmt: skip


def _qwen3() -> PreTrainedModel:
    keys = {"vision_feature_select_strategy": "full", "vision_feature_layer": 2}
    return llava(Qwen3Config(**_TEXT, head_dim=32), SiglipVisionConfig(**_VISION, vision_use_head=False), **keys)


CASES: dict[str, Callable[[], PreTrainedModel]] = {
    "clip-llama": llava,
    "clip-llama3": lambda: llava(llama().config),
    "laion-qwen2-tied": _qwen2_tied,
    "siglip-qwen2": llava_qwen_siglip,
    "siglip-qwen3": _qwen3,
    "clip-gemma": lambda: llava(
        GemmaConfig(**{**_TEXT, "num_key_value_heads": 1}, head_dim=32), tie_word_embeddings=True
    ),
    "clip-gemma-untied": lambda: llava(GemmaConfig(**_TEXT, head_dim=32), tie_word_embeddings=False),
    "clip-gemma3": lambda: llava(
        Gemma3TextConfig(**_TEXT, head_dim=32, sliding_window=20, sliding_window_pattern=2), tie_word_embeddings=True
    ),
    "clip-glm4": lambda: llava(Glm4Config(**_TEXT, head_dim=16, pad_token_id=0)),
    "clip-phi": lambda: llava(PhiConfig(**_TEXT)),
    "clip-phi3": lambda: llava(Phi3Config(**_TEXT, sliding_window=20, pad_token_id=0)),
    "clip-stablelm": lambda: llava(StableLmConfig(**_TEXT, use_qkv_bias=True)),
    "clip-mistral": lambda: llava(MistralConfig(**_TEXT, sliding_window=20, head_dim=16)),
    "clip-two-layers": lambda: llava(vision_feature_layer=[-2, -4]),
    "clip-three-layers": lambda: llava(vision_feature_layer=[1, 3, 1]),
    "clip-last-layer": lambda: llava(vision_feature_layer=-1),
    "siglip-last-layer": lambda: llava(
        vision=SiglipVisionConfig(**_VISION, vision_use_head=False),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    ),
}


def cases(names: Iterable[str], short: Collection[str] = SHORT) -> list[Any]:
    """Return parameters; those that are not short are ``long``."""
    return [pytest.param(name, marks=() if name in short else pytest.mark.long) for name in names]


def theirs(model: PreTrainedModel, one: Sample, weights: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return logits, and gradients by the names that the model's own checkpoint has."""
    out = model(input_ids=one.ids[None], pixel_values=one.pixels, attention_mask=torch.ones(1, len(one.ids)))
    (out.logits[0] * weights).sum().backward()
    return out.logits[0].detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _file_name(name: str) -> str:
    """From a module's name in Transformers 5 to that in its files."""
    for module, file in (
        ("model.vision_tower.", "vision_tower."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
    ):
        if name.startswith(module):
            return file + name.removeprefix(module)
    return name


@pytest.mark.parametrize("name", cases(CASES))
def test_logits_and_gradients(name: str, tmp_path: Path) -> None:
    model = CASES[name]()
    model.save_pretrained(tmp_path / "hf")
    assert main(["convert", "hf-to-megatron", "--hf", str(tmp_path / "hf"), "--out", str(tmp_path / "m")]) == 0
    one = sample()
    weights = torch.randn(len(one.ids), 120, generator=torch.Generator().manual_seed(9))
    expected, gradients = theirs(model, one, weights)
    gradients = {_file_name(key): value for key, value in gradients.items()}
    recipe = load_recipe(tmp_path / "m" / "recipe.yaml", [], expand_presets)
    with process_groups(recipe.parallel, 1):
        ours = unwrap(build_model(recipe, IMAGE)[0])
        load(tmp_path / "m", modules=[ours])
        batch = _batch(one, arrange(plan_of(recipe.model), one.layouts), recipe, ours)
        logits = ours(batch.tokens, batch.position_ids, batch.packed_seq_params, images=batch.images)[0, :, :120]
        close(logits, expected)
        (logits * weights).sum().backward()
        family = FAMILIES["llava"]
        rules = make_rules(family, recipe.model, "transformers5", family_slots(family, recipe.model))
    parameters = dict(ours.named_parameters())
    compared = 0
    for rule in rules:
        for key, mine in zip(rule.row.ours, rule.to_ours([gradients[n] for n in rule.row.theirs]), strict=True):
            grad = parameters[key].grad
            assert grad is not None, key
            close(grad[:120] if rule.slots[0].vocabulary else grad, mine, scale=_scale(gradients, rule.part))
            compared += 1
    assert compared == len(parameters)


TEXTS = ["clip-gemma", "clip-gemma3", "clip-glm4", "clip-phi", "clip-phi3", "clip-stablelm", "clip-mistral"]


@pytest.mark.parametrize("name", cases(["clip-llama", "siglip-qwen3", *TEXTS], SHORT[1:2]))
def test_greedy_answers_are_theirs(name: str, tmp_path: Path) -> None:
    """A cache here, a cache there: prompts of unequal lengths, with none, one and two images."""
    model = CASES[name]()
    model.save_pretrained(tmp_path / "hf")
    assert main(["convert", "hf-to-megatron", "--hf", str(tmp_path / "hf"), "--out", str(tmp_path / "m")]) == 0
    one = sample()
    shown = [(one.ids, one.pixels), (one.ids[:21], one.pixels[:1]), (one.ids[38:], one.pixels[:0])]
    expected = []
    for ids, pixels in shown:
        images = {"pixel_values": pixels} if len(pixels) else {}
        whole = model.generate(input_ids=ids[None], **images, attention_mask=torch.ones(1, len(ids)),
                               do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0)  # fmt: skip
        expected.append(whole[0, len(ids) :].tolist())
    recipe = load_recipe(tmp_path / "m" / "recipe.yaml", [], expand_presets)
    with process_groups(recipe.parallel, 1):
        chunks = build_model(recipe, IMAGE)
        load(tmp_path / "m", modules=[unwrap(chunk) for chunk in chunks])
        prompts = [Prompt(ids.numpy(), pixels) for ids, pixels in shown]
        answers = generate(chunks, prompts, max_new_tokens=12, stop_ids=[], vocab_size=120, pack_length=128)
    assert answers == expected
    assert len({tuple(answer) for answer in answers}) >= (2 if name in TEXTS else 3)


def _scale(gradients: dict[str, torch.Tensor], part: str) -> float:
    """Return the largest gradient of a part: what is zero but for rounding has no scale of its own (a key's bias)."""
    prefix = {"vision": "vision_tower.", "connector": "multi_modal", "language": "language_model."}[part]
    return max(float(value.abs().max()) for name, value in gradients.items() if name.startswith(prefix))


def close(got: torch.Tensor, expected: torch.Tensor, scale: float | None = None) -> None:
    scale = float(expected.abs().max()) if scale is None else scale
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE * scale)


@pytest.mark.parametrize("name", cases(["clip-llama", "siglip-qwen3", *TEXTS, "clip-gemma-untied"], SHORT[:1]))
def test_the_export_loads_in_transformers_with_equal_logits(name: str, tmp_path: Path) -> None:
    """Both where it goes back to where it came from, and where it is written anew, its tower cut off."""
    model = CASES[name]()
    one = sample()
    weights = torch.zeros(len(one.ids), 120)
    expected, _ = theirs(model, one, weights)
    model.save_pretrained(tmp_path / "hf")
    hf, whole, parts = tmp_path / "hf", tmp_path / "m", tmp_path / "composed"
    assert main(["convert", "hf-to-megatron", "--hf", str(hf), "--out", str(whole)]) == 0
    compose = ["--language", str(hf), "--vision", str(hf), "--connector", str(hf)]
    assert main(["convert", "hf-to-megatron", *compose, "--out", str(parts)]) == 0
    for checkpoint in (whole, parts):
        out = tmp_path / f"{checkpoint.name}-hf"
        assert main(["convert", "megatron-to-hf", "--megatron", str(checkpoint), "--out", str(out)]) == 0
        back, info = AutoModelForImageTextToText.from_pretrained(
            out, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
        )
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
        torch.testing.assert_close(theirs(back.eval(), one, weights)[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        pytest.param("clip", "-2", marks=pytest.mark.family("clip")),
        pytest.param("clip_vision", "-1", marks=[pytest.mark.family("clip"), pytest.mark.long]),
        pytest.param("siglip", "last_hidden_state", marks=pytest.mark.family("siglip")),
        pytest.param("siglip_vision", "1", marks=[pytest.mark.family("siglip"), pytest.mark.long]),
    ],
)
def test_a_tower_alone_gives_the_features_that_are_asked_for(name: str, layer: str, tmp_path: Path) -> None:
    model = TRANSFORMERS[name]()
    model.save_pretrained(tmp_path / "hf")
    llama().save_pretrained(tmp_path / "llm")
    words = ["--language", str(tmp_path / "llm"), "--vision", str(tmp_path / "hf"), "--vision-feature-layer", layer]
    assert main(["convert", "hf-to-megatron", *words, "--out", str(tmp_path / "m")]) == 0
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(3))
    tower = model.vision_model if hasattr(model, "vision_model") else model
    with torch.no_grad():
        out = tower(pixels, output_hidden_states=True)
        expected = out.last_hidden_state if layer == "last_hidden_state" else out.hidden_states[int(layer)]
        expected = expected[:, 1:] if name.startswith("clip") else expected
        recipe = load_recipe(tmp_path / "m" / "recipe.yaml", [], expand_presets)
        with process_groups(recipe.parallel, 1):
            ours = unwrap(build_model(recipe, IMAGE)[0])
            load(tmp_path / "m", modules=[ours])
            close(ours.vision(pixels).transpose(0, 1), expected)
    # And the tower goes home by itself, cut off where its features are taken.
    out_words = ["--megatron", str(tmp_path / "m"), "--family", name.split("_")[0], "--out", str(tmp_path / "back")]
    assert main(["convert", "megatron-to-hf", *out_words]) == 0
    back = (
        type(tower).from_pretrained(tmp_path / "back")
        if tower is model
        else AutoModel.from_pretrained(tmp_path / "back")
    )
    with torch.no_grad():
        out = back(pixels, output_hidden_states=True)
        again = out.last_hidden_state if layer == "last_hidden_state" else out.hidden_states[-1]
    close(again[:, 1:] if name.startswith("clip") else again, expected)
