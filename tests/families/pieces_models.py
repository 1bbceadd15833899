"""Tiny models in folders: xtuner's LLaVA and HPT 1.5.

Names and keys: InternLM/xtuner @ b934f462 (``xtuner/model/llava.py``, ``modules/projector``), HyperGAI/HPT @ 144edb7f
(``vlmeval/vlm/hpt1_5.py``, which stretches SigLIP's table to 448 pixels as ``interpolate_pos_encoding`` does).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from family_cases import _VISION, CLIP_MEAN, CLIP_STD
from spliced_models import Parts, Places, Spliced, filled, mlp, text_of
from torch import nn
from transformers import CLIPVisionConfig, PretrainedConfig, SiglipVisionConfig

_PLACES = Places("visual_encoder", "projector.model", "", "visual_encoder/vision_model.", "projector/model.")
_IN_LLM = Places("visual_encoder", "projector.model", "llm", "visual_encoder/vision_model.", "projector/model.", "llm/")
PHI3: dict[str, Any] = {
    "num_key_value_heads": 2, "original_max_position_embeddings": 256, "pad_token_id": None, "rms_norm_eps": 1e-5,
    "sliding_window": None,
}  # fmt: skip


def _files(vision: PretrainedConfig, depth: int) -> dict[str, Any]:
    clip = "clip" in vision.model_type
    side = {"height": vision.image_size, "width": vision.image_size}
    cut = {"crop_size": side, "do_center_crop": True, "size": {"shortest_edge": vision.image_size}}
    pixels = {
        "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True,
        "image_mean": CLIP_MEAN if clip else [0.5] * 3, "image_std": CLIP_STD if clip else [0.5] * 3,
        "image_processor_type": "CLIPImageProcessor" if clip else "SiglipImageProcessor", "resample": 3,
        "rescale_factor": 1 / 255, **(cut if clip else {"size": side}),
    }  # fmt: skip
    projector = {
        "architectures": ["ProjectorModel"], "bias": True, "depth": depth, "hidden_act": "gelu",
        "llm_hidden_size": 64, "model_type": "projector", "torch_dtype": "float32", "visual_hidden_size": 48,
    }  # fmt: skip
    return {
        "visual_encoder/config.json": vision.to_dict(), "visual_encoder/preprocessor_config.json": pixels,
        "projector/config.json": projector,
    }  # fmt: skip


def _connector(depth: int = 2) -> nn.Module:
    return filled(mlp(48, 64, depth))


def xtuner(text: str = "phi3", *, clip: bool = True, **keys: Any) -> Parts:
    """LLaVA-Phi-3-mini: CLIP, padded; a SigLIP loses its first patch."""
    vision = (CLIPVisionConfig if clip else SiglipVisionConfig)(**_VISION)
    told = text_of(text, **(PHI3 if text == "phi3" else {"num_key_value_heads": 2, "rms_norm_eps": 1e-5}) | keys)
    return Parts(told, vision, _connector(), _PLACES, lambda one, _: one.to_dict(), files=_files(vision, 2))


def hpt(text: str = "llama", text_keys: dict[str, Any] | None = None, **vision_keys: Any) -> Parts:
    """HPT 1.5 Air: a table of 6 x 6 for 384 pixels, seen at 448 in 7 x 7 patches, all of which are kept."""
    vision = SiglipVisionConfig(**_VISION | {"image_size": 384, "patch_size": 64} | vision_keys)
    told = text_of(
        text, **(PHI3 if text == "phi3" else {"num_key_value_heads": 2, "rms_norm_eps": 1e-5}) | (text_keys or {})
    )
    return Parts(
        told, vision, _connector(), _IN_LLM, lambda *_: {}, drops=False,
        files={**_files(vision, 2), "llm/config.json": told.to_dict()}, tower_keys={"interpolate_pos_encoding": True},
    )  # fmt: skip


PIECES: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "xtuner": ("xtuner", lambda path: Spliced(xtuner()).save_pretrained(path)),
    "xtuner_siglip": ("xtuner", lambda path: Spliced(xtuner("llama", clip=False)).save_pretrained(path)),
    "hpt": ("hpt", lambda path: Spliced(hpt()).save_pretrained(path)),
    "hpt_edge": ("hpt", lambda path: Spliced(hpt("phi3")).save_pretrained(path)),
}
"""Checkpoints, with their family."""
