"""Tiny Qwen3-VLs by Transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from family_cases import made
from qwen2_vl_models import PREPROCESSOR
from safetensors.torch import load_file, save_file
from transformers import (
    PreTrainedModel,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

_TOKENS = {"image_token_id": 119, "video_token_id": 120, "vision_start_token_id": 116, "vision_end_token_id": 117}


def qwen3_vl(
    *, tied: bool = False, levels: tuple[int, ...] = (0, 1, 3), tokens: dict[str, int] = _TOKENS, **own: Any
) -> PreTrainedModel:
    """A Qwen3-VL of 4 layers, of which the first ones take the outputs of the tower's layers ``levels``."""
    rope = {"rope_type": "default", "rope_theta": 5000000.0, "mrope_section": [3, 3, 2], "mrope_interleaved": True}
    text: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128, "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6, "rope_parameters": rope, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    vision = {
        "depth": 4, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2,
        "hidden_size": 48, "intermediate_size": 60, "out_hidden_size": 64, "num_position_embeddings": 36,
        "deepstack_visual_indexes": list(levels),
    }  # fmt: skip
    config_class, model_class = _CLASSES["num_experts" in own]
    config = config_class(text_config=text | own, vision_config=vision, tie_word_embeddings=tied, **tokens)
    return made(model_class, config)


_CLASSES: tuple[tuple[Any, Any], ...] = (
    (Qwen3VLConfig, Qwen3VLForConditionalGeneration), (Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration),
)  # fmt: skip
EXPERTS: dict[str, Any] = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "initializer_range": 0.1,
}  # fmt: skip


def qwen3_vl_moe(**own: Any) -> PreTrainedModel:
    """A Qwen3-VL with experts."""
    return qwen3_vl(**{**EXPERTS, "tie_word_embeddings": False, **own})


def save_as_on_the_hub(model: PreTrainedModel, directory: Path) -> Path:
    """Write a model with experts as it is published: [experts, in, out], where Transformers writes [experts, out, in].

    It reads both (``conversion_mapping.py`` of Transformers 5.23, ``qwen3_vl_moe``).
    """
    save(model, directory)
    path = directory / "model.safetensors"
    turned = {
        name: tensor.mT.contiguous() if ".mlp.experts." in name else tensor for name, tensor in load_file(path).items()
    }
    save_file(turned, path, metadata={"format": "pt"})
    return directory


def save(model: PreTrainedModel, directory: Path) -> Path:
    """Write a model as Transformers does, with its processor's file."""
    model.save_pretrained(directory)
    tree = {**PREPROCESSOR, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "processor_class": "Qwen3VLProcessor"}
    del tree["min_pixels"], tree["max_pixels"]
    tree["size"] = {"longest_edge": 4096, "shortest_edge": 256}
    (directory / "preprocessor_config.json").write_text(json.dumps(tree, indent=2))
    return directory


QWEN3_VL: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "qwen3_vl": ("qwen3_vl", lambda directory: save(qwen3_vl(), directory)),
    "qwen3_vl_tied": ("qwen3_vl", lambda directory: save(qwen3_vl(tied=True, levels=(2,)), directory)),
    "qwen3_vl_moe": ("qwen3_vl_moe", lambda directory: save_as_on_the_hub(qwen3_vl_moe(), directory)),
    "qwen3_vl_moe_outputs_first": (
        "qwen3_vl_moe",
        # A head of its own, of which text_config says nothing that counts: as Transformers' class has it.
        lambda directory: save(
            qwen3_vl_moe(mlp_only_layers=[0], num_hidden_layers=3, tie_word_embeddings=True), directory
        ),
    ),
}
"""What makes a checkpoint, by name, and its family."""
