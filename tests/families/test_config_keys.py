"""Every key of a config.json is honoured, refused by name, or known to have no effect: over all whole families."""

from __future__ import annotations

import json
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from test_bad_checkpoints import FIRST, SHORT, with_value
from test_round_trips import CASES, make

from megavlm.checkpoint.hf.given import open_directory, understand
from megavlm.config.errors import UserError
from megavlm.families.known import FAMILIES

_PRETRAINED = (
    "_name_or_path", "architectures", "auto_map/*", "chunk_size_feed_forward", "dtype", "id2label/*",
    "is_encoder_decoder", "label2id/*", "output_attentions", "output_hidden_states", "problem_type", "return_dict",
    "torch_dtype", "transformers_version", "use_cache", "use_return_dict", "_commit_hash", "_flash_attn_2_enabled",
)  # fmt: skip
"""Transformers' own, of no model: names of classes, of labels, what a call returns. Weights say their precision."""
_TOKENS = (
    "bos_token_id", "eos_token_id", "pad_token_id", "_pad_token_id", "vision_start_token_id", "vision_end_token_id",
    "image_start_token_id", "image_end_token_id", "video_token_id", "video_start_token_id", "video_end_token_id",
    "eoi_token_index", "image_token", "ignore_index",
)  # fmt: skip
"""Ids that the tokenizer's own files, or the template, say."""
_TRAINING = (
    "attention_dropout", "dropout_prob", "embd_pdrop", "freeze_mm_mlp_adapter", "freeze_vision_tower",
    "hidden_dropout_prob", "initializer_factor", "mm_projector_lr", "non_lora_lr", "pretraining_tp",
    "projection_dropout", "resid_pdrop", "tune_mm_mlp_adapter", "use_mask_token", "use_mm_proj", "continuous_training",
    "neftune_noise_alpha",
)  # fmt: skip
"""What was trained and how; there is no dropout in training here (docs/conversion.md), and none in answers there."""
_TOKENIZER = ("cache_dir", "mm_use_im_patch_token", "tokenizer_*", "llm_model_name_or_path")
"""Where the tokenizer is, and how it fills up batches; a token that no text has."""
_SHAPES = (
    "aligner_config/params/n_embed", "tie_word_embeddings", "vision_config/initializer_range", "initializer_range",
    "projection_dim", "text_config/num_image_tokens", "vocab_size", "hidden_size", "image_seq_length", "num_queries",
    "vision_config/embed_dim", "mm_projector/hidden_size", "max_window_layers", "layer_types", "sliding_window",
    "vision_use_head", "original_max_position_embeddings", "text_config/pixel_shuffle_factor",
)  # fmt: skip
"""What the tensors' shapes, or another key beside, say, and what starts a tower that is not trained anew."""
_QWEN = ("attn_dropout_prob", "bf16", "emb_dropout_prob", "fp16", "fp32", "use_flash_attn")
"""Of Qwen v1: of a training, with its number type, and how its attention is computed."""
_ROUTERS = ("output_router_logits", "router_aux_loss_coef")
"""Of a loss over all layers together, which only a training by Transformers takes (docs/conversion.md)."""
WITHOUT_EFFECT: dict[str, tuple[str, ...]] = {
    # Its class takes the first from vocabulary_map, whatever is said, and the second for nothing.
    "chameleon": ("image_token_id", "model_parallel_size"),
    # The checkpoint's own tower is taken, and vision_config.json has its shape, whatever it is called. How tiles are
    # put together, where there are some (image_aspect_ratio: anyres is refused).
    "bunny": ("mm_vision_tower", "unfreeze_vision_tower", "mm_patch_merge_type"),
    "imp": ("mm_vision_tower", "image_token_index", "mm_patch_merge_type"),
    "allava": ("mm_vision_tower", "mm_patch_merge_type"),
    "dense_connector": ("mm_vision_tower", "unfreeze_mm_vision_tower", "mm_patch_merge_type"),
    "mobilevlm": ("mm_vision_tower", "mm_patch_merge_type"),
    # What was trained; drop_path is not in config.json.
    "minigemini": (
        "mm_vision_tower",
        "mm_patch_merge_type",
        "optimize_vision_tower",
        "optimize_vision_tower_aux",
        "image_grid_pinpoints",
    ),
    # Of a training, and a name; what its tokenizer cuts texts to.
    "cobra": ("model/model_id", "model/llm_max_length", "stage", "seed"),
    "llava_original": ("unfreeze_mm_vision_tower", "mm_patch_merge_type"),
    # A number that stands for a picture before features take its place; names of classes, which vision_config says too.
    "tinyllava": ("image_token_index", "vision_model_name_or_path", "vision_config/model_name_or_path2"),
    "deepseek_vl_original": ("vision_config/params/select_feature",),  # its code has "same" for every SigLIP
    # SAM's of prompts, which the encoder has none of; mlp_dim says how wide its layers are.
    "deepseek_vl_hybrid": tuple(f"high_res_vision_config/{key}" for key in ("mlp_ratio", "num_pos_feats", "scale")),
    "gemma3": ("text_config/_sliding_window_pattern",),  # layer_types say it
    # Of the class that compares pictures with words; words that the Q-Former is not given; the tower's width, which
    # tensors say. A text_config that is no decoder is refused.
    "blip2": (
        "image_text_hidden_size",
        "qformer_config/attention_probs_dropout_prob",
        "qformer_config/encoder_hidden_size",
        "qformer_config/max_position_embeddings",
        "use_decoder_only_language_model",
    ),
    # Docs: each slice is by itself. scale_resolution is what slices are cut by.
    "minicpm_llama3_v_2_5": ("batch_vision_input", "image_size", "slice_config/model_type"),
    "minicpm_v_2": ("image_size",),
    "qwen3_vl": ("text_config/rope_parameters/mrope_interleaved",),  # its code does not ask
    "qwen3_vl_moe": ("text_config/rope_parameters/mrope_interleaved",),
    # Of a training; vision_config.json has the tower's shape, whatever it is called.
    "moe_llava": (
        "mm_image_tower",
        "moe/capacity_factor",
        "moe/ep_size",
        "moe/eval_capacity_factor",
        "moe/min_capacity",
        "moe/router_aux_loss_coef",
        "moe/train_modules",
    ),
    "llava_onevision1_5": ("text_config/image_token_id", "text_config/video_token_id"),  # the outer ones are asked
    # Dynamic: no effect up to the length that it is trained for.
    "internvl_chat": ("llm_config/rope_scaling/*", "template"),
    "vary": ("vision_tower",),  # where CLIP is loaded from, which the checkpoint holds
    # What the published file has there was not read; the connector's tensors say it.
    "codefuse_vlm": ("mm_vision_tower", "mm_hidden_size", "visual_config.json/output_dim"),
}
"""Keys of a family's own, with the reason above them; common ones stand in the tuples above."""
FILES = ("config.json", "vision_config.json", "visual_config.json")
COMMON = (*_PRETRAINED, *_TOKENS, *_TRAINING, *_TOKENIZER, *_SHAPES, *_QWEN, *_ROUTERS)
_LLAVA: dict[str, Any] = {
    "image_aspect_ratio": "pad", "mm_patch_merge_type": "flat", "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
}  # fmt: skip
_PHI = {**_LLAVA, "embd_pdrop": 0.0, "qk_layernorm": False, "rope_scaling": None}
PUBLISHED: dict[str, dict[str, Any]] = {
    "bunny": {**_PHI, "continuous_training": False, "use_s2": False}, "imp": _PHI, "allava": _PHI,
    "mobilevlm": {**_LLAVA, "vision_tower_type": "clip"}, "dense_connector": _LLAVA,
    "minigemini": _LLAVA,
    "llava_original": _LLAVA,
    "minicpm_v_2": {"attention_bias": False, "drop_vision_last_layer": True, "mm_use_im_start_end": True,
                    "pretraining_tp": 1, "rope_scaling": None, "_name_or_path": "openbmb/MiniCPM-V-2"},
    "minicpm_llama3_v_2_5": {"attention_bias": False, "drop_vision_last_layer": False, "pretraining_tp": 1,
                             "rope_scaling": None, "version": "2.5"},
}  # fmt: skip
"""Keys of published files, as their trainers' code writes them, that the tiny ones leave out."""
WHOLE = [name for name in FIRST if {"vision", "connector", "language"} <= {*FAMILIES[name].parts}]
SEVERAL = {
    name: further
    for name in WHOLE
    if (further := [case for case, family in CASES.items() if family == name and case != FIRST[name]])
}
"""Further checkpoints of a family."""


def places(tree: dict[str, Any], inside: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield all places of a configuration that hold a value."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from places(value, (*inside, key))
        else:
            yield (*inside, key)


def others(value: Any) -> list[Any]:
    """Return other values that a key may have."""
    if value is None:
        return ["of_nobody", 3]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [value * 2 or 4, value + 1]
    if isinstance(value, str):
        return ["of_nobody"]
    return [value[:-1], [one * 2 if isinstance(one, int) else one for one in value]] if value else [["of_nobody"]]


def told(source: Path) -> str:
    """Return all that a conversion takes from the configuration, or that it is refused."""
    try:
        given, home = open_directory(source)
        found = understand(given, {}, home)
        one = given[0]
        return repr((found.model, one.family.name, one.family.tokens(one.source), one.family.templates(one.source)))
    except UserError as error:
        return f"refused: {error}"


def known(name: str, where: str) -> bool:
    """Whether a key is known to have no effect: by its whole place, or by what that ends with."""
    every = (*COMMON, *WITHOUT_EFFECT.get(name, ()))
    return any(fnmatch(where, one) or fnmatch(where, f"*/{one}") for one in every)


def files_of(source: Path) -> list[Path]:
    """Return the files of a configuration."""
    return sorted(file for file in source.rglob("*config.json") if file.name in FILES)


def kinds(source: Path) -> set[tuple[str, ...]]:
    """Return what a configuration says that its parts are."""

    def named(tree: dict[str, Any], inside: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        for place in places(tree, inside):
            if place[-1] in ("model_type", "architectures"):
                value: Any = tree
                for key in place[len(inside) :]:
                    value = value[key]
                yield (*place, str(value))

    return {one for path in files_of(source) for one in named(json.loads(path.read_text()), (path.name,))}


def unheeded(source: Path, more: dict[str, Any]) -> set[str]:
    """Return the places of a configuration whose value changes nothing; ``more`` are keys that it is given first."""
    ignored = set[str]()
    for path in files_of(source):
        tree = json.loads(path.read_text())
        tree = (more if path.name == "config.json" else {}) | tree
        path.write_text(json.dumps(tree))
        before = told(source)
        assert not before.startswith("refused"), before
        inside = [*path.relative_to(source).parts[: -1 if path.name == "config.json" else None]]
        for place in places(tree):
            value: Any = tree
            for key in place:
                value = value[key]
            for other in others(value):
                path.write_text(json.dumps(with_value(tree, place, other)))
                if told(source) != before:
                    break
            else:
                ignored.add("/".join((*inside, *place)))
        path.write_text(json.dumps(tree))
    return ignored


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=[
                pytest.mark.family(name),
                *[pytest.mark.long] * (name not in SHORT[1:5]),
            ],
        )
        for name in WHOLE
    ],
)
def test_a_key_is_honoured_or_refused_or_has_no_effect(name: str, tmp_path: Path) -> None:
    ignored = unheeded(make(FIRST[name], tmp_path / "hf"), PUBLISHED.get(name, {}))
    assert not {where for where in ignored if not known(name, where)}
    own = WITHOUT_EFFECT.get(name, ())
    assert {one for one in own if not any(fnmatch(where, one) for where in ignored)} == set(), "has an effect after all"


@pytest.mark.long
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.family(name)) for name in SEVERAL])
def test_so_are_those_beside_other_parts(name: str, tmp_path: Path) -> None:
    """Of every further kind of configuration that a family's checkpoints have: other language models, towers."""
    seen, found = [kinds(make(FIRST[name], tmp_path / "first"))], dict[str, set[str]]()
    for case in SEVERAL[name]:
        source = make(case, tmp_path / case)
        if kinds(source) not in seen:
            seen.append(kinds(source))
            found[case] = {where for where in unheeded(source, {}) if not known(name, where)}
    assert not {case: keys for case, keys in found.items() if keys}
