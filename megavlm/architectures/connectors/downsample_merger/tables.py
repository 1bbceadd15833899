"""Names of the connector's weights in published checkpoints."""

from __future__ import annotations

from megavlm.weights.rules import Reshape, Table, both, row


def downsample_merger(side: int) -> Table:
    """Return GLM-4.1V's names; ``side``: of the block that becomes a token."""
    convolution = Reshape(
        "[E, W, m, m] to [E, W m m]", lambda x, _: [x[0].flatten(1)], lambda x, _: [x[0].unflatten(1, (-1, side, side))]
    )
    return Table(
        part="connector",
        rest=(
            row("downsample.weight", "downsample.weight", convolution),
            row("downsample.bias", "downsample.bias"),
            row("proj.weight", "merger.proj.weight"),
            *both("norm", "merger.post_projection_norm"),
            *(row(f"{name}.weight", f"merger.{name}_proj.weight") for name in ("gate", "up", "down")),
        ),
    )
