"""Names of the resampler's weights in published checkpoints."""

from __future__ import annotations

from megavlm.weights.rules import SPLIT3, TRANSPOSE, Table, both, row

RESAMPLER = Table(
    part="connector",
    rest=(
        row("query", "attn_pool.query"),
        row("pos_embed", "attn_pool.pos_embed"),
        row("kv_proj.weight", "attn_pool.kv_proj.weight"),
        row("linear_q.weight linear_k.weight linear_v.weight", "attn_pool.attn.in_proj_weight", SPLIT3),
        row("linear_q.bias linear_k.bias linear_v.bias", "attn_pool.attn.in_proj_bias", SPLIT3),
        *both("out_proj", "attn_pool.attn.out_proj"),
        *both("ln_q", "attn_pool.ln_q"),
        *both("ln_kv", "attn_pool.ln_kv"),
        *both("ln_post", "ln_post"),
        row("proj.weight", "proj", TRANSPOSE),
    ),
    prefix="transformer.visual.",
)
"""Qwen-VL's resampler, with the norm and projection behind it."""
