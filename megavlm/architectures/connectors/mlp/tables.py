"""Names of the linear layers' weights in published checkpoints."""

from __future__ import annotations

from megavlm.weights.rules import Table, both

LLAVA_PROJECTOR = Table(
    part="connector",
    rest=(*both("layers.0", "linear_1"), *both("layers.1", "linear_2")),
    prefix="multi_modal_projector.",
)
"""LLaVA's two layers, as Transformers calls them."""

SEQUENTIAL_PROJECTOR = Table(
    part="connector",
    # GELUs stand between the layers and take a number each; one layer alone has none.
    rest=tuple(one for n in range(99) for one in both(f"layers.{n}", f"{2 * n}")),
    prefix="transformer.mm_projector.",
)
"""``mlpNx_gelu`` of the original LLaVA and of CodeFuse-VLM."""

LINEAR_PROJECTOR = Table(
    part="connector", rest=both("layers.0", "{linear}"), names={"linear": "transformer.mm_projector"}
)
"""``linear`` of the same."""
