"""``preprocessor_config.json`` of several systems, for tiny towers."""

from __future__ import annotations

from typing import Any

from family_cases import CLIP_MEAN, CLIP_STD
from internvl_models import internvl_files
from qwen2_vl_models import PREPROCESSOR as NATIVE_FILES

__all__ = ["CROP_FILES", "NATIVE_FILES", "THIRD_FILES", "TILE_FILES"]

CROP_FILES: dict[str, Any] = {
    "crop_size": {"height": 28, "width": 28}, "do_center_crop": True, "do_convert_rgb": True, "do_normalize": True,
    "do_rescale": True, "do_resize": True, "image_mean": CLIP_MEAN, "image_processor_type": "CLIPImageProcessor",
    "image_std": CLIP_STD, "resample": 3, "rescale_factor": 1 / 255, "size": {"shortest_edge": 28},
}  # fmt: skip
"""``preprocessor_config.json`` as llava-hf/llava-1.5-7b-hf has it, for 28 pixels."""
# Transformers' processor cuts to tiles by its own default, whatever this file of its image processor says.
TILE_FILES = {**internvl_files(), "crop_to_patches": True, "max_patches": 6}
THIRD_FILES = {
    **{key: value for key, value in NATIVE_FILES.items() if key not in ("min_pixels", "max_pixels")},
    "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"longest_edge": 4096, "shortest_edge": 256},
}  # fmt: skip
"""``preprocessor_config.json`` as Qwen3-VL has it."""
