"""Names of the connector's weights in published checkpoints."""

from __future__ import annotations

from megavlm.weights.rules import Row, Table, both

PATCH_MERGER = Table(
    part="connector",
    rest=(*both("norm", "ln_q"), *both("linear_1", "mlp.0"), *both("linear_2", "mlp.2")),
    prefix="merger.",
)
"""Qwen2-VL's and Qwen2.5-VL's."""


def _merger(ours: str, theirs: str) -> tuple[Row, ...]:
    names = (("norm", "norm"), ("linear_1", "linear_fc1"), ("linear_2", "linear_fc2"))
    return tuple(one for mine, name in names for one in both(f"{ours}{mine}", f"{theirs}.{name}"))


DEEP_PATCH_MERGER = Table(
    part="connector",
    rest=(
        *_merger("", "merger"),
        *(one for level in range(99) for one in _merger(f"deepstack.{level}.", f"deepstack_merger_list.{level}")),
    ),
)
"""Qwen3-VL's, with those of its levels."""
