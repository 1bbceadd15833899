"""Names of the C-Abstractor's weights in published checkpoints."""

from __future__ import annotations

from megavlm.architectures.connectors.ldp.tables import gate
from megavlm.weights.rules import ONE_AXIS, POINTWISE, Row, Table, both, row

_MOST = 12
"""Blocks that names are written for; Honeybee has 3."""


def _block(ours: str, theirs: str) -> tuple[Row, ...]:
    return (
        *(row(f"{ours}.conv_{n}.weight", f"{theirs}.conv{n}.conv.weight", POINTWISE) for n in (1, 3)),
        row(f"{ours}.conv_2.weight", f"{theirs}.conv2.conv.weight"),
        *(one for n in (1, 2, 3) for one in both(f"{ours}.norm_{n}", f"{theirs}.conv{n}.bn")),
        *gate(f"{ours}.gate", f"{theirs}.se"),
        row(f"{ours}.shortcut.weight", f"{theirs}.downsample.conv.weight", POINTWISE),
        *both(f"{ours}.shortcut_norm", f"{theirs}.downsample.bn"),
    )


C_ABSTRACTOR = Table(
    part="connector",
    rest=(
        row("position_embedding", "pos_emb", ONE_AXIS),
        *(one for n in range(_MOST) for one in _block(f"ahead.{n}", f"net.0.b{n + 1}")),
        *(one for n in range(_MOST) for one in _block(f"behind.{n}", f"net.2.b{n + 1}")),
        *(one for n in range(_MOST) for one in both(f"layers.{n}", f"readout.{2 * n}")),
    ),
    prefix="abstractor.",
)
"""Honeybee's. Older files have a row of positions for the class token in front, which it drops on loading."""
