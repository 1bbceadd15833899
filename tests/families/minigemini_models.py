"""Tiny MiniGeminis in their authors' layout, written out: two towers, patch-info mining, a language model.

Source: dvlab-research/MGM @ 769820cb (``mgm/model/mgm_arch.py``: ``encode_images``, ``unified_resampler``;
``mgm/model/multimodal_encoder/openclip_encoder.py``: ``backbone``; ``mgm/train/train.py``: ``_sample_item``, which
makes the pixels). CLIP and the language models are Transformers' classes, ConvNeXt is timm's module by its published
names, here as a plain one (arXiv 2201.03545).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from family_cases import _VISION, CLIP_MEAN, CLIP_STD
from spliced_models import Parts, Places, Spliced, SplicedSource, filled, padded, text_of
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, PretrainedConfig
from whole import Shown
from whole_source import photographs, with_slots

from megavlm.config.schema import ModelConfig
from megavlm.data.media import plan_of

LOW, EMBED, SIDE = _VISION["hidden_size"], 64, _VISION["image_size"]
DEPTHS, WIDTHS = (1, 2, 1), (16, 24, 40)
HIGH, HIGH_HD = 64, 128
"""Sides of what ConvNeXt sees: two features along a side of each of CLIP's 4 x 4 patches."""
_NAME = "model_zoo/OpenAI/openclip-convnext-tiny"


class ChannelsNorm(nn.LayerNorm):
    """LayerNorm over the channels of [N, C, h, w]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    """timm's ``ConvNeXtBlock``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(width))
        self.conv_dw = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv_dw(x).permute(0, 2, 3, 1))
        y = self.gamma * self.mlp.fc2(F.gelu(self.mlp.fc1(y)))
        return x + y.permute(0, 3, 1, 2)


class OpenCLIPTower(nn.Module):
    """``OpenCLIPVisionTower``: stem and stages of a ConvNeXt, whose maps are stretched to the first one's."""

    def __init__(self, depths: Sequence[int], widths: Sequence[int]) -> None:
        super().__init__()
        self.vision_stem = nn.Sequential(nn.Conv2d(3, widths[0], 4, 4), ChannelsNorm(widths[0], eps=1e-6))
        self.vision_stages = nn.ModuleList()
        for number, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            stage = nn.Module()
            if number:
                before = widths[number - 1]
                stage.downsample = nn.Sequential(ChannelsNorm(before, eps=1e-6), nn.Conv2d(before, width, 2, 2))
            stage.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
            self.vision_stages.append(stage)

    def forward(self, x: Tensor) -> Tensor:
        x, maps = self.vision_stem(x), []
        for stage in self.vision_stages:
            x = stage.blocks(stage.downsample(x) if hasattr(stage, "downsample") else x)
            maps.append(x)
        size = maps[0].shape[-2:]
        others = [F.interpolate(one.float(), size=size, mode="bilinear", align_corners=False) for one in maps[1:]]
        return torch.cat([maps[0], *others], dim=1)


class Mining(nn.Module):
    """The three ``vlm_uni_*`` projectors and ``mm_projector``."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        for name, size in (("query", LOW), ("aux", sum(WIDTHS)), ("val", sum(WIDTHS))):
            self.add_module(f"vlm_uni_{name}_projector", nn.Sequential(nn.LayerNorm(size), nn.Linear(size, LOW)))
        layers: list[nn.Module] = [nn.Linear(LOW, EMBED)]
        for _ in range(1, depth):
            layers += [nn.GELU(), nn.Linear(EMBED, EMBED)]
        self.mm_projector = nn.Sequential(*layers)

    def mined(self, images: Tensor, images_aux: Tensor) -> Tensor:
        """``unified_resampler``: what each of [N, P, L] finds in its square of [N, C, H, W]."""
        count = int(images.shape[1] ** 0.5)
        size = images_aux.shape[-1] // count
        x = images_aux.permute(0, 2, 3, 1)
        x = x.reshape(len(x), count, size, count, size, x.shape[-1]).permute(0, 1, 3, 2, 4, 5)
        x = x.reshape(len(x), count**2, size**2, x.shape[-1])
        query, key = self.vlm_uni_query_projector(images), self.vlm_uni_aux_projector(x)
        value = self.vlm_uni_val_projector(x)
        scores = query[:, :, None] @ (key.transpose(-1, -2) / key.shape[-1] ** 0.5)
        return (scores.softmax(-1) @ value).mean(2)


class MiniGemini(Spliced):
    """A whole model; its pictures are the pixels of the larger rendering."""

    def __init__(self, parts: Parts, grid: int = 1, whole: bool = False, depths: Sequence[int] = DEPTHS) -> None:
        super().__init__(parts)
        self.grid, self.whole = grid, whole
        aux = filled(OpenCLIPTower(depths, WIDTHS), 5)
        self._kept.append(aux)
        self._put("model.vision_tower_aux", aux)
        for name, child in parts.connector.named_children():
            self._put(f"model.{name}", child)

    def _put(self, place: str, module: nn.Module) -> None:
        if place != "model.mining":  # whose children lie beside each other
            super()._put(place, module)

    def state_dict(self, *words: Any, **keys: Any) -> Any:
        """Name experts one by one, as Transformers' files do."""
        return split_experts(super().state_dict(*words, **keys))

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """``encode_images`` of pixels [N, 3, H, H]."""
        tower, mining, aux, grid = self._kept[0], self._kept[1], self._kept[3], self.grid
        raw, seen = aux(pixel_values), _smaller(pixel_values, grid * SIDE)
        many, number = grid > 1, len(pixel_values)
        images = seen
        if many:  # train.py
            images = (
                seen.reshape(number, 3, grid, SIDE, grid, SIDE).permute(0, 2, 4, 1, 3, 5).reshape(-1, 3, SIDE, SIDE)
            )
        features = tower(images, output_hidden_states=True).hidden_states[-2][:, 1:]
        tiles = raw
        if many:
            tiles = raw.reshape(*raw.shape[:2], grid, raw.shape[-2] // grid, grid, raw.shape[-1] // grid)
            tiles = tiles.permute(0, 2, 4, 1, 3, 5).flatten(1, 2).flatten(0, 1)
        found = features + mining.mined(features, tiles)
        if many:
            found = found.reshape(number, -1, found.shape[-1])
        if self.whole:
            first = tower(_smaller(seen, SIDE), output_hidden_states=True).hidden_states[-2][:, 1:]
            small = F.interpolate(raw.float(), scale_factor=1 / grid, mode="bilinear", align_corners=False)
            found = torch.cat([first + mining.mined(first, small), found], dim=1)
        return mining.mm_projector(found) * self.parts.scale


def split_experts(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return Mixtral's tensors by their published names."""
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        top, _, last = name.rpartition(".mlp.")
        if last == "gate.weight":
            out[f"{top}.block_sparse_moe.gate.weight"] = value
        elif last == "experts.gate_up_proj":
            for number, both in enumerate(value):
                for own, half in zip(("w1", "w3"), both.chunk(2), strict=True):
                    out[f"{top}.block_sparse_moe.experts.{number}.{own}.weight"] = half
        elif last == "experts.down_proj":
            for number, one in enumerate(value):
                out[f"{top}.block_sparse_moe.experts.{number}.w2.weight"] = one
        else:
            out[name] = value
    return out


def _smaller(x: Tensor, side: int) -> Tensor:
    return F.interpolate(x, size=[side, side], mode="bilinear", align_corners=False)


_PLACES = Places("model.vision_tower.vision_tower", "model.mining", "", "model.vision_tower.vision_tower.vision_model.")
_CLASSES = {
    "llama": ("MGMLlamaForCausalLM", "mgm"), "gemma": ("MGMGemmaForCausalLM", "mgm_gemma"),
    "mixtral": ("MGMMixtralForCausalLM", "mgm_mixtral"),
}  # fmt: skip
_TEXT: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "gemma": {"num_key_value_heads": 1, "head_dim": 16, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4, "sliding_window": None, "rope_theta": 1e6},
}


def parts(
    kind: str = "llama", *, hd: bool = False, aspect: str = "pad", old: bool = False, depth: int = 2,
    vision_keys: dict[str, Any] | None = None, text_keys: dict[str, Any] | None = None, **keys: Any,
) -> Parts:  # fmt: skip
    """What a MiniGemini is made of; ``old``: as before its name was MGM."""
    vision = CLIPVisionConfig(**_VISION | (vision_keys or {}))
    architecture, model_type = _CLASSES[kind]
    told = {
        "architectures": [architecture], "model_type": model_type.replace("mgm", "mini_gemini") if old else model_type,
        "freeze_mm_mlp_adapter": False, "image_aspect_ratio": aspect, "image_global": hd, "image_grid": 2 if hd else 1,
        "image_grid_pinpoints": None, "image_size_aux": HIGH_HD if hd else HIGH, "mm_hidden_size": LOW,
        "mm_hidden_size_aux": sum(WIDTHS), "mm_projector_lr": None, "mm_projector_type": f"mlp{depth}x_gelu",
        "mm_use_im_patch_token": False, "mm_use_im_start_end": False, "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2, "mm_vision_tower": "model_zoo/OpenAI/clip-tiny", "mm_vision_tower_aux": _NAME,
        "optimize_vision_tower": False, "optimize_vision_tower_aux": False, "tokenizer_model_max_length": 2048,
        "tokenizer_padding_side": "right", "torch_dtype": "float32", "tune_mm_mlp_adapter": False, "use_mm_proj": True,
        **keys,
    }  # fmt: skip

    def config(text: PretrainedConfig, _: PretrainedConfig) -> dict[str, Any]:
        return {**text.to_dict(), **told}

    text = text_of(kind, **{**_TEXT[kind], **(text_keys or {})})
    return Parts(
        text, vision, filled(Mining(depth)), _PLACES, config, files={"vision_config.json": vision.to_dict()},
        scale=text.hidden_size**0.5 if kind == "gemma" else 1.0, keeps_copy=kind == "mixtral",
    )  # fmt: skip


def minigemini(*words: str, hd: bool = False, **keys: Any) -> MiniGemini:
    """Return a model."""
    return MiniGemini(parts(*words, hd=hd, **keys), 2 if hd else 1, hd)


class MiniGeminiSource(SplicedSource):
    """One of these as a source of parity."""

    def __init__(self, *words: str, hd: bool = False, **keys: Any) -> None:
        super().__init__(
            "minigemini", partial(parts, *words, hd=hd, **keys), "pad", "published", HIGH_HD if hd else HIGH
        )
        self._make: Any = partial(minigemini, *words, hd=hd, **keys)

    def shown(self, model: ModelConfig, sizes: list[tuple[int, int]], words: int) -> Shown:
        """Pad, and let CLIP's processor make the larger rendering, as ``_sample_item`` does."""
        plan = plan_of(model)
        layouts = [plan.plan(width, height, len(sizes)) for width, height in sizes]
        ids = with_slots(layouts, self.image, self.vocab, words)
        if not sizes:
            return Shown(ids, {}, torch.zeros(0, 3, self.side, self.side), torch.zeros(0, 2, dtype=torch.long), layouts)
        processor: Any = CLIPImageProcessorPil(
            size={"shortest_edge": self.side}, crop_size={"height": self.side, "width": self.side},
            image_mean=CLIP_MEAN, image_std=CLIP_STD,
        )  # fmt: skip
        images = [padded(one, CLIP_MEAN) for one in photographs(sizes)]
        pixels = torch.as_tensor(processor(images, return_tensors="pt")["pixel_values"])
        return Shown(ids, {"pixel_values": pixels}, pixels, torch.tensor([[h, w] for w, h in sizes]), layouts)

    def gradients(self) -> dict[str, Tensor]:
        """Return those that there are."""
        return split_experts(super().gradients())


def _saved(*words: str, **keys: Any) -> Callable[[Path], Path]:
    def save(path: Path) -> Path:
        path.mkdir(parents=True, exist_ok=True)
        return minigemini(*words, **keys).save_pretrained(path)

    return save


MINIGEMINI: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "minigemini": ("minigemini", _saved()),
    "minigemini_gemma": ("minigemini", _saved("gemma", old=True)),
    "minigemini_hd": ("minigemini", _saved(hd=True, depth=1)),
    "minigemini_mixtral": ("minigemini", _saved("mixtral", aspect="square")),
}
"""Checkpoints, with their family."""
