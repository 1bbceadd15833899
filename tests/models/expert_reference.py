"""CogVLM's language model written out: weights for text and for image tokens, positions that patches share.

Written from the published definition (arXiv 2311.03079, and ``modeling_cogvlm.py`` of THUDM's checkpoints on the hub:
``get_expert_mask``, ``build_position_ids``, ``VisionExpertAttention``, ``VisionExpertMLP``), one sample at a time, with
the published names of the parameters. And CogAgent's (arXiv 2312.08914; ``modeling_cogagent.py`` beside the weights of
THUDM/cogagent-chat-hf: ``CrossAttention``, ``CogAgentDecoderLayer``). Nothing here is megavlm's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Cross = tuple[int, int] | None


def token_types(tokens_L: Tensor, image_token: int) -> Tensor:
    """Return [L], 1 for image tokens."""
    return (tokens_L == image_token).long()


def expert_mask(types_L: Tensor) -> Tensor:
    """Return [L] which tokens take the weights of images: those with another image token behind them."""
    mask = torch.zeros_like(types_L, dtype=torch.bool)
    mask[:-1] = (types_L[:-1] == 1) & (types_L[1:] == 1)
    return mask


def positions(types_L: Tensor) -> Tensor:
    """Return [L]: text, and a picture's first and last token, count; the patches between them are in one place."""
    types = types_L.tolist()
    ends = [
        kind == 1 and (i == 0 or types[i - 1] == 0 or i == len(types) - 1 or types[i + 1] == 0)
        for i, kind in enumerate(types)
    ]
    inner = [kind == 1 and not end for kind, end in zip(types, ends, strict=True)]
    found, at = [], 0
    for i in range(len(types)):
        if i and not (inner[i] and inner[i - 1]):
            at += 1
        found.append(at)
    return torch.tensor(found)


class Norm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class GatedMLP(nn.Module):
    def __init__(self, size: int, ffn: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, ffn, bias=False)
        self.up_proj = nn.Linear(size, ffn, bias=False)
        self.down_proj = nn.Linear(ffn, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class ExpertMLP(nn.Module):
    def __init__(self, size: int, ffn: int) -> None:
        super().__init__()
        self.language_mlp, self.vision_mlp = GatedMLP(size, ffn), GatedMLP(size, ffn)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask[:, None], self.vision_mlp(x), self.language_mlp(x))


class ExpertAttention(nn.Module):
    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        for kind in ("vision", "language"):
            self.add_module(f"{kind}_expert_query_key_value", nn.Linear(size, 3 * size, bias=False))
            self.add_module(f"{kind}_expert_dense", nn.Linear(size, size, bias=False))

    def _by_kind(self, name: str, x: Tensor, mask: Tensor) -> Tensor:
        vision, language = (self.get_submodule(f"{kind}_expert_{name}")(x) for kind in ("vision", "language"))
        return torch.where(mask[:, None], vision, language)

    def forward(self, x: Tensor, mask: Tensor, at: Tensor) -> Tensor:
        parts = self._by_kind("query_key_value", x, mask).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(0, 1) for part in parts)
        width = query.size(-1)
        inverse = 1.0 / 10000.0 ** (torch.arange(0, width, 2).float() / width)
        angles = torch.outer(at.float(), inverse).repeat(1, 2)

        def turned(y: Tensor) -> Tensor:
            half = torch.cat((-y[..., width // 2 :], y[..., : width // 2]), dim=-1)
            return y * angles.cos() + half * angles.sin()

        scores = turned(query) @ turned(key).transpose(1, 2) / width**0.5
        later = torch.ones(len(x), len(x)).triu(1).bool()
        mixed = scores.masked_fill(later, float("-inf")).softmax(-1) @ value
        return self._by_kind("dense", mixed.transpose(0, 1).flatten(1), mask)


class CrossAttention(nn.Module):
    """CogAgent's: every token looks at all features, without positions and without a bias."""

    def __init__(self, size: int, heads: int, features: int, width: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(size, width, bias=False)
        self.key_value = nn.Linear(features, 2 * width, bias=False)
        self.dense = nn.Linear(width, size, bias=False)

    def forward(self, x: Tensor, features_FC: Tensor) -> Tensor:
        parts = self.query(x), *self.key_value(features_FC).chunk(2, dim=-1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(0, 1) for part in parts)
        scores = query @ key.transpose(1, 2) / query.size(-1) ** 0.5
        return self.dense((scores.softmax(-1) @ value).transpose(0, 1).flatten(1))


class Layer(nn.Module):
    """With ``cross``, width of features and of attention to them, CogAgent's (``CogAgentDecoderLayer``)."""

    def __init__(self, size: int, heads: int, ffn: int, cross: tuple[int, int] | None = None) -> None:
        super().__init__()
        if cross is not None:
            self.cross_attn = CrossAttention(size, heads, *cross)
            self.post_cross_attention_layernorm = Norm(size)
        self.self_attn, self.mlp = ExpertAttention(size, heads), ExpertMLP(size, ffn)
        self.input_layernorm, self.post_attention_layernorm = Norm(size), Norm(size)

    def forward(self, x: Tensor, mask: Tensor, at: Tensor, beside_FC: Tensor | None = None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), mask, at)
        if beside_FC is not None:
            x = x + self.cross_attn(self.post_cross_attention_layernorm(x), beside_FC)
        return x + self.mlp(self.post_attention_layernorm(x), mask)


class Inner(nn.Module):
    def __init__(self, vocabulary: int, size: int, layers: int, heads: int, ffn: int, cross: Cross = None) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, size)
        self.layers = nn.ModuleList(Layer(size, heads, ffn, cross) for _ in range(layers))
        self.norm = Norm(size)


class CogLanguage(nn.Module):
    """[L] tokens of one sample, with the features of its image tokens, to [L, V] logits."""

    def __init__(self, vocabulary: int, size: int, layers: int, heads: int, ffn: int, cross: Cross = None) -> None:
        super().__init__()
        self.model = Inner(vocabulary, size, layers, heads, ffn, cross)
        self.lm_head = nn.Linear(size, vocabulary, bias=False)

    def forward(
        self, tokens_L: Tensor, features_TE: Tensor, image_token: int, beside_FC: Tensor | None = None
    ) -> Tensor:
        types = token_types(tokens_L, image_token)
        mask, at = expert_mask(types), positions(types)
        x = self.model.embed_tokens(tokens_L).masked_scatter(types.bool()[:, None], features_TE)
        for layer in self.model.layers:
            x = layer(x, mask, at, beside_FC)
        return self.lm_head(self.model.norm(x))
