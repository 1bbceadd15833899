"""Published T5s: one row each, by the name that a recipe calls them."""

from __future__ import annotations

from typing import Any


def _size(layers: int, width: int, ffn: int, heads: int, head: int, vocabulary: int = 32128) -> dict[str, Any]:
    """Return the sizes of a public ``config.json``."""
    return {
        "num_layers": layers, "hidden_size": width, "ffn_hidden_size": ffn, "num_attention_heads": heads,
        "kv_channels": head, "vocab_size": vocabulary,
    }  # fmt: skip


KINDS: dict[str, dict[str, Any]] = {"t5": {}}

SIZES: dict[str, dict[str, Any]] = {
    "tiny_t5": {**_size(2, 128, 256, 4, 32, 512), "init_method_std": 0.08},
    # google/t5-v1_1-xl: what PaLI-3 has of UL2 (arXiv 2310.09199 says "3B" alone, so this shape is unchecked).
    "t5_xl": _size(24, 2048, 5120, 32, 64),
}
