"""Names of the resampler's weights in published checkpoints."""

from __future__ import annotations

from megavlm.weights.rules import SPLIT3, TRANSPOSE, Table, both, row

MINICPM_RESAMPLER = Table(
    part="connector",
    rest=(
        row("query", "query"),
        row("pos_embed", "pos_embed"),
        row("kv_proj.weight", "kv_proj.weight"),
        row("linear_q.weight linear_k.weight linear_v.weight", "attn.in_proj_weight", SPLIT3),
        row("linear_q.bias linear_k.bias linear_v.bias", "attn.in_proj_bias", SPLIT3),
        *both("out_proj", "attn.out_proj"),
        *both("ln_q", "ln_q"),
        *both("ln_kv", "ln_kv"),
        *both("ln_post", "ln_post"),
        row("proj.weight", "proj", TRANSPOSE),
    ),
    prefix="resampler.",
)
"""MiniCPM-V's."""
