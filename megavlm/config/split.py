"""How tower and connector lie on the tensor-parallel ranks: cut over them, or whole on each of them.

Published towers have heads and widths that no useful tensor-parallel size divides (InternViT-6B: 25 heads; EVA02-L: an
MLP of 2730). Such a part is not padded, but whole on each rank, which encodes its share of the pictures
(:mod:`megavlm.parallel.replicas`). An architecture's own rules say whether it can be cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

from megavlm.config.architecture import architecture_of, own_of
from megavlm.config.schema import ModelConfig, ParallelConfig


def tensor_ranks(model: ModelConfig, part: str, tensor: int) -> int:
    """Return over how many of ``tensor`` ranks the layers of a part are cut: all of them, or 1 where it is replicated.

    Args:
        model: the recipe's ``model`` branch.
        part: vision, connector or language.
        tensor: the tensor-parallel size.
    """
    how = getattr(getattr(model, part), "tensor_parallel", "shard")
    if how == "replicate":
        return 1
    if how == "shard" or tensor == 1:
        return tensor
    against = set(_rules(model, part, ParallelConfig(tensor_model_parallel_size=tensor)))
    return tensor if against <= set(_rules(model, part, ParallelConfig())) else 1


def is_replicated(model: ModelConfig, part: str, tensor: int) -> bool:
    """Whether each of ``tensor`` > 1 ranks holds a whole part."""
    return tensor_ranks(model, part, tensor) < tensor


def picture_owners(patches: Sequence[int], ranks: int) -> list[int]:
    """Return which rank encodes each picture of any size: the one in whose equal part of the patches its middle lies.

    Args:
        patches: patches of each picture.
        ranks: the tensor-parallel size.
    """
    ends, total = accumulate(patches), sum(patches)
    return [(2 * end - own) * ranks // (2 * total) for own, end in zip(patches, ends, strict=True)]


def part_rules(model: ModelConfig, part: str, parallel: ParallelConfig) -> Iterator[str]:
    """Yield what the architecture of a part has against its keys, on as many ranks as the part is cut over."""
    tensor = tensor_ranks(model, part, parallel.tensor_model_parallel_size)
    if part != "language" and parallel.vision_placement != "first_stage" and parallel.vision_shards == "whole":
        tensor = 1  # every rank holds all of it; with auto, it may (``planning.placement.settled`` looks again)
    lines = _rules(model, part, parallel.with_tensor(tensor))
    if tensor == 1 or part == "language":
        yield from lines
        return
    whole = _rules(model, part, parallel.with_tensor(1))
    for line in lines:
        yield line if line in whole else f"{line}, or set model.{part}.tensor_parallel to auto"


def _rules(model: ModelConfig, part: str, parallel: ParallelConfig) -> list[str]:
    return list(architecture_of(model, part).rules(own_of(model, part), parallel))
