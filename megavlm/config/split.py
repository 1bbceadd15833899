"""How tower and connector lie on the tensor-parallel ranks: cut over them, or whole on each of them.

Published towers have heads and widths that no useful tensor-parallel size divides (InternViT-6B: 25 heads; EVA02-L: an
MLP of 2730). Such a part is not padded, but whole on each rank, which encodes its share of the pictures
(:mod:`megavlm.parallel.replicas`).
"""

from __future__ import annotations

from collections.abc import Iterator

from megavlm.config.schema import ModelConfig


def tensor_ranks(model: ModelConfig, part: str, tensor: int) -> int:
    """Return over how many of ``tensor`` ranks the layers of a part are cut: all of them, or 1 where it is replicated.

    Args:
        model: the recipe's ``model`` branch.
        part: vision, connector or language.
        tensor: the tensor-parallel size.
    """
    how = getattr(getattr(model, part), "tensor_parallel", "shard")
    if how == "replicate" or (how == "auto" and any(width % tensor for _, _, width in cut_widths(model, part))):
        return 1
    return tensor


def is_replicated(model: ModelConfig, part: str, tensor: int) -> bool:
    """Whether each of ``tensor`` > 1 ranks holds a whole part."""
    return tensor_ranks(model, part, tensor) < tensor


def cut_widths(model: ModelConfig, part: str) -> Iterator[tuple[str, str, int]]:
    """Yield what the ranks share of a part that is cut: the key, what it says in words, and the number."""
    vision, connector, hidden = model.vision, model.connector, model.language.hidden_size
    if part == "vision":
        yield "model.vision.num_attention_heads", str(vision.num_attention_heads), vision.num_attention_heads
        yield "model.vision.ffn_hidden_size", str(vision.ffn_hidden_size), vision.ffn_hidden_size
    elif part == "connector" and connector.head_dim is not None:
        heads = hidden // connector.head_dim
        yield "model.connector.head_dim", f"gives {heads} heads, which", heads
    elif part == "connector":
        yield "model.language.hidden_size", f"{hidden}, the connector's width,", hidden
