"""Tiny GLM-4.1Vs and GLM-4.5Vs by Transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from family_cases import made
from qwen2_vl_models import PREPROCESSOR
from tokenizer_files import GLM_ADDED, write_qwen2
from torch import Tensor
from transformers import (
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm4vMoeConfig,
    Glm4vMoeForConditionalGeneration,
    PreTrainedModel,
)
from whole_source import NativeSource, experts_apart

_TOKENS = {
    "image_start_token_id": 115, "image_end_token_id": 116, "video_start_token_id": 117, "video_end_token_id": 118,
    "image_token_id": 119, "video_token_id": 120,
}  # fmt: skip
FILES: dict[str, Any] = {
    **{key: value for key, value in PREPROCESSOR.items() if key not in ("min_pixels", "max_pixels")},
    "image_processor_type": "Glm4vImageProcessor", "processor_class": "Glm4vProcessor",
    "size": {"longest_edge": 8192, "shortest_edge": 512},
}  # fmt: skip
"""``preprocessor_config.json`` with the keys of the published one: pixels of two frames."""


def glm4v(*, tied: bool = False, heads: int = 4, tokens: dict[str, int] = _TOKENS, **text: Any) -> PreTrainedModel:
    """A GLM-4.1V; with 3 heads one whose tower no tensor-parallel size but 1 and 3 divides."""
    rope = {
        "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 2, 1], "partial_rotary_factor": 0.5,
    }  # fmt: skip
    own = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
        "rope_parameters": rope, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    vision = {
        "depth": 3, "num_heads": heads, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2,
        "hidden_size": 48, "intermediate_size": 60, "out_hidden_size": 64, "image_size": 28,
    }  # fmt: skip
    config_class, model_class = _CLASSES["n_routed_experts" in text]
    config = config_class(text_config=own | text, vision_config=vision, tie_word_embeddings=tied, **tokens)
    model = made(model_class, config)
    with torch.no_grad():
        for name, bias in model.named_buffers():
            if name.endswith("e_score_correction_bias"):  # 0 at first; of the order of what scores differ by
                bias.copy_(torch.rand_like(bias) * 0.2)
    if "n_routed_experts" in text:
        return model
    with torch.no_grad():  # of the order of what the norms behind attention and MLP add, so that inputs matter
        model.model.language_model.embed_tokens.weight.mul_(50)
        model.model.visual.merger.down_proj.weight.mul_(50)
    return model


_CLASSES: tuple[tuple[Any, Any], ...] = (
    (Glm4vConfig, Glm4vForConditionalGeneration), (Glm4vMoeConfig, Glm4vMoeForConditionalGeneration),
)  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
EXPERTS: dict[str, Any] = {
    "head_dim": 32, "attention_bias": True, "rope_parameters": {**_ROPE, "mrope_section": [2, 3, 3]},
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_shared_experts": 2,
    "first_k_dense_replace": 1, "routed_scaling_factor": 1.5, "initializer_range": 0.1,
}  # fmt: skip


def glm4v_moe(**own: Any) -> PreTrainedModel:
    """A GLM-4.5V: an MLP, then layers with experts; heads wider than the model over their number, as published."""
    return glm4v(**{**EXPERTS, **own})


class Glm4vMoeSource(NativeSource):
    """Its class holds the experts of a layer in one tensor; published files do not."""

    def gradients(self) -> dict[str, Tensor]:
        """Return them by the published names."""
        return experts_apart(super().gradients())


def save(model: PreTrainedModel, directory: Path) -> Path:
    """Write a model as Transformers does, with its processor's file."""
    model.save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text(json.dumps(FILES, indent=2))
    return directory


def publish(directory: Path, make: Callable[..., PreTrainedModel] = glm4v) -> Path:
    """Write a checkpoint with a tokenizer; its chat template, which asks for thoughts, is not among the files."""
    directory.mkdir(parents=True)
    tree = json.loads(write_qwen2(directory, GLM_ADDED, ()).read_text())
    ids = {token["content"]: token["id"] for token in tree["added_tokens"]}
    names = {
        "image_start_token_id": "<|begin_of_image|>", "image_end_token_id": "<|end_of_image|>",
        "video_start_token_id": "<|begin_of_video|>", "video_end_token_id": "<|end_of_video|>",
        "image_token_id": "<|image|>", "video_token_id": "<|video|>",
    }  # fmt: skip
    tokens = {key: ids[name] for key, name in names.items()}
    save(make(tokens=tokens, vocab_size=-(-(1 + max(ids.values())) // 64) * 64), directory)
    own = {"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(own))
    return directory


def flat(directory: Path) -> Path:
    """Write one whose configuration has the language model's keys beside the tower's, as first published."""
    save(glm4v(), directory)
    path = directory / "config.json"
    tree = json.loads(path.read_text())
    text = tree.pop("text_config")
    rope = text.pop("rope_parameters")
    text |= {
        "rope_theta": rope["rope_theta"], "rope_scaling": {"type": "default", "mrope_section": rope["mrope_section"]},
        "partial_rotary_factor": rope["partial_rotary_factor"], "attention_bias": True,
    }  # fmt: skip
    path.write_text(json.dumps({**text, **tree}))
    return directory


GLM4V: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "glm4v": ("glm4v", lambda directory: save(glm4v(), directory)),
    "glm4v_tied": ("glm4v", lambda directory: save(glm4v(tied=True), directory)),
    "glm4v_flat": ("glm4v", flat),
    "glm4v_moe": ("glm4v_moe", lambda directory: save(glm4v_moe(), directory)),
    "glm4v_moe_groups": (
        "glm4v_moe",
        lambda directory: save(
            glm4v_moe(tied=True, n_routed_experts=8, n_group=4, topk_group=1, first_k_dense_replace=2), directory
        ),
    ),
}
"""What makes a checkpoint, by name, and its family."""
