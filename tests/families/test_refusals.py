"""No family writes a model that it is not: each key by which language models differ is written, or it is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from pydantic import TypeAdapter

from megavlm.config.architecture import LANGUAGE, MODELS
from megavlm.config.fields import meaning_of
from megavlm.config.schema import ModelConfig
from megavlm.families.known import FAMILIES
from megavlm.families.presets import expand_presets, load_presets
from megavlm.families.text_kinds import PLAIN

OTHER: dict[str, tuple[Any, Any]] = {
    "normalization": ("LayerNorm", "RMSNorm"), "activation": ("gelu", "silu"), "rotary_percent": (0.75, 0.25),
    "embedding_multiplier": (3.0, 5.0), "residual_multiplier": (0.5, 0.25), "logits_scaling": (2.0, 4.0),
    "sliding_window": (64, 32), "sliding_window_pattern": (3, 2), "rope_local_base_freq": (777, 778),
    "query_pre_attn_scalar": (99.0, 98.0), "rotary_sections": ((2, 3, 3), (4, 2, 2)), "rope_scaling": ("linear", None),
    "image_positions": ("shared", "counted"), "num_moe_experts": (8, None),
    "kv_lora_rank": (1, None),
    "image_tokens": ((4, 8196), (0, 8)),
}  # fmt: skip
"""Two values, of which one is not the model's; any other key is a switch, and is turned."""


WITHOUT_PRESET: list[dict[str, Any]] = [
    {
        "preset": None, "connector": {"preset": "q_former"}, "language": {"preset": "llama2_7b"},
        "vision": {"preset": "eva01_clip_g_14_224", "class_feature": True, "key_bias": True},
    },
    {
        "preset": "tiny",
        "language": {
            "preset": "deepseek_v2", "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96,
            "num_attention_heads": 4, "moe_shared_expert_intermediate_size": 32,
            "num_query_groups": 4, "kv_channels": 24, "rotary_percent": 1 / 3, "kv_lora_rank": 16, "v_head_dim": 16,
            "vocab_size": 512, "max_position_embeddings": 128, "num_moe_experts": 4, "moe_ffn_hidden_size": 32,
        },
    },
]  # fmt: skip
"""Models of families that are published in no preset: BLIP-2 on a Llama, DeepSeek-V2 without YaRN."""


def models(name: str) -> list[ModelConfig]:
    """Return a model of a family, of the first preset that it does not refuse; none where it has no language model."""
    family = FAMILIES[name]
    if "language" not in family.parts:
        return []
    load_presets()
    trees = [{"preset": one} for one in MODELS.names()]
    trees += [{"preset": "tiny", "language": {"preset": one}} for one in LANGUAGE.names() if not one.startswith("tiny")]
    trees += WITHOUT_PRESET
    for tree in trees:
        try:
            model = TypeAdapter(ModelConfig).validate_python(expand_presets({"model": tree})["model"])
        except ValueError:  # a kind without sizes
            continue
        if family.refusal(model) is None:
            return [model]
    return []


def test_every_family_with_a_language_model_is_tried() -> None:
    assert {name for name in FAMILIES if models(name)} == {n for n, one in FAMILIES.items() if "language" in one.parts}


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_key_is_written_or_refused(name: str) -> None:
    family = FAMILIES[name]
    for model in models(name):
        before = family.config(model, {})
        for key in (*PLAIN, "rope_scaling"):
            if not hasattr(model.language, key):  # a Mamba has no attention
                continue
            there = getattr(model.language, key)
            other = next(one for one in OTHER.get(key, (not there,)) if one != there)
            more = {"rope_scaling_factor": 4.0} if key == "rope_scaling" else {}
            try:
                language = dataclasses.replace(model.language, **{key: other}, **more)
            except ValueError:  # a T5 has two activations, and none of these
                assert key == "activation"
                continue
            changed = dataclasses.replace(model, language=language)
            if family.refusal(changed) is None and key != "lm_head_bias":  # which is there, or not, among the tensors
                assert family.config(changed, {}) != before, (key, other)


@pytest.mark.parametrize(
    ("language", "kind"),
    [
        ("phi_2", "phi"), ("phi_3_mini_4k", "phi3"), ("stablelm_2_1_6b", "stablelm"), ("glm_4_9b", "glm4"),
        ("gemma_2b", "gemma"), ("gemma_3_1b", "gemma3_text"), ("mistral_7b_v0_1", "mistral"), ("qwen3_8b", "qwen3"),
        ("qwen3_30b_a3b", "qwen3_moe"), ("mixtral_8x7b", "mixtral"),
    ],
)  # fmt: skip
def test_blip2_is_written_on_what_it_is_read_on(language: str, kind: str) -> None:
    """TinyGPT-V is one on Phi-2."""
    load_presets()
    tree = expand_presets({"model": {**WITHOUT_PRESET[0], "language": {"preset": language}}})["model"]
    model = TypeAdapter(ModelConfig).validate_python(tree)
    assert FAMILIES["blip2"].refusal(model) is None
    assert FAMILIES["blip2"].config(model, {})["text_config"]["model_type"] == kind


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_connectors_first_layer_is_written_or_refused(name: str) -> None:
    family = FAMILIES[name]
    for model in models(name) if "connector" in family.parts else []:
        if hasattr(model.connector, "input_expansion"):
            other = dataclasses.replace(model.connector, input_expansion=2)
            why = family.refusal(dataclasses.replace(model, connector=other))
            assert why is None if name == "cobra" else "model.connector.input_expansion" in str(why)


def test_a_tower_alone_has_a_row_for_its_class_token_and_no_table_behind() -> None:
    load_presets()
    for name, preset, change in (
        ("clip", "clip_vit_l_14_336", {"class_position": False}),
        ("clip", "clip_vit_l_14_336", {"feature_table": True}),
        ("eva02", "eva02_clip_l_14_336", {"class_position": False}),
    ):
        tree = {"preset": "tiny", "vision": {"preset": preset}}
        model = TypeAdapter(ModelConfig).validate_python(expand_presets({"model": tree})["model"])
        assert FAMILIES[name].refusal(model) is None
        changed = dataclasses.replace(model, vision=dataclasses.replace(model.vision, **change))
        assert f"model.vision.{next(iter(change))}" in str(FAMILIES[name].refusal(changed))


TOWERS: dict[str, tuple[Any, ...]] = {
    "activation": ("gelu", "gelu_tanh", "quick_gelu"), "normalization": ("LayerNorm", "RMSNorm"),
    "qk_norm": ("width", None), "rotary_base": (10000.0, None),
}  # fmt: skip
"""Values that keys of a tower may have; of numbers there are always others, and a switch is turned."""
SHAPES = ("hidden_size", "ffn_hidden_size", "positional_grid")
"""Keys that shapes of tensors say, where config.json does not."""
SAID = {
    "cobra": (
        "num_layers",
        "patch_size",
        "high_num_layers",
        "high_patch_size",
        "high_ffn_hidden_size",
        "high_positional_grid",
    ),
    "cogagent": ("high_num_layers", "high_ffn_hidden_size"),
    "minigpt4": ("patch_size",),
    "minigpt_v2": ("patch_size",),
    "tinygpt_v": ("patch_size",),
    "vary": ("num_layers", "high_num_layers", "high_ffn_hidden_size", "high_window_size", "high_neck_size"),
}
"""Of families whose towers have no configuration: what tensors say beside these."""


def others(vision: Any, key: str) -> list[Any]:
    """Return other values of a key of a tower; those of which a tower is of no size at all are not among them."""
    there = getattr(vision, key)
    if key == "feature_layers":
        return [(vision.num_layers, 0)]
    if key == "deepstack_layers":
        return [(0,)] if not there else [()]
    if key == "s2_scales":
        return [(vision.image_size, 2 * vision.image_size)]
    if key in TOWERS:
        return [one for one in TOWERS[key] if one != there]
    if isinstance(there, bool):
        return [not there]
    return [there * 2 or 4] if isinstance(there, int | float) else []


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_towers_key_is_written_or_refused(name: str) -> None:
    """Whatever a tower computes otherwise, or has other weights for, config.json says; or there is no export."""
    family = FAMILIES[name]
    if not {"vision", "language"} <= {*family.parts}:
        return
    for model in models(name):
        vision = model.vision
        for one in dataclasses.fields(vision):
            if one.name == "preset" or not meaning_of(vision, one.name).published:
                continue
            if one.name in SHAPES or (vision.packed and one.name == "image_size"):  # pictures have their own
                continue
            if one.name in SAID.get(name, ()):
                continue
            for value in others(vision, one.name):
                size = {"image_size": value[-1]} if one.name == "s2_scales" else {}
                other, alike = (dataclasses.replace(vision, **size, **own) for own in ({one.name: value}, {}))
                changed = dataclasses.replace(model, vision=other)
                if family.refusal(changed) is None:
                    before, after = (
                        (family.config(own_model, {}), family.settings(own_model))
                        for own_model in (dataclasses.replace(model, vision=alike), changed)
                    )
                    assert after != before, (one.name, value)
