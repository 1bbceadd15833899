"""Tiny LLaVAs with the tokenizer and the processor that published ones have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from family_cases import _TEXT, llava, llava_original
from tokenizer_files import write_llava
from transformers import LlamaConfig, PreTrainedModel

IMAGE, ROWS = 329, 448
"""The id of ``<image>`` in the tokenizer that ``write_llava`` trains; rows for all that a template appends."""
TEXT: dict[str, Any] = {**_TEXT, "vocab_size": ROWS, "eos_token_id": 2}
CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


def publish(directory: Path, model: PreTrainedModel) -> Path:
    """Write a checkpoint with tokenizer and processor, as the hub has them; it squashes pictures."""
    clip = model.config.vision_config.model_type.startswith("clip")
    model.config.image_token_index = model.config.image_token_id = IMAGE
    model.save_pretrained(directory)
    write_llava(directory)
    pixels = {
        "image_processor_type": "CLIPImageProcessor" if clip else "SiglipImageProcessor", "do_resize": True,
        "size": {"height": 28, "width": 28}, "resample": 3, "do_center_crop": False, "do_rescale": True,
        "do_normalize": True, "do_convert_rgb": True, **(CLIP if clip else HALF),
    }  # fmt: skip
    (directory / "preprocessor_config.json").write_text(json.dumps(pixels))
    own = {
        "processor_class": "LlavaProcessor", "patch_size": 7, "image_token": "<image>",
        "num_additional_image_tokens": int(clip),
        "vision_feature_select_strategy": "default" if clip else "full",
    }  # fmt: skip
    (directory / "processor_config.json").write_text(json.dumps(own))
    return directory


def llava_answers(directory: Path) -> Path:
    """CLIP and Llama."""
    return publish(directory, llava(LlamaConfig(**TEXT, rms_norm_eps=1e-5)))


def llava_original_answers(directory: Path) -> Path:
    """The same in its authors' layout, with the tower inside."""
    llava_original(directory, llava(LlamaConfig(**TEXT)))
    write_llava(directory)
    return directory
