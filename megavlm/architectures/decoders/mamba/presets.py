"""Published Mambas: one row each, by the name that a recipe calls them."""

from __future__ import annotations

from typing import Any


def _size(layers: int, width: int, vocabulary: int = 50280) -> dict[str, Any]:
    """Return the sizes of a public ``config.json``."""
    return {
        "num_layers": layers, "hidden_size": width, "intermediate_size": 2 * width, "time_step_rank": width // 16,
        "vocab_size": vocabulary,
    }  # fmt: skip


KINDS: dict[str, dict[str, Any]] = {"mamba": {}}

SIZES: dict[str, dict[str, Any]] = {
    "tiny_mamba": {**_size(4, 128, 512), "init_method_std": 0.08},
    # state-spaces/mamba-*-hf. The repositories without -hf pad the vocabulary to 50288 rows in their code.
    "mamba_130m": _size(24, 768),
    "mamba_370m": _size(48, 1024),
    "mamba_790m": _size(48, 1536),
    "mamba_1_4b": _size(48, 2048),
    "mamba_2_8b": _size(64, 2560),
}
