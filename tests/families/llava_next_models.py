"""Tiny LLaVA-1.6 and LLaVA-OneVision: by Transformers, with the processor files that published ones have."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from family_cases import _TEXT, _VISION, CLIP_MEAN, CLIP_STD, load, made
from safetensors.torch import save_file
from tokenizer_files import write_llava, write_qwen2
from tokenizers import AddedToken, Tokenizer
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    SiglipVisionConfig,
)

from megavlm.checkpoint.hf.given import make_model
from megavlm.families.known import FAMILIES
from megavlm.weights.source import Source

SIDE = 28
NEXT_PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
ONEVISION_PINPOINTS = [[SIDE * rows, SIDE * columns] for rows in (1, 2, 3) for columns in (1, 2, 3)]
IMAGE, VIDEO = 119, 118


def next_files() -> dict[str, Any]:
    """``preprocessor_config.json`` as llava-hf/llava-v1.6-mistral-7b-hf has it, for tiles of 28 pixels."""
    return {
        "aspect_ratio_setting": "anyres", "crop_size": {"height": SIDE, "width": SIDE}, "do_center_crop": True,
        "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True,
        "image_grid_pinpoints": NEXT_PINPOINTS, "image_mean": CLIP_MEAN, "image_processor_type":
        "LlavaNextImageProcessor", "image_std": CLIP_STD, "resample": 3, "rescale_factor": 1 / 255,
        "size": {"shortest_edge": SIDE},
    }  # fmt: skip


def onevision_files() -> dict[str, Any]:
    """The same as llava-hf/llava-onevision-qwen2-7b-ov-hf has it."""
    return {
        "do_convert_rgb": True, "do_normalize": True, "do_pad": True, "do_rescale": True, "do_resize": True,
        "image_grid_pinpoints": ONEVISION_PINPOINTS, "image_mean": [0.5] * 3, "image_processor_type":
        "LlavaOnevisionImageProcessor", "image_std": [0.5] * 3, "resample": 3, "rescale_factor": 1 / 255,
        "size": {"height": SIDE, "width": SIDE},
    }  # fmt: skip


def _publish(model: PreTrainedModel, files: dict[str, Any], directory: Path, **keys: Any) -> None:
    type(model).save_pretrained(model, directory, **keys)
    (Path(directory) / "preprocessor_config.json").write_text(json.dumps(files, indent=2))


def llava_next(
    text: PretrainedConfig | None = None, vision: PretrainedConfig | None = None, **keys: Any
) -> PreTrainedModel:
    """LLaVA-1.6: CLIP, the layer before the last, and Llama."""
    config = LlavaNextConfig(
        vision_config=vision or CLIPVisionConfig(**_VISION),
        text_config=text or LlamaConfig(**_TEXT, rms_norm_eps=1e-5),
        image_token_index=IMAGE, image_grid_pinpoints=NEXT_PINPOINTS, image_seq_length=16, **keys,
    )  # fmt: skip
    one = made(LlavaNextForConditionalGeneration, config)
    one.save_pretrained = functools.partial(_publish, one, next_files())  # type: ignore[method-assign]
    return one


def llava_next_mistral() -> PreTrainedModel:
    """LLaVA-1.6 on Mistral without a window, as v0.2."""
    return llava_next(MistralConfig(**_TEXT, sliding_window=None, head_dim=16))


def llava_onevision(
    text: PretrainedConfig | None = None, vision: PretrainedConfig | None = None, *, tied: bool = False
) -> PreTrainedModel:
    """LLaVA-OneVision: SigLIP's last layer, Qwen2, at most two tiles' features of a picture."""
    config = LlavaOnevisionConfig(
        vision_config=vision or SiglipVisionConfig(**_VISION, vision_use_head=False),
        text_config=text or Qwen2Config(**_TEXT, tie_word_embeddings=tied),
        image_token_index=IMAGE, video_token_index=VIDEO, image_grid_pinpoints=ONEVISION_PINPOINTS,
        vision_aspect_ratio="anyres_max_2", tie_word_embeddings=tied,
    )  # fmt: skip
    one = made(LlavaOnevisionForConditionalGeneration, config)
    one.save_pretrained = functools.partial(_publish, one, onevision_files())  # type: ignore[method-assign]
    return one


def tiles_answers(name: str, directory: Path) -> Path:
    """One of both with a tokenizer, and all that Transformers' processor asks for."""
    directory.mkdir()
    if name == "next":
        write_llava(directory)
        model, image = llava_next(LlamaConfig(**{**_TEXT, "vocab_size": 448, "eos_token_id": 2})), 329
    else:
        path = write_qwen2(directory)
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<image>", "<video>")])
        tokenizer.save(str(path))
        image, rows = tokenizer.token_to_id("<image>"), tokenizer.get_vocab_size()
        model = llava_onevision(Qwen2Config(**{**_TEXT, "vocab_size": rows, "eos_token_id": 2}))
        model.config.video_token_index = image + 1
    model.config.image_token_index = image
    model.save_pretrained(directory)
    family = FAMILIES[f"llava_{name}"]
    recipe_model = make_model(family.branches(Source(directory)), str(directory))
    (directory / "processor_config.json").write_text(json.dumps(family.processor(recipe_model, "<image>")))
    return directory


def saved(model: Callable[[], PreTrainedModel]) -> Callable[[Path], Path]:
    """Return what saves a model of Transformers."""

    def save(directory: Path) -> Path:
        model().save_pretrained(directory)
        return directory

    return save


def llava_next_hub(directory: Path) -> Path:
    """LLaVA-1.6 with the tower's names as published, before Transformers 5."""
    llava_next().save_pretrained(directory)
    state = {
        name.replace("vision_tower.", "vision_tower.vision_model."): value for name, value in load(directory).items()
    }
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def llava_next_modules(directory: Path) -> Path:
    """LLaVA-1.6 by the names of Transformers' modules, in bf16."""
    one = llava_next()
    one.save_pretrained(directory)
    state = {name: value.to(torch.bfloat16).contiguous() for name, value in one.state_dict().items()}
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


LLAVA_TILES: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "llava_next": ("llava_next", saved(llava_next)),
    "llava_next_mistral": ("llava_next", saved(llava_next_mistral)),
    "llava_next_hub": ("llava_next", llava_next_hub),
    "llava_next_modules": ("llava_next", llava_next_modules),
    "llava_onevision": ("llava_onevision", saved(llava_onevision)),
    "llava_onevision_tied": ("llava_onevision", saved(functools.partial(llava_onevision, tied=True))),
}
"""Families of checkpoints, and what makes them, by name."""
