"""Tiny Llama 3.2 Visions: by Transformers, with the processor's file that published ones have."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from family_cases import CLIP_MEAN, CLIP_STD, made
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import MllamaConfig, MllamaForConditionalGeneration, PreTrainedModel
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)
from whole import Shown
from whole_source import TransformersSource, photographs, with_slots

from megavlm.config.schema import ModelConfig
from megavlm.data.media import plan_of

IMAGE, TILES, SIDE, PATCH = 113, 4, 28, 14
_TEXT: dict[str, Any] = {
    "vocab_size": 112, "hidden_size": 64, "intermediate_size": 88, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": 16384, "cross_attention_layers": [1, 3, 6],
    "pad_token_id": 118, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.15,
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
_VISION: dict[str, Any] = {
    "hidden_size": 40, "num_hidden_layers": 3, "num_global_layers": 2, "attention_heads": 4, "intermediate_size": 56,
    "image_size": SIDE, "patch_size": PATCH, "intermediate_layers_indices": [0, 2], "max_num_tiles": TILES,
}  # fmt: skip
FILES: dict[str, Any] = {
    "do_convert_rgb": True, "do_normalize": True, "do_pad": True, "do_rescale": True, "do_resize": True,
    "image_mean": CLIP_MEAN, "image_processor_type": "MllamaImageProcessor", "image_std": CLIP_STD,
    "max_image_tiles": TILES, "resample": 2, "rescale_factor": 1 / 255, "size": {"height": SIDE, "width": SIDE},
}  # fmt: skip
"""``preprocessor_config.json`` as meta-llama/Llama-3.2-11B-Vision-Instruct has it, for 28 pixels."""


def mllama(text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None) -> PreTrainedModel:
    """Return a model whose gates are open."""
    visual = {**_VISION, **(vision or {})}
    width = visual["hidden_size"] * (1 + len(visual["intermediate_layers_indices"]))
    config = MllamaConfig(
        vision_config=MllamaVisionConfig(**visual, vision_output_dim=width),
        text_config=MllamaTextConfig(**{**_TEXT, **(text or {})}), image_token_index=IMAGE,
    )  # fmt: skip
    model = made(MllamaForConditionalGeneration, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name and parameter.numel() == 1:
                parameter.fill_(0.3 + 0.1 * (len(name) % 5))
    _skip_all_rows(model)
    return model


def _skip_all_rows(model: Any) -> None:
    for layer in model.model.language_model.layers:
        if hasattr(layer, "cross_attn"):
            _skip_rows(layer)


def _skip_rows(layer: Any) -> None:
    """Have positions that see no picture skip attention too, as in the authors' own code.

    ``CrossAttention.forward`` of meta-llama/llama-models (models/llama3/multimodal/model.py) multiplies the attention's
    output by ``full_text_row_masked_out_mask``. Transformers multiplies the MLP's alone: there such positions attend to
    all pictures of the batch, those behind them too.
    """
    told: dict[str, Any] = {}

    def listen(_layer: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        told["mask"] = kwargs["full_text_row_masked_out_mask"]

    def skip(_attention: Any, _args: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        return output if told["mask"] is None else (told["mask"][:, 0] * output[0], output[1])

    layer.register_forward_pre_hook(listen, with_kwargs=True)
    layer.cross_attn.register_forward_hook(skip)


class MllamaSource(TransformersSource):
    """A class that is told which tokens see which tiles."""

    def __init__(self, **more: Any) -> None:
        super().__init__("mllama", functools.partial(mllama, **more), files=FILES, vocab=112, image=IMAGE)

    def shown(self, model: ModelConfig, sizes: list[tuple[int, int]], words: int) -> Shown:
        """Let Transformers' processor make tiles, and its functions the mask."""
        plan = plan_of(model)
        layouts = [plan.plan(width, height, len(sizes)) for width, height in sizes]
        ids = with_slots(layouts, self.image, self.vocab, words)
        heights = torch.tensor([[h, w] for w, h in sizes]) if sizes else torch.zeros(0, 2, dtype=torch.long)
        if not sizes:
            return Shown(ids, {}, torch.zeros(0, 3 * PATCH**2), heights, layouts)
        made = self.processor([photographs(sizes)], return_tensors="pt")
        tiles = made.pop("num_tiles")
        assert tiles[0] == [layout.grid[0] * layout.grid[1] for layout in layouts]
        spans = get_cross_attention_token_mask(ids.tolist(), self.image)
        mask = convert_sparse_cross_attention_mask_to_dense([spans], tiles, TILES, len(ids))
        patches = [_patches(one, layout.grid) for one, layout in zip(made["pixel_values"][0], layouts, strict=True)]
        given = {**made, "cross_attention_mask": torch.from_numpy(mask)}
        return Shown(ids, given, torch.cat(patches), heights, layouts)

    def loaded(self, directory: Path) -> PreTrainedModel:
        """Return the same, with the authors' line."""
        model = super().loaded(directory)
        _skip_all_rows(model)
        return model

    def features(self, sample: Shown) -> Tensor:
        """Return those of the tiles that hold a picture."""
        inner = self.model.model
        given = {k: sample.given[k] for k in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
        with torch.no_grad():
            found = inner.multi_modal_projector(inner.vision_model(**given).last_hidden_state)[0]
        held = [one[: layout.grid[0] * layout.grid[1]] for one, layout in zip(found, sample.layouts, strict=True)]
        return torch.cat([one.flatten(0, 1) for one in held])

    def logits(self, sample: Shown) -> Tensor:
        """Run the model once; what was answered sees what the end of the prompt does."""
        mask = sample.given.get("cross_attention_mask")
        given = dict(sample.given)
        if mask is not None and mask.size(1) < len(sample.ids):
            more = len(sample.ids) - mask.size(1)
            given["cross_attention_mask"] = torch.cat([mask, mask[:, -1:].expand(-1, more, -1, -1)], dim=1)
        return super().logits(Shown(sample.ids, given, sample.views, sample.sizes, sample.layouts))


def _patches(tiles: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return [P, F] of [T, 3, S, S]: those of the whole canvas, row by row."""
    rows, columns = grid
    canvas = tiles[: rows * columns].unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4)
    canvas = canvas.reshape(3, rows * SIDE, columns * SIDE)
    cut = canvas.unflatten(1, (-1, PATCH)).unflatten(3, (-1, PATCH))  # [3, R, p, C, p]
    return cut.permute(1, 3, 0, 2, 4).flatten(0, 1).flatten(1)


def save(directory: Path) -> Path:
    """Write it with its processor's file."""
    mllama().save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text(json.dumps(FILES))
    return directory


_HUB = {
    "lm_head": "language_model.lm_head", "model.language_model": "language_model.model",
    "model.vision_model": "vision_model", "model.multi_modal_projector": "multi_modal_projector",
}  # fmt: skip


def other_names(directory: Path) -> Path:
    """Write the weights by the other of the two namings: those of the hub, or of the modules."""
    save(directory)
    path = directory / "model.safetensors"
    state = load_file(path)
    back = {theirs: ours for ours, theirs in _HUB.items()}
    table = _HUB if any(name.startswith("lm_head") for name in state) else dict(sorted(back.items(), reverse=True))

    def renamed(name: str) -> str:
        old, new = next((old, new) for old, new in table.items() if name.startswith(old + "."))
        return new + name.removeprefix(old)

    save_file({renamed(name): value for name, value in state.items()}, path, metadata={"format": "pt"})
    return directory


MLLAMA = {"mllama": ("mllama", save), "mllama_other_names": ("mllama", other_names)}
"""Checkpoints: family, and what writes them."""
