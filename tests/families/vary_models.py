"""Tiny Varys, written out: Transformers has no class for them.

Written from the published definition: Ucas-HaoranWei/Vary-toy @ c6e40597, ``vary/model/vary_toy_qwen1_8.py`` (two
towers, two projections, features in the place of the tokens between the marks), ``vision_encoder/sam.py`` (SAM's
encoder with two convolutions), ``llm/qwen/modeling_qwen.py``, ``data/base_dataset.py`` (the pixels). CLIP is
Transformers' class, as it is there. There the towers run without gradient; here they have one, to be compared.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from family_cases import CLIP_MEAN, CLIP_STD
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel
from whole import Shown
from whole_source import TransformersSource, photographs, with_slots

from megavlm.config.schema import ModelConfig
from megavlm.data.media import plan_of

IMAGE, VOCAB = 119, 120
SMALL, LARGE = 16, 64
"""Sides of the two renderings: 4 x 4 features of either."""


class ChannelsNorm(nn.Module):
    """``LayerNorm2d``: over the channels of [N, C, h, w]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Return [N, C, h, w]."""
        x = (x - x.mean(1, keepdim=True)) / torch.sqrt(x.var(1, unbiased=False, keepdim=True) + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class SamAttention(nn.Module):
    """Attention with two tables of relative positions, one for rows and one for columns."""

    def __init__(self, width: int, heads: int, side: int) -> None:
        super().__init__()
        self.heads, self.side = heads, side
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, width // heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, width // heads))

    def forward(self, x: Tensor) -> Tensor:
        """Return [N, s, s, W]."""
        count, side = len(x), self.side
        q, k, v = self.qkv(x).reshape(count, side**2, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        apart = torch.arange(side)[:, None] - torch.arange(side)[None] + side - 1
        map_q = q.reshape(count, self.heads, side, side, -1)
        rows = torch.einsum("nahwd,hkd->nahwk", map_q, self.rel_pos_h[apart])
        columns = torch.einsum("nahwd,wkd->nahwk", map_q, self.rel_pos_w[apart])
        bias = (rows[..., :, None] + columns[..., None, :]).reshape(count, self.heads, side**2, side**2)
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias
        found = (scores.softmax(-1) @ v).transpose(1, 2).reshape(count, side, side, -1)
        return self.proj(found)


class SamBlock(nn.Module):
    """``Block``: in windows, filled with zeros at the right and below, or over the whole map."""

    def __init__(self, width: int, heads: int, inner: int, side: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = SamAttention(width, heads, window or side)
        self.mlp = nn.ModuleDict({"lin1": nn.Linear(width, inner), "lin2": nn.Linear(inner, width)})

    def forward(self, x: Tensor) -> Tensor:
        """Return [N, s, s, W]."""
        y = self.norm1(x)
        if w := self.window:
            count, side, more = len(y), y.shape[1], -y.shape[1] % w
            y = F.pad(y, (0, 0, 0, more, 0, more)).unflatten(1, (-1, w)).unflatten(3, (-1, w)).transpose(2, 3)
            many = y.shape[1]
            y = self.attn(y.flatten(0, 2)).unflatten(0, (count, many, many)).transpose(2, 3)
            y = y.flatten(1, 2).flatten(2, 3)[:, :side, :side]
        else:
            y = self.attn(y)
        x = x + y
        return x + self.mlp["lin2"](F.gelu(self.mlp["lin1"](self.norm2(x))))


class Sam(nn.Module):
    """``ImageEncoderViT``."""

    def __init__(
        self, width: int, heads: int, inner: int, layers: int, whole: tuple[int, ...], neck: int, image: int = LARGE,
        patch: int = 4, window: int = 3,
    ) -> None:  # fmt: skip
        super().__init__()
        side = image // patch
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        self.pos_embed = nn.Parameter(torch.zeros(1, side, side, width))
        self.blocks = nn.ModuleList(
            SamBlock(width, heads, inner, side, 0 if number in whole else window) for number in range(layers)
        )
        self.neck = nn.Sequential(
            nn.Conv2d(width, neck, 1, bias=False), ChannelsNorm(neck),
            nn.Conv2d(neck, neck, 3, padding=1, bias=False), ChannelsNorm(neck),
        )  # fmt: skip
        self.net_2 = nn.Conv2d(neck, 2 * neck, 3, 2, 1, bias=False)
        self.net_3 = nn.Conv2d(2 * neck, 4 * neck, 3, 2, 1, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return [N, C, h, w]."""
        x = self.patch_embed["proj"](pixels).permute(0, 2, 3, 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.net_3(self.net_2(self.neck(x.permute(0, 3, 1, 2))))


class RMSNorm(nn.Module):
    """Qwen v1's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Return the same shape."""
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class QwenMlp(nn.ModuleDict):
    """``QWenMLP``; w2 is the gate."""

    def __init__(self, embed: int, inner: int) -> None:
        super().__init__(
            {
                "w1": nn.Linear(embed, inner, bias=False), "w2": nn.Linear(embed, inner, bias=False),
                "c_proj": nn.Linear(inner, embed, bias=False),
            }
        )  # fmt: skip

    def forward(self, y: Tensor) -> Tensor:
        """Return the same shape."""
        found: Tensor = self["c_proj"](self["w1"](y) * F.silu(self["w2"](y)))
        return found


class QwenBlock(nn.Module):
    """``QWenBlock``; with LoRA on it, PEFT finds the linears by these names."""

    def __init__(self, embed: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = RMSNorm(embed), RMSNorm(embed)
        self.attn = nn.ModuleDict(
            {"c_attn": nn.Linear(embed, 3 * embed), "c_proj": nn.Linear(embed, embed, bias=False)}
        )
        self.mlp = QwenMlp(embed, inner)

    def forward(self, x: Tensor) -> Tensor:
        """Return [S, E]."""
        q, k, v = self.attn["c_attn"](self.ln_1(x)).unflatten(-1, (3, self.heads, -1)).permute(1, 2, 0, 3)
        width = q.shape[-1]
        angles = torch.arange(len(x))[:, None] * 10000.0 ** -(torch.arange(0, width, 2) / width)
        cos, sin = torch.cat([angles, angles], 1).cos(), torch.cat([angles, angles], 1).sin()
        q, k = (t * cos + torch.cat([-t[..., width // 2 :], t[..., : width // 2]], -1) * sin for t in (q, k))
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn["c_proj"](seen.transpose(0, 1).flatten(1))
        return x + self.mlp(self.ln_2(x))


class VaryModel(nn.Module):
    """``varyQwenModel``."""

    def __init__(self, clip: CLIPVisionConfig, sam: Sam, embed: int, layers: int, heads: int, inner: int, rows: int):
        super().__init__()
        self.wte = nn.Embedding(rows, embed)
        self.h = nn.ModuleList(QwenBlock(embed, heads, inner) for _ in range(layers))
        self.ln_f = RMSNorm(embed)
        self.vision_tower, self.vision_tower_high = CLIPVisionModel(clip), sam
        self.mm_projector = nn.Linear(clip.hidden_size, embed // 2)
        self.mm_projector_vary = nn.Linear(sam.net_3.out_channels, embed // 2)


class Vary(nn.Module):
    """``varyQwenForCausalLM``, for one sample at a time; sizes are those of a tiny one."""

    base_model_prefix = ""  # for PEFT, which looks for renamed weights in Transformers' classes

    def __init__(
        self, *, low_heads: int = 2, high_heads: int = 2, inner: int = 64, embed: int = 64, select: int = -2
    ) -> None:
        super().__init__()
        clip = CLIPVisionConfig(
            hidden_size=64 * low_heads, intermediate_size=inner, num_hidden_layers=3, num_attention_heads=low_heads,
            image_size=SMALL, patch_size=4, hidden_act="quick_gelu", projection_dim=16,
        )  # fmt: skip
        sam = Sam(64 * high_heads, high_heads, inner, 2, (1,), 16)
        self.transformer = VaryModel(clip, sam, embed, 4, 4, 96, VOCAB)
        self.lm_head = nn.Linear(embed, VOCAB, bias=False)
        self.select = select
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.dim() < 2 and name.endswith("weight"):
                    parameter.copy_(1 + noise * 0.1)
                elif parameter.dim() < 2 or "embed" in name or "rel_pos" in name:
                    parameter.copy_(noise * 0.3)
                else:
                    parameter.copy_(noise * parameter[0].numel() ** -0.5)
        self.settings = {
            "_name_or_path": "vary-toy", "architectures": ["varyQwenForCausalLM"], "attn_dropout_prob": 0.0,
            "bf16": True, "emb_dropout_prob": 0.0, "fp16": False, "fp32": False, "freeze_vision_tower": True,
            "hidden_size": embed, "im_end_token": IMAGE - 1, "im_patch_token": IMAGE, "im_start_token": IMAGE - 2,
            "image_token_len": 16, "initializer_range": 0.02, "intermediate_size": 192, "kv_channels": 16,
            "layer_norm_epsilon": 1e-6, "max_position_embeddings": 8192, "model_type": "vary", "no_bias": True,
            "num_attention_heads": 4, "num_hidden_layers": 4, "rotary_emb_base": 10000, "rotary_pct": 1.0,
            "scale_attn_weights": True, "seq_length": 8192, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
            "transformers_version": "4.32.1", "use_cache": True, "use_dynamic_ntk": True, "use_flash_attn": True,
            "use_im_start_end": True, "use_logn_attn": True, "vision_select_layer": select,
            "vision_tower": "/cache/vit-large-patch14/vit-large-patch14/", "vocab_size": VOCAB,
        }  # fmt: skip
        self.config = SimpleNamespace(model_type="vary", tie_word_embeddings=False)  # for PEFT

    def get_image_features(self, pixel_values: Tensor, high_res_pixel_values: Tensor) -> Tensor:
        """Return [N, P, E] of [N, 3, 16, 16] and [N, 3, 64, 64]."""
        own = self.transformer
        states = own.vision_tower(pixel_values, output_hidden_states=True).hidden_states
        high = own.vision_tower_high(high_res_pixel_values).flatten(2).permute(0, 2, 1)
        return torch.cat([own.mm_projector(states[self.select][:, 1:]), own.mm_projector_vary(high)], dim=-1)

    def forward(self, input_ids: Tensor, **given: Any) -> SimpleNamespace:
        """Return ``logits`` [1, S, V]; an answer may have the token of a slot, which then is a word like any other."""
        x = self.transformer.wte(input_ids[0])
        if (pixels := given.get("pixel_values")) is not None and len(pixels):
            features = self.get_image_features(pixels, given["high_res_pixel_values"]).flatten(0, 1)
            slots = (input_ids[0] == IMAGE).nonzero().squeeze(1)[: len(features)]
            assert len(slots) == len(features)
            x = x.index_copy(0, slots, features)
        for block in self.transformer.h:
            x = block(x)
        return SimpleNamespace(logits=self.lm_head(self.transformer.ln_f(x))[None])

    @torch.no_grad()
    def generate(self, input_ids: Tensor, *, max_new_tokens: int, **given: Any) -> Tensor:
        """Choose the best token, and begin anew: no cache."""
        for _ in range(max_new_tokens):
            input_ids = torch.cat([input_ids, self(input_ids, **given).logits[:, -1:].argmax(-1)], 1)
        return input_ids

    def prepare_inputs_for_generation(self, **given: Any) -> dict[str, Any]:
        """Return what :meth:`forward` takes; PEFT asks it of every causal language model."""
        return given

    def save_pretrained(self, directory: Path) -> Path:
        """Write it with the keys and names of its trainer."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(self.settings, indent=2))
        state = {named(name): value.contiguous() for name, value in self.state_dict().items()}
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
        return directory


def named(name: str) -> str:
    """Return what a checkpoint calls a tensor: Transformers 5 has no ``vision_model`` in CLIP's names."""
    top = "transformer.vision_tower."
    own = name.removeprefix(top).removeprefix("vision_model.")
    return f"{top}vision_model.{own}" if name.startswith(top) else name


class VarySource(TransformersSource):
    """One of these as a source of parity."""

    style = ""

    def __init__(self, **keys: Any) -> None:
        super().__init__("vary", partial(Vary, **keys), vocab=VOCAB, image=IMAGE)  # type: ignore[arg-type]

    def save(self, directory: Path) -> None:
        """Write it."""
        self.model.save_pretrained(directory)

    def shown(self, model: ModelConfig, sizes: list[tuple[int, int]], words: int) -> Shown:
        """Make both renderings, as ``BaseDataset.image_processor`` does where nothing else is asked for."""
        plan = plan_of(model)
        layouts = [plan.plan(width, height, len(sizes)) for width, height in sizes]
        ids = with_slots(layouts, self.image, self.vocab, words)
        if not sizes:
            return Shown(ids, {}, torch.zeros(0, *plan.row), torch.zeros(0, 2, dtype=torch.long), layouts)
        low, high = renderings(photographs(sizes), SMALL, LARGE)
        pixels = torch.cat([low.flatten(1), high.flatten(1)], dim=1)
        given = {"pixel_values": low, "high_res_pixel_values": high}
        return Shown(ids, given, pixels, torch.tensor([[h, w] for w, h in sizes]), layouts)

    def gradients(self) -> dict[str, Tensor]:
        """Return those that there are."""
        return {named(name): p.grad for name, p in self.model.named_parameters() if p.grad is not None}


def renderings(images: list[Image.Image], small: int, large: int) -> tuple[Tensor, Tensor]:
    """Return [N, 3, small, small] of ``CLIPImageProcessor`` and [N, 3, large, large] of ``BlipImageEvalProcessor``."""
    square = {"height": small, "width": small}
    processor: Any = CLIPImageProcessorPil(
        size={"shortest_edge": small}, crop_size=square, image_mean=CLIP_MEAN, image_std=CLIP_STD
    )
    squares = [one.resize((large, large), Image.Resampling.BICUBIC) for one in images]
    high = torch.stack([torch.from_numpy(np.array(one)).permute(2, 0, 1) / 255 for one in squares])
    mean, std = (torch.tensor(one).view(3, 1, 1) for one in (CLIP_MEAN, CLIP_STD))
    return torch.as_tensor(processor(images, return_tensors="pt")["pixel_values"]), (high - mean) / std


def _saved(**keys: Any) -> Callable[[Path], Path]:
    return lambda directory: Vary(**keys).save_pretrained(directory)


VARY: dict[str, tuple[str, Callable[[Path], Path]]] = {"vary": ("vary", _saved())}
"""What makes a checkpoint, by name, and its family."""
