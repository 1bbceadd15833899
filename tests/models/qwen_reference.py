"""Qwen-VL in plain torch over a state dict with Hugging Face's names: small, slow, and easy to check by eye.

Written from the project's facts page. ``test_reference.py`` holds it against logits of the original code where
those are at hand, and holds our model against it always.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


@dataclass(frozen=True)
class Sizes:
    """Shape of a model."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    ffn: int
    image: int
    patch: int
    width: int
    vision_layers: int
    vision_heads: int
    vision_ffn: int
    queries: int
    rows: int
    """Rows of the tower's positional table."""
    image_token: int

    @property
    def resampler_heads(self) -> int:
        """Heads of the resampler: 128 wide each, or one."""
        return max(1, self.hidden // 128)


def shapes(s: Sizes) -> dict[str, tuple[int, ...]]:
    """Return the checkpoint's names and shapes."""
    h, w = s.hidden, s.width
    out: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (s.vocab, h), "transformer.ln_f.weight": (h,), "lm_head.weight": (s.vocab, h),
    }  # fmt: skip
    for i in range(s.layers):
        at = f"transformer.h.{i}."
        out |= {at + "ln_1.weight": (h,), at + "ln_2.weight": (h,)}
        out |= {at + "attn.c_attn.weight": (3 * h, h), at + "attn.c_attn.bias": (3 * h,)}
        out |= {at + "attn.c_proj.weight": (h, h), at + "mlp.c_proj.weight": (h, s.ffn)}
        out |= {at + "mlp.w1.weight": (s.ffn, h), at + "mlp.w2.weight": (s.ffn, h)}
    v = "transformer.visual."
    out |= {v + "conv1.weight": (w, 3, s.patch, s.patch), v + "positional_embedding": (s.rows, w)}
    out |= {v + "ln_pre.weight": (w,), v + "ln_pre.bias": (w,)}
    for i in range(s.vision_layers):
        at = f"{v}transformer.resblocks.{i}."
        for name, size_out, size_in in (
            ("attn.in_proj", 3 * w, w), ("attn.out_proj", w, w), ("mlp.c_fc", s.vision_ffn, w),
            ("mlp.c_proj", w, s.vision_ffn),
        ):  # fmt: skip
            out |= {f"{at}{name}.weight": (size_out, size_in), f"{at}{name}.bias": (size_out,)}
        out |= {f"{at}{name}": (w,) for name in ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias")}
    p = v + "attn_pool."
    out |= {p + "pos_embed": (s.queries, h), p + "query": (s.queries, h), p + "kv_proj.weight": (h, w)}
    out |= {p + "attn.in_proj_weight": (3 * h, h), p + "attn.in_proj_bias": (3 * h,)}
    out |= {p + "attn.out_proj.weight": (h, h), p + "attn.out_proj.bias": (h,), v + "proj": (h, h)}
    for name in (p + "ln_q", p + "ln_kv", v + "ln_post"):
        out |= {name + ".weight": (h,), name + ".bias": (h,)}
    return out


def random_state(s: Sizes, seed: int) -> State:
    """Return random weights, norms around one."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes(s).items():
        state[name] = torch.randn(shape, generator=generator) * 0.1
        if "ln_" in name and name.endswith("weight"):
            state[name] += 1.0
    return state


def _norm(state: State, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[name + ".weight"], state[name + ".bias"], 1e-6)


def _rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


def _linear(state: State, name: str, x: Tensor) -> Tensor:
    return x @ state[name + ".weight"].T + state.get(name + ".bias", 0.0)


def _resize(table: Tensor, grid: int) -> Tensor:
    side = math.isqrt(table.size(0))
    if side == grid:
        return table
    square = table.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    return F.interpolate(square, (grid, grid), mode="bicubic", align_corners=False)[0].flatten(1).T


def _attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """Softmax attention of [..., positions, D] tensors, written out."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.size(-1))
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
    return scores.softmax(-1) @ v


def encode(state: State, s: Sizes, pixels: Tensor) -> Tensor:
    """Return [N, queries, hidden] features of normalised [N, 3, H, W] pixels."""
    v, grid = "transformer.visual.", s.image // s.patch
    x = F.conv2d(pixels, state[v + "conv1.weight"], stride=s.patch).flatten(2).transpose(1, 2)
    x = _norm(state, v + "ln_pre", x + _resize(state[v + "positional_embedding"], grid))
    for i in range(s.vision_layers):
        at = f"{v}transformer.resblocks.{i}."
        # Rows of in_proj: [q, k, v] of one head after the other.
        qkv = _linear(state, at + "attn.in_proj", _norm(state, at + "ln_1", x))
        q, k, val = qkv.unflatten(-1, (s.vision_heads, 3, -1)).permute(3, 0, 2, 1, 4)
        context = _attend(q, k, val, causal=False).transpose(1, 2).flatten(2)
        x = x + _linear(state, at + "attn.out_proj", context)
        inner = F.gelu(_linear(state, at + "mlp.c_fc", _norm(state, at + "ln_2", x)))
        x = x + _linear(state, at + "mlp.c_proj", inner)
    p = v + "attn_pool."
    x = _norm(state, p + "ln_kv", _linear(state, p + "kv_proj", x))
    query = (_norm(state, p + "ln_q", state[p + "query"]) + state[p + "pos_embed"]).expand(x.size(0), -1, -1)
    weights, biases = state[p + "attn.in_proj_weight"].chunk(3), state[p + "attn.in_proj_bias"].chunk(3)
    inputs = (query, x + _resize(state[p + "pos_embed"], grid), x)
    q, k, val = (
        (i @ w.T + b).unflatten(-1, (s.resampler_heads, -1)).transpose(1, 2)
        for i, w, b in zip(inputs, weights, biases, strict=True)
    )
    context = _attend(q, k, val, causal=False).transpose(1, 2).flatten(2)
    return _norm(state, v + "ln_post", _linear(state, p + "attn.out_proj", context)) @ state[v + "proj"]


def logits(
    state: State, s: Sizes, ids: Tensor, features: Tensor, *, prompt: int = 0, trained: int | None = None
) -> Tensor:
    """Return [S, vocab] logits of one sample: [S] ids, with [N, queries, hidden] features in its image slots.

    With ``trained``, what Qwen v1 does past that length when it answers a prompt of ``prompt`` tokens.
    """
    x = F.embedding(ids, state["transformer.wte.weight"])
    slots = ids == s.image_token
    if slots.any():
        x = x.index_put((slots.nonzero()[:, 0],), features.flatten(0, 1))
    head = s.hidden // s.heads
    base, scale = 10000.0, torch.ones(len(ids))
    if trained is not None:
        alpha = max(2 ** math.ceil(math.log2(prompt / trained) + 1) - 1, 1)
        base *= alpha ** (head / (head - 2))
        scale = (torch.arange(1, len(ids) + 1).log() / math.log(trained)).clamp(min=1.0)
    angles = torch.arange(len(ids))[:, None] * base ** -(torch.arange(0, head, 2) / head)
    cos, sin = torch.cat([angles, angles], 1).cos(), torch.cat([angles, angles], 1).sin()

    def rotary(t: Tensor) -> Tensor:
        half = torch.cat([-t[..., head // 2 :], t[..., : head // 2]], -1)
        return t * cos + half * sin

    for i in range(s.layers):
        at = f"transformer.h.{i}."
        qkv = _linear(state, at + "attn.c_attn", _rms(x, state[at + "ln_1.weight"]))
        q, k, v = (t.unflatten(-1, (s.heads, head)).transpose(0, 1) for t in qkv.chunk(3, -1))  # [Q; K; V] blocks
        context = _attend(rotary(q) * scale[:, None], rotary(k), v, causal=True).transpose(0, 1).flatten(1)
        x = x + _linear(state, at + "attn.c_proj", context)
        y = _rms(x, state[at + "ln_2.weight"])
        x = x + _linear(
            state, at + "mlp.c_proj", _linear(state, at + "mlp.w1", y) * F.silu(_linear(state, at + "mlp.w2", y))
        )
    return _rms(x, state["transformer.ln_f.weight"]) @ state["lm_head.weight"].T
