"""Names of the linear layers' weights in published checkpoints."""

from __future__ import annotations

import dataclasses

from megavlm.weights.rules import Table, both, row

LLAVA_PROJECTOR = Table(
    part="connector",
    rest=(*both("layers.0", "linear_1"), *both("layers.1", "linear_2")),
    prefix="multi_modal_projector.",
)
"""LLaVA's two layers, as Transformers calls them."""

TILES_PROJECTOR = dataclasses.replace(
    LLAVA_PROJECTOR,
    rest=(*LLAVA_PROJECTOR.rest, row("image_newline", "{newline}")),
    names={"newline": "image_newline"},
)
"""The same with the vector that ends each row of a picture's features (``megavlm/models/fusion.py``)."""

DEEPSEEK_ALIGNER = dataclasses.replace(
    LLAVA_PROJECTOR, rest=(*both("layers.0", "linear1"), *both("layers.1", "linear2")), prefix="model.aligner."
)
"""DeepSeek-VL-1.3B's, as Transformers calls them."""

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
