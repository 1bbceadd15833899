"""Names of the resampler's weights in published checkpoints."""

from __future__ import annotations

from megavlm.weights.rules import SPLIT3, TRANSPOSE, Table, both, row


def resampler_table(prefix: str, pool: str = "") -> Table:
    """Return the names below ``prefix``; ``pool`` is in front of all but the last norm and projection."""
    return Table(
        part="connector",
        rest=(
            row("query", f"{pool}query"),
            row("pos_embed", f"{pool}pos_embed"),
            row("kv_proj.weight", f"{pool}kv_proj.weight"),
            row("linear_q.weight linear_k.weight linear_v.weight", f"{pool}attn.in_proj_weight", SPLIT3),
            row("linear_q.bias linear_k.bias linear_v.bias", f"{pool}attn.in_proj_bias", SPLIT3),
            *both("out_proj", f"{pool}attn.out_proj"),
            *both("ln_q", f"{pool}ln_q"),
            *both("ln_kv", f"{pool}ln_kv"),
            *both("ln_post", "ln_post"),
            row("proj.weight", "proj", TRANSPOSE),
        ),
        prefix=prefix,
    )


RESAMPLER = resampler_table("transformer.visual.", "attn_pool.")
"""Qwen-VL's resampler, with the norm and projection behind it."""
