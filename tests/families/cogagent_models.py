"""Tiny CogAgents, written out: Transformers has no class for them.

Written from the published definition: ``modeling_cogagent.py`` and ``cross_visual.py`` beside the weights of
THUDM/cogagent-chat-hf (``CogAgentModel``, ``CrossAttention``, ``CrossVisionModel``, ``Eva2LargeEncoder``; a copy of the
first: github.com/aredden/faster-cogagent-chat @ 9bdc9cb8, ``cogagent_model/``), and the authors' trainer's
``utils/models/{cogagent_model,eva_clip_L_hf}.py`` (github.com/THUDM/CogVLM @ f7283b2c). The parts that it has in common
with CogVLM are :mod:`cogvlm_models`', under the published names. A sample without pictures, and one with two, which
the published code does not take: no layer looks at features, or all look at those of both.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from cogvlm_models import (
    IMAGE,
    LAYERS,
    MEAN,
    PATCH,
    SIDE,
    STD,
    VOCAB,
    CogSource,
    CogVLM,
    Eyes,
    common_settings,
    eyes_settings,
)
from expert_reference import CogLanguage, expert_mask, positions
from PIL import Image
from torch import Tensor, nn
from whole import Shown
from whole_source import photographs, with_slots

from megavlm.config.schema import ModelConfig
from megavlm.data.media import plan_of

LARGE = 2 * SIDE
"""Side of the second view, in pixels."""
SMALL_ROW = 3 * SIDE**2


class FineAttention(nn.Module):
    """EVA02's, under its authors' names: no bias on keys, angles of rows and columns, a norm behind the heads."""

    def __init__(self, width: int, heads: int, grid: int) -> None:
        super().__init__()
        self.heads, self.grid = heads, grid
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.inner_attn_ln = nn.LayerNorm(width, eps=1e-6)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return [N, T, W]; the first token is turned by nothing."""
        query, key, value = self.q_proj(x) + self.q_bias, self.k_proj(x), self.v_proj(x) + self.v_bias
        query, key, value = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (query, key, value))
        seen = F.scaled_dot_product_attention(self._turned(query), self._turned(key), value)
        return self.proj(self.inner_attn_ln(seen.transpose(1, 2).flatten(2)))

    def _turned(self, x: Tensor) -> Tensor:
        half = x.size(-1) // 2  # channels that rows turn, and columns
        bands = 1.0 / 10000.0 ** (torch.arange(0, half, 2).float() / half)
        angles = torch.outer(torch.arange(self.grid).float() / self.grid * 16, bands).repeat_interleave(2, dim=-1)
        places = [(row, column) for row in range(self.grid) for column in range(self.grid)]
        turn = torch.stack([torch.cat([angles[row], angles[column]]) for row, column in places])
        rest = x[:, :, 1:]
        pairs = rest.unflatten(-1, (-1, 2))
        other = torch.stack((-pairs[..., 1], pairs[..., 0]), dim=-1).flatten(-2)
        return torch.cat([x[:, :, :1], rest * turn.cos() + other * turn.sin()], dim=2)


class FineMLP(nn.Module):
    """SwiGLU with a norm inside."""

    def __init__(self, width: int, ffn: int) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(width, ffn), nn.Linear(width, ffn), nn.Linear(ffn, width)
        self.ffn_ln = nn.LayerNorm(ffn, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Return [N, T, W]."""
        found: Tensor = self.w3(self.ffn_ln(F.silu(self.w1(x)) * self.w2(x)))
        return found


class FineBlock(nn.Module):
    """One layer of the second tower."""

    def __init__(self, width: int, heads: int, ffn: int, grid: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = FineAttention(width, heads, grid), FineMLP(width, ffn)

    def forward(self, x: Tensor) -> Tensor:
        """Return [N, T, W]."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class FineTower(nn.Module):
    """``EVAVisionTransformer``, of which all blocks but the last run."""

    def __init__(self, width: int, blocks: int, heads: int, ffn: int) -> None:
        super().__init__()
        grid = LARGE // PATCH
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, grid**2 + 1, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, PATCH, PATCH)})
        self.blocks = nn.ModuleList(FineBlock(width, heads, ffn, grid) for _ in range(blocks))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, 12)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return [N, P, W]."""
        x = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks[:-1]:
            x = block(x)
        return x[:, 1:]


class FineEyes(nn.Module):
    """``CrossVisionModel``."""

    def __init__(self, width: int, blocks: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.vit = nn.ModuleDict({"model": FineTower(width, blocks, heads, ffn)})
        self.pos_embed = nn.Parameter(torch.zeros((LARGE // PATCH) ** 2, width))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return [N, F, C]."""
        found: Tensor = self.vit["model"](pixels) + self.pos_embed
        return found


class AgentEyes(Eyes):
    """``EVA2CLIPModel`` with a table."""

    def __init__(self, width: int, layers: int, heads: int, tower: int, embed: int, inner: int) -> None:
        super().__init__(width, layers, heads, tower, embed, inner)
        self.pos_embed = nn.Parameter(torch.zeros((SIDE // PATCH) ** 2, width))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return [N, P + 2, E]."""
        x = self.patch_embedding(pixels)
        for layer in self.transformer["layers"]:
            x = layer(x)
        x = self.linear_proj(x[:, 1:] + self.pos_embed)
        return torch.cat([self.boi.expand(len(x), -1, -1), x, self.eoi.expand(len(x), -1, -1)], dim=1)


class CogAgent(CogVLM):
    """``CogAgentForCausalLM``, for one sample at a time."""

    files = ("modeling_cogagent.py", "visual.py", "cross_visual.py", "configuration_cogagent.py", "util.py")

    def __init__(
        self, *, heads: int = 4, inner: int = 96, width: int = 48, fine: int = 128, version: str = "chat"
    ) -> None:
        nn.Module.__init__(self)
        embed, ffn, layers = 64, 96, LAYERS
        text = CogLanguage(VOCAB, embed, layers, 4, ffn, (fine, fine))
        self.model, self.lm_head = text.model, text.lm_head
        self.model.vision = AgentEyes(width, 3, heads, inner, embed, ffn)
        self.model.cross_vision = FineEyes(fine, 3, fine // 64, int(fine * 2.6667))
        self.fill()
        self.settings = {
            "_name_or_path": "THUDM/cogagent-chat-hf", "architectures": ["CogAgentForCausalLM"],
            "auto_map": {
                "AutoConfig": "configuration_cogagent.CogAgentConfig",
                "AutoModelForCausalLM": "modeling_cogagent.CogAgentForCausalLM",
            },
            **common_settings(embed, ffn, layers, version),
            "cross_compute_hidden_size": fine, "cross_hidden_size": fine, "cross_image_size": LARGE,
            "vision_config": eyes_settings(width, heads, inner),
        }  # fmt: skip
        self.config = SimpleNamespace(model_type="cogagent", tie_word_embeddings=False)

    def encode(self, views: Tensor) -> tuple[Tensor, Tensor]:
        """Return [N, P + 2, E] and [N, F, C] of both views of pictures, in one row of numbers."""
        small, large = views[:, :SMALL_ROW], views[:, SMALL_ROW:]
        low: Tensor = self.model.vision(small.view(-1, 3, SIDE, SIDE))
        return low, self.model.cross_vision(large.view(-1, 3, LARGE, LARGE))

    def forward(self, input_ids: Tensor, pixel_values: Tensor | None = None, slots: int = 0) -> Tensor:
        """Return [S, V]; the first ``slots`` tokens of a picture are pictures, those of an answer are words."""
        places = (input_ids == IMAGE).nonzero().squeeze(1)[:slots]
        types = torch.zeros_like(input_ids).index_fill(0, places, 1)
        x, beside = self.model.embed_tokens(input_ids), None
        if slots:
            assert pixel_values is not None
            low, fine = self.encode(pixel_values)
            x, beside = x.index_copy(0, places, low.flatten(0, 1)), fine.flatten(0, 1)
        mask, at = expert_mask(types), positions(types)
        for layer in self.model.layers:
            x = layer(x, mask, at, beside)
        found: Tensor = self.lm_head(self.model.norm(x))
        return found


class AgentSource(CogSource):
    """One of these models, for :mod:`whole_source`."""

    model: CogAgent

    def shown(self, model: ModelConfig, sizes: list[tuple[int, int]], words: int) -> Shown:
        """Squash pictures as the published transforms do, to both sides."""
        plan = plan_of(model)
        layouts = [plan.plan(width, height, len(sizes)) for width, height in sizes]
        ids = with_slots(layouts, IMAGE, VOCAB, words)
        pixels = torch.zeros(0, *plan.row)
        mean, std = (torch.tensor(one).view(3, 1, 1) for one in (MEAN, STD))
        if sizes:
            rows = []
            for picture in photographs(sizes):
                squares = [picture.resize((side, side), Image.Resampling.BICUBIC) for side in (SIDE, LARGE)]
                views = [torch.from_numpy(np.array(one)).permute(2, 0, 1) / 255 for one in squares]
                rows.append(torch.cat([((one - mean) / std).flatten() for one in views]))
            pixels = torch.stack(rows)
        heights = torch.tensor([[h, w] for w, h in sizes]) if sizes else torch.zeros(0, 2, dtype=torch.long)
        given: dict[str, Any] = {"pixel_values": pixels}
        return Shown(ids, given, pixels, heights, layouts)

    def features(self, sample: Shown) -> Tensor:
        """Encode what stands for slots; the finer view's features show in the logits alone."""
        with torch.no_grad():
            return self.model.encode(sample.views)[0].flatten(0, 1)


def _saved(make: Callable[[], CogAgent]) -> Callable[[Path], Path]:
    return lambda directory: make().save_pretrained(directory)


COGAGENT: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "cogagent": ("cogagent", _saved(CogAgent)),
    "cogagent_vqa": ("cogagent", _saved(lambda: CogAgent(version="chat_old"))),
}
"""What makes a checkpoint, by name, and its family."""
