"""Names of the connectors' weights in published checkpoints."""

from __future__ import annotations

from megavlm.weights.rules import POINTWISE, Row, Table, both, row


def gate(ours: str, theirs: str) -> tuple[Row, ...]:
    """Return the rows of a squeeze-and-excite gate, whose two matrices the published code has as convolutions."""
    names = (("squeeze", "fc1"), ("expand", "fc2"))
    return tuple(
        row(f"{ours}.{one}.{kind}", f"{theirs}.{other}.{kind}", *([POINTWISE] if kind == "weight" else []))
        for one, other in names
        for kind in ("weight", "bias")
    )


def _block(ours: str, theirs: str) -> tuple[Row, ...]:
    return (
        row(f"{ours}.depthwise.weight", f"{theirs}.0.0.weight"),
        *both(f"{ours}.norm_1", f"{theirs}.0.1"),
        *gate(f"{ours}.gate", f"{theirs}.1"),
        row(f"{ours}.project.weight", f"{theirs}.2.0.weight", POINTWISE),
        *both(f"{ours}.norm_2", f"{theirs}.2.1"),
    )


LDP = Table(
    part="connector",
    rest=(
        *both("layers.0", "mlp.1"),
        *both("layers.1", "mlp.3"),
        *_block("blocks.0", "mb_block.1.block"),
        *_block("blocks.1", "mb_block.2.block"),
    ),
    prefix="model.mm_projector.model.",
)
"""MobileVLM's (``ldpnet``)."""

LDP_V2 = Table(
    part="connector",
    rest=(*both("layers.0", "mlp.mlp.0"), *both("layers.1", "mlp.mlp.2"), *both("peg", "peg.peg.0")),
    prefix="model.mm_projector.",
)
"""MobileVLM V2's (``ldpnetv2``)."""
