"""Connectors as plain torch modules on one device, to hold ours against.

``ReferenceResampler`` follows Qwen-VL's public ``visual.py`` (``Resampler``, then ``ln_post`` and ``proj``): one
``nn.MultiheadAttention`` with ``in_proj_weight`` [Q; K; V].
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megavlm.architectures.connectors.mlp.build import MLPConnector
from megavlm.architectures.connectors.resampler.build import Resampler


class ReferenceResampler(nn.Module):
    """Cross-attention of learned queries to [P, N, W] patch features."""

    def __init__(self, width: int, embed: int, heads: int, queries: int, patches: int) -> None:
        super().__init__()
        self.grid = math.isqrt(patches)
        self.query = nn.Parameter(torch.empty(queries, embed))
        self.pos_embed = nn.Parameter(torch.empty(queries, embed), requires_grad=False)
        self.kv_proj = nn.Linear(width, embed, bias=False) if width != embed else nn.Identity()
        self.attn = nn.MultiheadAttention(embed, heads)
        self.ln_q, self.ln_kv, self.ln_post = (nn.LayerNorm(embed, eps=1e-6) for _ in range(3))
        self.proj = nn.Parameter(torch.empty(embed, embed))

    def forward(self, x: Tensor) -> Tensor:
        side = math.isqrt(self.pos_embed.size(0))
        table = self.pos_embed.reshape(1, side, side, -1).permute(0, 3, 1, 2)
        table = F.interpolate(table, size=(self.grid, self.grid), mode="bicubic", align_corners=False)
        key_positions = table.permute(0, 2, 3, 1).flatten(0, 2)
        x = self.ln_kv(self.kv_proj(x))
        query = (self.ln_q(self.query) + self.pos_embed).unsqueeze(1).repeat(1, x.size(1), 1)
        return self.ln_post(self.attn(query, x + key_positions.unsqueeze(1), x)[0]) @ self.proj


@torch.no_grad()
def fill(reference: nn.Module) -> None:
    """Give every parameter random values that are neither tiny nor at their defaults."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in reference.named_parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        if "ln_" in name and name.endswith("weight"):
            parameter += 1.0


def shard(tensor: Tensor, dim: int, rank: int, size: int) -> Tensor:
    """Return this tensor-parallel rank's part."""
    return tensor.chunk(size, dim)[rank]


@torch.no_grad()
def load_resampler(ours: Resampler, reference: ReferenceResampler, rank: int = 0, size: int = 1) -> None:
    """Copy the reference's weights, the part of one tensor-parallel rank."""
    ours.query.copy_(reference.query)
    ours.pos_embed.copy_(reference.pos_embed)
    for name in ("ln_q", "ln_kv", "ln_post"):
        getattr(ours, name).load_state_dict(getattr(reference, name).state_dict())
    if ours.kv_proj is not None:
        ours.kv_proj.weight.copy_(shard(reference.kv_proj.weight, 0, rank, size))
    blocks = zip(reference.attn.in_proj_weight.chunk(3), reference.attn.in_proj_bias.chunk(3), strict=True)
    for layer, (weight, bias) in zip((ours.linear_q, ours.linear_k, ours.linear_v), blocks, strict=True):
        layer.weight.copy_(shard(weight, 0, rank, size))
        layer.bias.copy_(shard(bias, 0, rank, size))
    ours.out_proj.weight.copy_(shard(reference.attn.out_proj.weight, 1, rank, size))
    ours.out_proj.bias.copy_(reference.attn.out_proj.bias)
    ours.proj.weight.copy_(shard(reference.proj.t(), 0, rank, size))


def reference_mlp(depth: int, width: int, embed: int) -> nn.Sequential:
    """Return ``depth`` linear layers with (erf) GELU between them."""
    layers: list[nn.Module] = [nn.Linear(width, embed)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(embed, embed)]
    return nn.Sequential(*layers)


@torch.no_grad()
def load_mlp(ours: MLPConnector, reference: nn.Sequential, rank: int = 0, size: int = 1) -> None:
    """Copy the reference's weights: layers alternate between column- and row-parallel."""
    for i, (layer, theirs) in enumerate(zip(ours.layers, list(reference)[::2], strict=True)):
        row = i % 2 == 1
        layer.weight.copy_(shard(theirs.weight, int(row), rank, size))
        layer.bias.copy_(theirs.bias if row else shard(theirs.bias, 0, rank, size))
