"""Tiny TinyLLaVAs, in the names of its factory (``tinyllava/model/modeling_tinyllava.py`` @ 0fd71549)."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from family_cases import _VISION
from spliced_models import Parts, Places, Spliced, filled, mlp, text_of
from transformers import CLIPVisionConfig, PretrainedConfig, SiglipVisionConfig

_PLACES = Places(
    "vision_tower._vision_tower", "connector._connector", "language_model", "vision_tower._vision_tower.vision_model."
)
_NAMES = {
    "llama": "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "phi": "microsoft/phi-2", "gemma": "google/gemma-2b-it",
    "qwen2": "Qwen/Qwen2-0.5B",
}  # fmt: skip
TEXTS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "rms_norm_eps": 1e-5},
    "phi": {"partial_rotary_factor": 0.5},
    "stablelm": {"partial_rotary_factor": 0.25, "use_qkv_bias": True, "num_key_value_heads": 4},
    "gemma": {"num_key_value_heads": 1, "head_dim": 32, "pad_token_id": None},
    "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": True},
}


def _config(text: PretrainedConfig, vision: PretrainedConfig, **keys: Any) -> dict[str, Any]:
    name = _NAMES.get(text.model_type, "stabilityai/stablelm-2-zephyr-1_6b")
    tower = "openai/clip-vit-large-patch14-336" if "clip" in vision.model_type else "google/siglip-so400m-patch14-384"
    return {
        "architectures": ["TinyLlavaForConditionalGeneration"], "cache_dir": None, "connector_type": "mlp2x_gelu",
        "hidden_size": text.hidden_size, "ignore_index": -100, "image_aspect_ratio": "square",
        "image_token_index": -200, "llm_model_name_or_path": name, "model_type": "tinyllava", "num_queries": 128,
        "text_config": text.to_dict(), "tokenizer_model_max_length": 3072, "tokenizer_name_or_path": name,
        "torch_dtype": "float32", "vision_config": {**vision.to_dict(), "model_name_or_path2": ""},
        "vision_feature_layer": -2, "vision_feature_select_strategy": "patch",
        "vision_hidden_size": vision.hidden_size, "vision_model_name_or_path": tower,
        "vision_model_name_or_path2": "", "vocab_size": text.vocab_size, **keys,
    }  # fmt: skip


def tinyllava(
    text: str = "phi", *, clip: bool = False, text_keys: dict[str, Any] | None = None,
    vision_keys: dict[str, Any] | None = None, **keys: Any,
) -> Parts:  # fmt: skip
    """Phi behind a SigLIP, whose first patch is dropped; or others; ``keys`` of config.json."""
    vision = (CLIPVisionConfig if clip else SiglipVisionConfig)(**_VISION | (vision_keys or {}))
    return Parts(
        text_of(text, **TEXTS[text] | (text_keys or {})), vision, filled(mlp(48, 64)), _PLACES,
        lambda one, other: _config(one, other, **keys),
        drops=keys.get("vision_feature_select_strategy", "patch") == "patch",
        # GemmaModel of Transformers 4.40, which the factory pinned, multiplies behind the place where pictures come in.
        scale=math.sqrt(64) if text == "gemma" else 1.0,
        keeps_copy=text == "qwen2",  # 3.8B parameters, the hub says of TinyLLaVA-Qwen2.5-3B-SigLIP: 0.3B too many
    )  # fmt: skip


TINYLLAVA: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "tinyllava": ("tinyllava", lambda path: Spliced(tinyllava()).save_pretrained(path)),
    "tinyllava_stablelm": (
        "tinyllava",
        lambda path: Spliced(tinyllava("stablelm", clip=True, image_aspect_ratio="pad")).save_pretrained(path),
    ),
    "tinyllava_llama": (
        "tinyllava",
        lambda path: Spliced(tinyllava("llama", vision_feature_select_strategy="cls_patch")).save_pretrained(path),
    ),
    "tinyllava_gemma": ("tinyllava", lambda path: Spliced(tinyllava("gemma")).save_pretrained(path)),
    "tinyllava_qwen2": ("tinyllava", lambda path: Spliced(tinyllava("qwen2")).save_pretrained(path)),
}  # fmt: skip
"""Checkpoints, with their family."""
