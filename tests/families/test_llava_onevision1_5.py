"""LLaVA-OneVision-1.5 computes what the written-out model computes; sizes, configurations, and what is refused.

The same cut over four, and packs, is the row of test_whole.py; weights there and back are in test_round_trips.py.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from native_cases import convert, merged
from rice_models import FILES, LlavaOnevision15, saved
from test_qwen2_vl_sizes import model_of
from transformers import Qwen3Config, Qwen3ForCausalLM
from whole_source import NativeSource, asked, write_reference

from megavlm.architectures.context import BuildContext
from megavlm.checkpoint.hf.shapes import alone
from megavlm.cli import main
from megavlm.config.schema import ModelConfig, ParallelConfig
from megavlm.data.media import plan_of
from megavlm.families.known import FAMILIES
from megavlm.models.vlm import VisionLanguageModel
from megavlm.weights.source import Source

pytestmark = pytest.mark.family("llava_onevision1_5")
FAMILY = "llava_onevision1_5"


def test_features_logits_gradients_and_answers(tmp_path: Path) -> None:
    """At one process, of a wide picture, of none and of two; the answers come without a cache there, with one here."""
    source = NativeSource(FAMILY, lambda: LlavaOnevision15(tied=True), files=FILES, vocab=128)
    source.save(tmp_path / "hf")
    recipe = convert(tmp_path / "hf", tmp_path / "m")
    assert recipe.model.template == "qwen2_vl" and recipe.model.language.tie_word_embeddings
    assert (recipe.model.language.rotary_base, recipe.model.vision.temporal_patch_size) == (5000000, 1)
    path = tmp_path / "reference.safetensors"
    write_reference(source, FAMILY, recipe, path)
    (found,) = ranks.run("whole_cases:prove", str(tmp_path / "m"), str(path), [], world=1, planned=False)
    assert max(found.largest.values()) <= 2e-4, found.largest
    assert {"vision.class_embedding", "vision.class_rotary", "vision.ln_pre.weight"} <= found.packed.keys()
    for gradients in (found.packed, found.alone):
        assert max(gradients.values()) <= 5e-5, gradients
    answers = [Source(path).get(f"s{number}.answer").tolist() for number in range(len(asked(28)))]
    assert found.answers == answers and len({tuple(one) for one in answers}) > 1
    assert found.steps[0] > found.steps[1] > found.steps[2]


def _rice(hidden: int, layers: int, ffn: int, embed: int) -> int:
    """Count RICE (heads of 64) and its merger by the published definition."""
    layer = 4 * (hidden**2 + hidden) + 2 * hidden * ffn + ffn + hidden + 2 * 2 * hidden
    around = 3 * 14 * 14 * hidden + hidden + 64 // 2 + 2 * hidden
    wide = 4 * hidden
    return layers * layer + around + 2 * hidden + wide * wide + wide + wide * embed + embed


# Of lmms-lab/LLaVA-OneVision-1.5-{4B,8B}-Instruct, as the published definition counts: RICE, the merger, Qwen3, a head.
@pytest.mark.parametrize(("size", "expected"), [("4b", 4_741_610_528), ("8b", 8_527_214_624)])
def test_a_preset_has_the_size_of_the_published_definition(size: str, expected: int) -> None:
    model = model_of(f"{FAMILY}_{size}")
    family = FAMILIES[FAMILY]
    assert family.refusal(model) is None
    text = {key: value for key, value in family.config(model, {})["text_config"].items() if key != "model_type"}
    with alone(), torch.device("meta"):
        ours = VisionLanguageModel(model, BuildContext(ParallelConfig(), initialize=False), 0)
        language = Qwen3ForCausalLM(Qwen3Config(**text))
    assert not language.config.tie_word_embeddings
    there = sum(p.numel() for p in language.parameters()) + _rice(1024, 24, 4096, model.language.hidden_size)
    assert sum(p.numel() for p in ours.parameters()) == there == expected
    plan = plan_of(model)
    # As Qwen2-VL's processor does it, with at most 1600 x 1600 pixels: 28 x 28 of them are a token.
    assert (plan.plan(640, 480).tokens, plan.plan(4000, 4000).tokens) == (23 * 17, 57 * 57)


@pytest.mark.parametrize("rope", [None, {"rope_type": "linear", "factor": 2.0}])
def test_a_configuration_that_is_written_is_read_alike(rope: dict[str, Any] | None, tmp_path: Path) -> None:
    """Also one with stretched positions, which its code has."""
    saved(tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    tree = json.loads(path.read_text())
    tree["text_config"]["rope_scaling"] = rope
    path.write_text(json.dumps(tree))
    model, family = convert(tmp_path / "hf", tmp_path / "m").model, FAMILIES[FAMILY]
    assert model.language.rope_scaling == (rope["rope_type"] if rope else None)
    assert family.refusal(model) is None
    before = family.branches(Source(tmp_path / "hf"))
    own = json.loads(path.read_text())
    written = family.config(model, {"image": 119})
    same = ("architectures", "auto_map", "model_type", "vocab_size")
    assert written.items() >= {key: own[key] for key in same}.items()
    unset = {"rope_scaling", "use_cache", "image_token_id", "video_token_id"}
    assert written["text_config"].items() >= {k: v for k, v in own["text_config"].items() if k not in unset}.items()
    path.write_text(json.dumps(written))
    assert family.branches(Source(tmp_path / "hf")) == before


@pytest.mark.parametrize(
    ("file", "values", "said"),
    [
        ("config.json", {"vision_config": {"text_hidden_size": 32}}, "vectors of 32, but the language model takes 64"),
        ("config.json", {"vision_config": {"hidden_act": "quick_gelu"}}, "hidden_act is 'quick_gelu'"),
        ("config.json", {"vision_config": {"layer_norm_eps": 1e-6}}, "layer_norm_eps is 1e-06"),
        ("config.json", {"vision_config": {"temporal_patch_size": 2}}, "temporal_patch_size is 2"),
        ("config.json", {"text_config": {"attention_bias": True}}, "attention_bias is True"),
        ("config.json", {"text_config": {"layer_types": ["sliding_attention"] * 4}}, "a sliding window"),
        (
            "config.json",
            {"text_config": {"layer_types": None, "sliding_window": 64, "max_window_layers": 2}},
            "a sliding window",
        ),
        ("config.json", {"text_config": {"num_hidden_layers": None}}, "num_hidden_layers"),
        ("config.json", {"text_config": {"rope_theta": None}}, "rope_theta"),
        ("config.json", {"text_config": {"tie_word_embeddings": True}}, "lm_head.weight"),
        ("preprocessor_config.json", {"temporal_patch_size": 2}, "temporal_patch_size is 2, but config.json's tower"),
        ("preprocessor_config.json", {"image_processor_type": "CLIPImageProcessor"}, "image_processor_type"),
    ],
)
def test_what_is_not_supported_is_said(
    file: str, values: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(tmp_path / "hf") / file
    path.write_text(json.dumps(merged(json.loads(path.read_text()), values)))
    assert main(["convert", "hf-to-megatron", "--hf", str(tmp_path / "hf"), "--out", str(tmp_path / "m")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def test_other_models_are_refused() -> None:
    model = model_of(f"{FAMILY}_4b")
    for part, keys, said in (
        ("vision", {"class_token": False}, "class_token False"),
        ("vision", {"layernorm_epsilon": 1e-6}, "layernorm_epsilon 1e-06"),
        ("connector", {"layernorm_epsilon": 1e-6}, "another norm"),
        ("language", {"qk_layernorm": False}, "no Qwen3"),
        ("language", {"rotary_sections": (24, 20, 20)}, "rotary positions"),
        ("image", {"min_pixels": 10**9}, "less than model.image.min_pixels"),
    ):
        other: ModelConfig = dataclasses.replace(
            model,
            **{part: dataclasses.replace(getattr(model, part), **keys)},  # type: ignore[arg-type]
        )
        assert said in str(FAMILIES[FAMILY].refusal(other)), part
    for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        assert FAMILIES[name].refusal(model) is not None
