"""Tiny checkpoints of towers: DINOv2, SigLIP 2's NaFlex (Transformers' classes), EVA02 (:mod:`eva02_reference`)."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from eva02_reference import Eva02
from family_cases import CLIP_MEAN, CLIP_STD, made
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    PreTrainedModel,
)
from transformers.models.siglip2.modeling_siglip2 import (
    Siglip2Config,
    Siglip2Model,
    Siglip2VisionConfig,
    Siglip2VisionModel,
)

_SIZES: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
_TEXT: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50,
    "max_position_embeddings": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EVA_WIDTH, EVA_HEADS, EVA_FFN, EVA_PATCH, EVA_GRID, EVA_LAYERS = 128, 2, 90, 7, 4, 3


def dinov2(registers: int, *, swiglu: bool = False) -> PreTrainedModel:
    """DINOv2 with a table of 6 x 6."""
    shape = {**_SIZES, "patch_size": 7, "image_size": 42, "use_swiglu_ffn": swiglu}
    if registers:
        config = Dinov2WithRegistersConfig(**shape, num_register_tokens=registers)
        return made(Dinov2WithRegistersModel, config)
    return made(Dinov2Model, Dinov2Config(**shape))


def siglip2_vision() -> PreTrainedModel:
    """The vision half of a NaFlex tower with a table of 5 x 5."""
    config = Siglip2VisionConfig(**_SIZES, intermediate_size=80, patch_size=4, num_patches=25)
    return made(Siglip2VisionModel, config)


def siglip2() -> PreTrainedModel:
    """A dual encoder."""
    vision = Siglip2VisionConfig(**_SIZES, intermediate_size=80, patch_size=4, num_patches=25).to_dict()
    return made(Siglip2Model, Siglip2Config(text_config=_TEXT, vision_config=vision))


def publish(model: Callable[[], PreTrainedModel], directory: Path, **preprocessor: Any) -> Path:
    """Write the model, and how pictures are made pixels."""
    model().save_pretrained(directory)
    if preprocessor:
        (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return directory


_NAFLEX_FILES: dict[str, Any] = {
    "do_convert_rgb": None, "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": [0.5] * 3,
    "image_processor_type": "Siglip2ImageProcessor", "image_std": [0.5] * 3, "max_num_patches": 12, "patch_size": 4,
    "resample": 2, "rescale_factor": 1 / 255,
}  # fmt: skip
_DINOV2_FILES: dict[str, Any] = {
    "crop_size": {"height": 224, "width": 224}, "do_center_crop": True, "do_convert_rgb": True, "do_normalize": True,
    "do_rescale": True, "do_resize": True, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
    "image_processor_type": "BitImageProcessor", "resample": 3, "rescale_factor": 1 / 255,
    "size": {"shortest_edge": 256},
}  # fmt: skip


def eva02_model() -> Eva02:
    """The tower."""
    torch.manual_seed(7)
    model = Eva02(EVA_WIDTH, EVA_LAYERS, EVA_HEADS, EVA_FFN, EVA_PATCH, EVA_GRID)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1 + float("norm" in name and name.endswith("weight")))
    return model


def eva02_timm(directory: Path) -> Path:
    """As timm's repositories have it."""
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().clone() for name, value in eva02_model().state_dict().items()}
    state |= {"head.weight": torch.randn(16, EVA_WIDTH), "head.bias": torch.randn(16)}
    side = EVA_PATCH * EVA_GRID
    tree = {
        "architecture": "eva02_large_patch14_clip_336", "num_classes": 16, "num_features": EVA_WIDTH,
        "pretrained_cfg": {"input_size": [3, side, side], "mean": CLIP_MEAN, "std": CLIP_STD},
    }  # fmt: skip
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(tree))
    return directory


_NAMES = (
    ("attn.q_proj.bias", "attn.q_bias"), ("attn.v_proj.bias", "attn.v_bias"), ("attn.norm.", "attn.inner_attn_ln."),
    ("mlp.fc1_g.", "mlp.w1."), ("mlp.fc1_x.", "mlp.w2."), ("mlp.norm.", "mlp.ffn_ln."), ("mlp.fc2.", "mlp.w3."),
)  # fmt: skip


def eva02_author(name: str) -> str:
    """Return what its authors call what timm calls so."""
    for old, new in _NAMES:
        name = name.replace(old, new)
    return name


def eva02_authors(directory: Path, top: str = "visual.") -> Path:
    """As EVA-CLIP's authors have it: no config.json, rotary tables, and with ``top`` the text tower beside it."""
    directory.mkdir(parents=True, exist_ok=True)
    state: dict[str, Tensor] = {}
    for name, value in eva02_model().state_dict().items():
        state[top + eva02_author(name)] = value.detach().clone()
    tables = [f"{top}rope.freqs_cos", *(f"{top}blocks.{i}.attn.rope.freqs_sin" for i in range(EVA_LAYERS))]
    state |= {name: torch.randn(16, 64) for name in tables}
    if top:
        state |= {"text.positional_embedding": torch.randn(7, 8), "logit_scale": torch.tensor(4.6)}
        state |= {"visual.head.weight": torch.randn(16, EVA_WIDTH), "visual.head.bias": torch.randn(16)}
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


TOWERS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "dinov2_reg": ("dinov2", partial(publish, partial(dinov2, 4), **_DINOV2_FILES)),
    "dinov2_swiglu": ("dinov2", partial(publish, partial(dinov2, 2, swiglu=True))),
    "dinov2_plain": ("dinov2", partial(publish, partial(dinov2, 0))),
    "siglip2": ("siglip2", partial(publish, siglip2, **_NAFLEX_FILES)),
    "siglip2_vision": ("siglip2", partial(publish, siglip2_vision, **_NAFLEX_FILES)),
    "eva02_timm": ("eva02", eva02_timm),
    "eva02_authors": ("eva02", eva02_authors),
    "eva02_authors_tower": ("eva02", partial(eva02_authors, top="")),
}
"""What makes a checkpoint, and its family."""
