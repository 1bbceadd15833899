"""EVA02's tower in plain torch, with timm's names: written from its definition, one picture after the other.

Source: arXiv 2303.11331 (section 2.1) and huggingface/pytorch-image-models, ``timm/models/eva.py``: ``Eva`` as
``eva02_large_patch14_clip_336`` builds it (``qkv_fused=False, swiglu_mlp, scale_mlp, scale_attn_inner,
use_rot_pos_emb, ref_feat_shape=(16, 16)``). ``test_towers.py`` compares the two where timm is installed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Eva02(nn.Module):
    """A tower of ``depth`` blocks with one norm behind them."""

    def __init__(
        self, width: int, depth: int, heads: int, ffn: int, patch: int, grid: int, reference: int = 16
    ) -> None:
        super().__init__()
        self.heads, self.grid, self.reference = heads, grid, reference
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, grid * grid + 1, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        self.blocks = nn.ModuleList(_block(width, ffn) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, pixels: Tensor, depth: int) -> Tensor:
        """Return [N, 1 + P, W] behind so many blocks."""
        x = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks[:depth]:
            x = x + self._attention(block["attn"], block["norm1"](x))
            mlp, y = block["mlp"], block["norm2"](x)
            gate = mlp["fc1_g"](y)
            x = x + mlp["fc2"](mlp["norm"](gate * gate.sigmoid() * mlp["fc1_x"](y)))
        return x

    def _attention(self, attn: nn.Module, y: Tensor) -> Tensor:
        n, t, w = y.shape
        q, k, v = (attn[f"{one}_proj"](y).view(n, t, self.heads, -1).transpose(1, 2) for one in "qkv")
        scores = self._turned(q) @ self._turned(k).transpose(-1, -2) / math.sqrt(w // self.heads)
        return attn["proj"](attn["norm"]((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, t, w)))

    def _turned(self, x: Tensor) -> Tensor:
        """Turn neighbouring channels of all positions but the class token's, as complex numbers."""
        first, rest = x[:, :, :1], x[:, :, 1:]
        quarter = x.size(-1) // 4
        bands = 1.0 / 10000.0 ** (torch.arange(quarter).float() / quarter)
        at = torch.arange(self.grid).float() / self.grid * self.reference
        rows = at[:, None, None] * bands.expand(self.grid, self.grid, -1)
        columns = at[None, :, None] * bands.expand(self.grid, self.grid, -1)
        angles = torch.cat([rows, columns], -1).flatten(0, 1)
        pairs = torch.view_as_complex(rest.unflatten(-1, (-1, 2)).contiguous())
        turned = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
        return torch.cat([first, turned], 2)


def _block(width: int, ffn: int) -> nn.ModuleDict:
    attn = {f"{one}_proj": nn.Linear(width, width, bias=one != "k") for one in "qkv"}
    attn |= {"norm": nn.LayerNorm(width, eps=1e-6), "proj": nn.Linear(width, width)}  # type: ignore[dict-item]
    mlp = {"fc1_g": nn.Linear(width, ffn), "fc1_x": nn.Linear(width, ffn), "fc2": nn.Linear(ffn, width)}
    mlp |= {"norm": nn.LayerNorm(ffn, eps=1e-6)}  # type: ignore[dict-item]
    norms = {f"norm{i}": nn.LayerNorm(width, eps=1e-6) for i in (1, 2)}
    return nn.ModuleDict({"attn": nn.ModuleDict(attn), "mlp": nn.ModuleDict(mlp), **norms})
