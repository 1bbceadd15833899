"""The layers of a language model behind which features of its pictures are added (arXiv 2406.04334; Qwen3-VL).

What they add travels beside the residual stream as Megatron-Core's ``context``, which its block hands from layer to
layer, and keeps for the backward pass where it recomputes: [R * S, 1, E], what R layers will add one after the other,
S rows each, zeros where there is no picture. A layer takes the first S rows and hands on the others.

Shape legend: S positions (with sequence parallelism this rank's part), E width of the language model, R levels.
"""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor


class DeepstackLayer(TransformerLayer):
    """Megatron-Core's layer, and behind it what the first S rows of ``context`` hold; without a context, that alone."""

    def forward(self, *args: Any, context: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Return [S, 1, E], and what is left of the context: None behind the last level."""
        hidden_S1E, _ = super().forward(*args, context=None, **kwargs)
        if context is None:
            return hidden_S1E, None
        rows = hidden_S1E.size(0)
        return hidden_S1E + context[:rows], context[rows:] if context.size(0) > rows else None
