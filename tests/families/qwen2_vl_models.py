"""Tiny Qwen2-VLs and Qwen2.5-VLs by Transformers, and as the hub has them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from family_cases import State, load, made, write
from safetensors.torch import save_file
from tokenizer_files import write_qwen2
from transformers import (
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

IMAGE = 119
PATCH = 4
_TEXT: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [2, 3, 3]},
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_TOWER = {"depth": 3, "num_heads": 4, "patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2}
_TOKENS = {"image_token_id": IMAGE, "video_token_id": 120, "vision_start_token_id": 116, "vision_end_token_id": 117}
PIXELS = {"min_pixels": 256, "max_pixels": 4096}
PREPROCESSOR = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_processor_type": "Qwen2VLImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711], "max_pixels": 4096, "merge_size": 2, "min_pixels": 256,
    "patch_size": PATCH, "processor_class": "Qwen2VLProcessor", "temporal_patch_size": 2,
}  # fmt: skip
"""With the keys of the published files."""


def qwen2_vl(*, tied: bool = False, tokens: dict[str, int] = _TOKENS, **text: Any) -> PreTrainedModel:
    """A Qwen2-VL."""
    vision = {**_TOWER, "embed_dim": 48, "hidden_size": 64, "mlp_ratio": 2}
    config = Qwen2VLConfig(text_config=_TEXT | text, vision_config=vision, tie_word_embeddings=tied, **tokens)
    return made(Qwen2VLForConditionalGeneration, config)


def qwen2_5_vl(*, heads: int = 4, tied: bool = False, tokens: dict[str, int] = _TOKENS, **text: Any) -> PreTrainedModel:
    """A Qwen2.5-VL; with 3 heads one whose tower no tensor-parallel size but 1 and 3 divides."""
    vision = {
        **_TOWER, "num_heads": heads, "hidden_size": 48, "out_hidden_size": 64, "intermediate_size": 60,
        "window_size": 24, "fullatt_block_indexes": [1], "tokens_per_second": 4,
    }  # fmt: skip
    config = Qwen2_5_VLConfig(text_config=_TEXT | text, vision_config=vision, tie_word_embeddings=tied, **tokens)
    return made(Qwen2_5_VLForConditionalGeneration, config)


def save(model: PreTrainedModel, directory: Path) -> Path:
    """Write a model as Transformers does, with its processor's file."""
    model.save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2))
    return directory


def modules(model: PreTrainedModel, directory: Path) -> Path:
    """Write it by the names of its modules."""
    save(model, directory)
    state: State = {name: value.contiguous() for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def hub(model: PreTrainedModel, directory: Path) -> Path:
    """Write it as the hub has it: flat configuration, ``visual.*`` and ``model.*``."""
    modules(model, directory)
    names = (("model.visual.", "visual."), ("model.language_model.", "model."))
    state: State = {}
    for name, value in load(directory).items():
        for theirs, ours in names:
            if name.startswith(theirs):
                name = ours + name.removeprefix(theirs)
                break
        state[name] = value
    tree = json.loads((directory / "config.json").read_text())
    text = tree.pop("text_config")
    rope = text.pop("rope_parameters")
    keys = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "vocab_size", "max_position_embeddings", "rms_norm_eps", "hidden_act", "initializer_range",
    )  # fmt: skip
    flat = {key: text[key] for key in keys} | {
        "rope_theta": rope["rope_theta"], "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        "use_sliding_window": False, "sliding_window": 512, "max_window_layers": 4,
    }  # fmt: skip
    for name in directory.iterdir():
        name.unlink()
    directory.rmdir()
    return write(directory, state, {**tree, **flat}, **{"preprocessor_config.json": json.dumps(PREPROCESSOR)})


QWEN2_VL: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "qwen2_vl": ("qwen2_vl", lambda directory: save(qwen2_vl(), directory)),
    "qwen2_vl_hub": ("qwen2_vl", lambda directory: hub(qwen2_vl(tied=True), directory)),
    "qwen2_5_vl": ("qwen2_5_vl", lambda directory: save(qwen2_5_vl(tied=True), directory)),
    "qwen2_5_vl_hub": ("qwen2_5_vl", lambda directory: hub(qwen2_5_vl(), directory)),
    "qwen2_5_vl_modules": ("qwen2_5_vl", lambda directory: modules(qwen2_5_vl(), directory)),
}
"""What makes a checkpoint, by name, and its family."""

CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Of Qwen/Qwen2-VL-7B-Instruct; held against what xorbitsai/inference has of it @ c70ea74f."""


def publish(
    directory: Path, make: Callable[..., PreTrainedModel], save: Callable[[PreTrainedModel, Path], Path] = save
) -> Path:
    """Write a checkpoint with a tokenizer and its template, as the hub has them."""
    directory.mkdir(parents=True)
    file = write_qwen2(directory)
    tree = json.loads(file.read_text())
    ids = {token["content"]: token["id"] for token in tree["added_tokens"]}
    names = {
        "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>",
    }  # fmt: skip
    tokens = {key: ids[name] for key, name in names.items()}
    model = make(tokens=tokens, vocab_size=-(-(1 + max(ids.values())) // 64) * 64)
    save(model, directory)
    own = {"chat_template": CHAT_TEMPLATE, "eos_token": "<|im_end|>", "tokenizer_class": "Qwen2Tokenizer"}
    (directory / "tokenizer_config.json").write_text(json.dumps(own))
    return directory
