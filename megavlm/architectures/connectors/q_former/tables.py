"""Names of the Q-Former's weights in published checkpoints."""

from __future__ import annotations

import dataclasses

from megavlm.weights.rules import ONE_AXIS, Aside, Row, Table, both, row

_MOST = 48
"""Layers that names are written for; BLIP-2 has 12."""


def _attention(ours: str, theirs: str, inside: str) -> tuple[Row, ...]:
    return (
        *(one for n in ("query", "key", "value") for one in both(f"{ours}.linear_{n[0]}", f"{theirs}.{inside}.{n}")),
        *both(f"{ours}.linear_proj", f"{theirs}.output.dense"),
        *both(f"{ours}.norm", f"{theirs}.output.LayerNorm"),
    )


def _layer(number: int, theirs: str, inside: str) -> tuple[Row, ...]:
    ours = f"blocks.{number}"
    return (
        *_attention(f"{ours}.self_attention", f"{theirs}.attention", inside),
        *_attention(f"{ours}.cross_attention", f"{theirs}.crossattention", inside),
        *both(f"{ours}.linear_fc1", f"{theirs}.intermediate_query.dense"),
        *both(f"{ours}.linear_fc2", f"{theirs}.output_query.dense"),
        *both(f"{ours}.norm", f"{theirs}.output_query.LayerNorm"),
    )


def _table(norm: str, layers: str, inside: str, projection: str) -> Table:
    return Table(
        part="connector",
        rest=(
            row("query", "query_tokens", ONE_AXIS),
            *both("norm", norm),
            *(one for n in range(_MOST) for one in _layer(n, f"{layers}.{n}", inside)),
            *both("layers.0", projection),
        ),
    )


BLIP2_Q_FORMER = _table("qformer.layernorm", "qformer.encoder.layer", "attention", "language_projection")
"""BLIP-2's, as Transformers calls them."""

LAVIS_Q_FORMER = dataclasses.replace(
    _table("Qformer.bert.embeddings.LayerNorm", "Qformer.bert.encoder.layer", "self", "{projection}llama_proj"),
    aside=(
        Aside(r"Qformer\.bert\.embeddings\.position_ids", "position number buffer"),
        Aside(r"Qformer\.bert\.embeddings\.(word|position)_embeddings\.weight", "text branch", carried=True),
        Aside(r"Qformer\.bert\.encoder\.layer\.[0-9]+\.(intermediate|output)\.(dense|LayerNorm)\..*", "text branch",
              carried=True),
        Aside(r"Qformer\.cls\..*", "text branch", carried=True),
        Aside(r"(t5|opt)_proj\.(weight|bias)", "projection to BLIP-2's own language model", carried=True),
    ),
)  # fmt: skip
"""BLIP-2's own (LAVIS); the layer that MiniGPT-4 puts behind it lies elsewhere."""

TINYGPT_V_Q_FORMER = dataclasses.replace(
    LAVIS_Q_FORMER, rest=(*LAVIS_Q_FORMER.rest, *both("layers.1", "{projection}llama_proj2"))
)
"""The same with TinyGPT-V's second layer."""
