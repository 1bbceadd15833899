"""An export has the keys of ``config.json`` and the names of tensors that vLLM and SGLang read.

What they read is written down here from their published loaders, as of vllm-project/vllm ``01dc2879`` and ``0004c540``
(``vllm/model_executor/models/{llava,llava_next,llava_onevision,interns1,internvl}.py``, ``registry.py``), ``002d7b93``
(``qwen3_vl.py``), ``00fb5b43`` (``idefics3.py``), ``52e9d6f2`` (``smolvlm.py``), ``002d181a`` (``glm4_1v.py``),
``fd472a64`` (``paligemma.py``), ``e5fa9450`` (``gemma3_mm.py``), ``73fb7a47`` (``minicpmv.py``, ``resampler.py``) and
``0c028ba4`` (``siglip.py``), and sgl-project/sglang ``00262495`` and ``00adcbe5``
(``python/sglang/srt/models/{llava,internvl}.py``), ``013902a8`` (``qwen2_5_vl.py``), ``005fa833`` (``qwen3_vl.py``),
``02ada0bb`` (``glm4v.py``) and ``017f5d47`` (``gemma3_mm.py``). None is imported: they do not install without a GPU.
docs/conversion.md has the list for people.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import glm4v_models
import pytest
import torch
from family_cases import load
from gemma_models import GEMMA3, PALIGEMMA
from idefics3_models import IDEFICS3
from minicpm_v_models import MINICPM_V
from test_home_in_transformers import convert, exported
from test_home_in_transformers import made as made_talking
from transformers import AutoModelForImageTextToText

from megavlm.cli import main

_TEXT = r"(embed_tokens\.weight|norm\.weight|layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj" \
        r"|input_layernorm|post_attention_layernorm)\.(weight|bias))"  # fmt: skip
_CLIP = r"vision_tower\.vision_model\.(embeddings|pre_layrnorm|post_layernorm|encoder\.layers\.\d+\.(self_attn\." \
        r"(q|k|v|out)_proj|mlp\.fc[12]|layer_norm[12]))[.\w]*"  # fmt: skip


@dataclass(frozen=True)
class Expected:
    """What a loader reads."""

    architecture: str
    """As their registries call the class."""
    keys: tuple[str, ...]
    """Of config.json, dotted."""
    tensors: tuple[str, ...]
    """Patterns; every tensor must be one of them, and each must have some."""


_LLAVA = (
    r"language_model\.model\." + _TEXT, r"language_model\.lm_head\.weight", r"multi_modal_projector\.linear_[12]\.\w+",
)  # fmt: skip
_LLAVA_KEYS = (
    "image_token_index", "projector_hidden_act", "vision_feature_layer", "vision_feature_select_strategy",
    "text_config.architectures", "text_config.model_type", "vision_config.model_type", "vision_config.image_size",
    "vision_config.patch_size", "vision_config.hidden_size",
)  # fmt: skip
_QWEN_KEYS = (
    "image_token_id", "vision_start_token_id", "video_token_id", "vision_config.patch_size",
    "vision_config.spatial_merge_size", "vision_config.temporal_patch_size",
)  # fmt: skip
# By both: model.language_model and model.visual since Transformers 4.52, model and visual before.
_QWEN = (
    r"(model\.)?visual\.[.\w]+",
    r"model\.(language_model\.)?(embed_tokens|norm|layers)\.[.\w]+",
    r"lm_head\.weight",
)
EXPECTED = {
    "qwen2_vl": Expected("Qwen2VLForConditionalGeneration", _QWEN_KEYS, _QWEN),
    "qwen2_5_vl": Expected("Qwen2_5_VLForConditionalGeneration", _QWEN_KEYS, _QWEN),
    "qwen3_vl": Expected(
        "Qwen3VLForConditionalGeneration",
        (
            *_QWEN_KEYS, "vision_config.depth", "vision_config.num_heads", "vision_config.out_hidden_size",
            "vision_config.deepstack_visual_indexes", "text_config.hidden_size", "text_config.vocab_size",
        ),
        _QWEN,
    ),
    "idefics3": Expected(
        "Idefics3ForConditionalGeneration",
        (
            "image_token_id", "scale_factor", "text_config.architectures", "text_config.model_type",
            "vision_config.image_size", "vision_config.patch_size", "vision_config.hidden_size",
        ),
        (
            r"model\.text_model\." + _TEXT, r"lm_head\.weight", r"model\.connector\.modality_projection\.proj\.weight",
            r"model\.vision_model\.(embeddings|encoder\.layers|post_layernorm)[.\w]*",
        ),
    ),
    "llava": Expected("LlavaForConditionalGeneration", _LLAVA_KEYS, (*_LLAVA, _CLIP)),
    "llava_next": Expected(
        "LlavaNextForConditionalGeneration", (*_LLAVA_KEYS, "image_grid_pinpoints"), (*_LLAVA, _CLIP, "image_newline")
    ),
    "llava_onevision": Expected(
        "LlavaOnevisionForConditionalGeneration",
        (*_LLAVA_KEYS, "image_grid_pinpoints", "vision_aspect_ratio"),
        (*_LLAVA, _CLIP, "image_newline"),
    ),
    "internvl_chat": Expected(
        "InternVLChatModel",
        (
            "downsample_ratio", "force_image_size", "llm_config.architectures", "ps_version", "select_layer",
            "template", "vision_config.image_size", "vision_config.patch_size", "dynamic_image_size",
            "max_dynamic_patch", "min_dynamic_patch", "use_thumbnail",
        ),
        (
            r"language_model\.model\." + _TEXT, r"language_model\.lm_head\.weight", r"mlp1\.[013]\.\w+",
            r"vision_model\.(embeddings|encoder\.layers)\.[.\w]+",
        ),
    ),
}  # fmt: skip


_SIGLIP = r"vision_tower\.vision_model\.(embeddings|encoder\.layers|post_layernorm)[.\w]*"
_GEMMA_TEXT = (
    r"language_model\.model\.(embed_tokens\.weight|norm\.weight|layers\.\d+\.(self_attn|mlp|\w+_layernorm)[.\w]*)"
)
_SIGLIP_KEYS = tuple(
    f"vision_config.{key}" for key in ("hidden_size", "image_size", "patch_size", "layer_norm_eps", "vision_use_head")
)
_MINICPM_V = (
    r"llm\.model\." + _TEXT, r"llm\.lm_head\.weight",
    r"resampler\.(query|proj|kv_proj\.weight|attn\.(in_proj_weight|in_proj_bias|out_proj\.\w+)|ln_(q|kv|post)\.\w+)",
)  # fmt: skip
PARTS: dict[str, tuple[Callable[[Path], object], Expected]] = {
    "paligemma": (
        PALIGEMMA["paligemma"][1],
        Expected(
            "PaliGemmaForConditionalGeneration",
            (
                "bos_token_id", "hidden_size", "image_token_index", "vocab_size", "text_config.model_type",
                "text_config.num_image_tokens", "vision_config.projection_dim", *_SIGLIP_KEYS,
            ),
            (_GEMMA_TEXT, r"multi_modal_projector\.linear\.(weight|bias)", _SIGLIP),
        ),
    ),
    "gemma3": (
        GEMMA3["gemma3"][1],
        Expected(
            "Gemma3ForConditionalGeneration",
            (
                "image_token_index", "mm_tokens_per_image", "text_config.hidden_size", "text_config.sliding_window",
                "text_config.architectures", *_SIGLIP_KEYS,
            ),
            (
                _GEMMA_TEXT, r"multi_modal_projector\.(mm_input_projection_weight|mm_soft_emb_norm\.weight)", _SIGLIP,
            ),
        ),
    ),
    "minicpm_v_2": (
        MINICPM_V["minicpm_v_2"][1],
        Expected(
            "MiniCPMV",
            ("query_num", "hidden_size", "drop_vision_last_layer", "scale_emb", "scale_depth", "dim_model_base",
             "auto_map.AutoConfig"),
            # A parameter there, which must come; of 2.5 it is a buffer that is made, and must not.
            (*_MINICPM_V, r"resampler\.pos_embed", r"vpm\.(pos_embed|(patch_embed\.proj|norm|blocks\.\d+)[.\w]+)"),
        ),
    ),
    "minicpm_llama3_v_2_5": (
        MINICPM_V["minicpm_llama3_v_2_5"][1],
        Expected(
            "MiniCPMV",
            ("query_num", "hidden_size", "drop_vision_last_layer", "version", "auto_map.AutoConfig",
             *(f"vision_config.{key}" for key in ("hidden_size", "image_size", "patch_size", "num_hidden_layers",
                                                  "num_attention_heads", "intermediate_size"))),
            (*_MINICPM_V, r"vpm\.(embeddings|encoder\.layers|post_layernorm)[.\w]*"),
        ),
    ),
}  # fmt: skip
"""Without a tokenizer; each is put together of itself, so that its directory is written anew."""


@pytest.mark.long
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.family(name)) for name in PARTS])
def test_config_and_names_of_those_without_a_tokenizer(name: str, tmp_path: Path) -> None:
    make, expected = PARTS[name]
    make(tmp_path / "one")
    words = [word for part in ("language", "vision", "connector") for word in (f"--{part}", tmp_path / "one")]
    convert("hf-to-megatron", *words, "--out", tmp_path / "m")
    home = exported(tmp_path / "m", tmp_path / "home", trained=True)
    config = json.loads((home / "config.json").read_text())
    _check(config, sorted(load(home)), expected)
    if name == "minicpm_v_2":  # by this a server tells it from 2.5
        assert "version" not in config
    if name == "minicpm_llama3_v_2_5":
        assert config["version"] == "2.5" and config["drop_vision_last_layer"] is False


@pytest.mark.family("llava")
def test_names_that_servers_read_are_written_for_a_model_that_came_by_others(tmp_path: Path) -> None:
    """Transformers 5 calls a tower ``vision_tower.encoder``, which neither server reads: siglip.py, clip.py."""
    one = made_talking("llava", tmp_path / "one")
    convert("hf-to-megatron", "--hf", one, "--out", tmp_path / "m")
    convert("megatron-to-hf", "--megatron", tmp_path / "m", "--out", tmp_path / "as-it-came")
    (tmp_path / "m" / "run.json").write_text(json.dumps({"step": 5}))  # as after a training
    convert("megatron-to-hf", "--megatron", tmp_path / "m", "--out", tmp_path / "home", "--names", "hub")
    came, hub = load(one), load(tmp_path / "home")
    assert load(tmp_path / "as-it-came").keys() == came.keys()
    _check(json.loads((tmp_path / "home" / "config.json").read_text()), sorted(hub), EXPECTED["llava"])
    renamed = {re.sub(r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model.", name): name for name in came}
    assert renamed.keys() == hub.keys() and any(new != old for new, old in renamed.items())
    assert all(torch.equal(hub[new], came[old]) for new, old in renamed.items())
    model, told = AutoModelForImageTextToText.from_pretrained(tmp_path / "home", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and model is not None
    wrong = ["convert", "megatron-to-hf", "--megatron", str(tmp_path / "m"), "--out", str(tmp_path / "no")]
    assert main([*wrong, "--names", "mine"]) == 2 and not (tmp_path / "no").exists()


@pytest.mark.long
@pytest.mark.family("smolvlm")
def test_smolvlm(tmp_path: Path) -> None:
    """Which vLLM reads as Idefics3, under its own class."""
    IDEFICS3["smolvlm"][1](tmp_path / "one")
    convert("hf-to-megatron", "--hf", tmp_path / "one", "--out", tmp_path / "m")
    home = exported(tmp_path / "m", tmp_path / "home", trained=True)
    config, expected = json.loads((home / "config.json").read_text()), EXPECTED["idefics3"]
    named = dataclasses.replace(
        expected, architecture="SmolVLMForConditionalGeneration",
        keys=tuple(key for key in expected.keys if key != "text_config.architectures"),
    )  # fmt: skip
    _check(config, sorted(load(home)), named)


def _check(config: dict[str, object], names: list[str], expected: Expected) -> None:
    assert config["architectures"] == [expected.architecture]
    assert [key for key in expected.keys if not _has(config, key)] == []
    unknown = [tensor for tensor in names if not any(re.fullmatch(pattern, tensor) for pattern in expected.tensors)]
    unused = [pattern for pattern in expected.tensors if not any(re.fullmatch(pattern, tensor) for tensor in names)]
    assert not unknown and not unused, (unknown, unused)


def _has(tree: object, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return False
        tree = tree[part]
    return tree is not None


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.family(name), *([] if name == "llava" else [pytest.mark.long])])
             for name in EXPECTED]
)  # fmt: skip
def test_config_and_names_are_what_servers_read(name: str, tmp_path: Path) -> None:
    """Of a model that was put together here, whose directory is written anew."""
    one = made_talking("internvl" if name == "internvl_chat" else name, tmp_path / "one")
    same = name.startswith(("qwen", "idefics3"))
    other = made_talking(name if same else "llava", tmp_path / "other")
    words = ["--language", other, "--vision", one, "--connector", one]
    convert("hf-to-megatron", *words, "--out", tmp_path / "m")
    home = exported(tmp_path / "m", tmp_path / "home", trained=True)
    _check(json.loads((home / "config.json").read_text()), sorted(load(home)), EXPECTED[name])
    for file in ("generation_config.json", "chat_template.jinja", "tokenizer_config.json", "tokenizer.json"):
        assert (home / file).is_file()
    if name not in ("internvl_chat", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        assert (home / "processor_config.json").is_file() and (home / "preprocessor_config.json").is_file()


@pytest.mark.long
@pytest.mark.family("glm4v")
def test_glm4v(tmp_path: Path) -> None:
    """Whose published directory and whose export have the same keys; the tokenizer is not asked."""
    glm4v_models.save(glm4v_models.glm4v(), tmp_path / "hf")
    convert("hf-to-megatron", "--hf", tmp_path / "hf", "--out", tmp_path / "m")
    home = exported(tmp_path / "m", tmp_path / "home", trained=True)
    config = json.loads((home / "config.json").read_text())
    assert config["architectures"] == ["Glm4vForConditionalGeneration"] and config["model_type"] == "glm4v"
    vision = "depth hidden_size num_heads intermediate_size out_hidden_size in_channels patch_size temporal_patch_size"
    keys = (
        "image_token_id", "video_token_id", "image_start_token_id", "video_start_token_id", "video_end_token_id",
        "text_config.rms_norm_eps", *(f"vision_config.{key}" for key in vision.split()),
        "vision_config.spatial_merge_size", "vision_config.rms_norm_eps", "vision_config.attention_bias",
    )  # fmt: skip
    assert [key for key in keys if not _has(config, key)] == []
    # Either spelling of the positions' sections, by the version of Transformers that wrote it.
    text = config["text_config"]
    assert (text.get("rope_parameters") or text["rope_scaling"])["mrope_section"] == [1, 2, 1]
    known = r"lm_head\.weight|model\.(language_model\.(embed_tokens|norm|layers)|visual)\.[.\w]+"
    assert all(re.fullmatch(known, name) for name in load(home))
    assert any("mlp.gate_up_proj" in name for name in load(home))  # fused, as both read it


@pytest.mark.long
@pytest.mark.family("internvl")
def test_internvl_of_transformers(tmp_path: Path) -> None:
    """Which vLLM reads by InternS1's loader, whole as it came in; the language model's class is named there too."""
    convert("hf-to-megatron", "--hf", made_talking("internvl", tmp_path / "hf"), "--out", tmp_path / "m")
    home = exported(tmp_path / "m", tmp_path / "home", trained=True)
    config = json.loads((home / "config.json").read_text())
    assert config["architectures"] == ["InternVLForConditionalGeneration"]
    assert all(len(config["vision_config"][key]) == 2 for key in ("image_size", "patch_size"))
    assert config["text_config"]["architectures"] == ["Qwen2ForCausalLM"] and config["downsample_ratio"] == 0.5
    known = r"(model\.)?(language_model|vision_tower|multi_modal_projector)\..*|(language_model\.)?lm_head\.weight"
    assert all(re.fullmatch(known, name) for name in load(home))
    special = json.loads((home / "tokenizer_config.json").read_text())["extra_special_tokens"]
    assert special["context_image_token"] == "<IMG_CONTEXT>" and special["start_image_token"] == "<img>"
