"""Tower and connector in front of the language model: how they are built, and how pictures go through them.

Each is cut over the tensor-parallel ranks, or whole on each of them (:mod:`megavlm.config.split`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from torch import Tensor

from megavlm.architectures.context import BuildContext
from megavlm.config.architecture import architecture_of, own_of
from megavlm.config.schema import ModelConfig
from megavlm.config.split import is_replicated
from megavlm.models.levels import connect, make_connector
from megavlm.parallel.replicas import PackedShares, Shares, built_whole, mark_replicas, on_any_stage


def build_front(model: ModelConfig, context: BuildContext) -> tuple[Any, Any]:
    """Build tower and connector."""
    return _build(model, context, "vision"), _build(model, context, "connector")


def replicated(model: ModelConfig, context: BuildContext) -> frozenset[str]:
    """Return which of vision and connector every tensor-parallel rank holds whole."""
    tensor = context.parallel.tensor_model_parallel_size
    everywhere = context.vision_whole and tensor > 1
    return frozenset(part for part in ("vision", "connector") if everywhere or is_replicated(model, part, tensor))


def _build(model: ModelConfig, context: BuildContext, part: str) -> Any:
    architecture, own = architecture_of(model, part), own_of(model, part)
    whole, inside = context.vision_whole or part in replicated(model, context), context
    if whole:
        inside = replace(
            context, parallel=replace(context.parallel, tensor_model_parallel_size=1, sequence_parallel=False)
        )
    with built_whole() if whole else nullcontext(), on_any_stage() if context.vision_apart else nullcontext():
        module = make_connector(model, inside) if part == "connector" else architecture.make(own, inside)
    if whole:
        mark_replicas(module)
    return module


def encode(
    vision: Any,
    connector: Any,
    images: Tensor,
    grid: Tensor | None = None,
    *,
    trains_vision: bool,
    replicas: frozenset[str] = frozenset(),
) -> Tensor:
    """Return [Q, N, E] features of pictures.

    Args:
        vision: the tower.
        connector: the connector.
        images: [N, 3, H, W], or [P, F] patches with ``grid``, the same on all tensor-parallel ranks.
        grid: [N, 3] int64 on the host, of pictures that have sizes of their own; what comes of them is [Q, 1, E].
        trains_vision: whether the tower's weights learn.
        replicas: of vision and connector, those that run on this rank's share of the pictures alone.
    """
    if grid is not None:
        return _encode_packed(vision, connector, images, grid, trains_vision=trains_vision, replicas=replicas)
    shares = Shares(images.size(0)) if replicas else None
    if shares is not None and "vision" in replicas:
        images = shares.of(images)
    with torch.set_grad_enabled(torch.is_grad_enabled() and trains_vision):
        features = vision(images)
    if shares is not None and "vision" in replicas and "connector" not in replicas:
        features = shares.gather(features)
    if shares is not None and "connector" in replicas and "vision" not in replicas:
        features = shares.take(features)
    features = connect(connector, features)
    return shares.gather(features) if shares is not None and "connector" in replicas else features


def encode_shared(vision: Any, connector: Any, images: Tensor, grid: Tensor | None = None, **rest: Any) -> Tensor:
    """Return what :func:`encode` does, of pictures that context-parallel ranks share: each encodes a run of them.

    All call it with the same pictures. Each goes on with its own positions, so that the gradients of features, and of
    weights behind them, are sums over the ranks.
    """
    group = mpu.get_context_parallel_group()
    if grid is None:
        equal = Shares(images.size(0), group, summed=True)
        return equal.gather(encode(vision, connector, equal.of(images), **rest))
    counts = grid.prod(1).tolist()
    shares = PackedShares(counts, group, summed=True)
    own, shown = shares.of(images, grid, vision)
    features = encode(vision, connector, own, shown, **rest)
    if getattr(connector, "takes_grid", False):
        return shares.gather(features, connector.rows_of(grid))
    rows_of = _rows_of(vision)
    each = sum(map(rows_of, shown.tolist())) // features.size(0)  # that become one row
    return shares.gather(features, [rows_of(one) // each for one in grid.tolist()])


def _rows_of(vision: Any) -> Callable[[Sequence[int]], int]:
    """Return what says how many features a tower makes of a picture: its patches, unless the tower says else."""
    own: Callable[[Sequence[int]], int] = getattr(getattr(vision, "settings", None), "rows_of", math.prod)
    return own


def _encode_packed(
    vision: Any, connector: Any, patches_PF: Tensor, grid: Tensor, *, trains_vision: bool, replicas: frozenset[str]
) -> Tensor:
    """Return [Q, 1, E] features of pictures of any size; a share of them is whole pictures."""
    counts = list(map(_rows_of(vision), grid.tolist()))
    shares = PackedShares(grid.prod(1).tolist() if "vision" in replicas else counts) if replicas else None
    shown = grid
    if shares is not None and "vision" in replicas:
        patches_PF, shown = shares.of(patches_PF, grid, vision)
    with torch.set_grad_enabled(torch.is_grad_enabled() and trains_vision):
        features = vision(patches_PF, shown)
    if shares is not None and "vision" in replicas and "connector" not in replicas:
        features, shown = shares.gather(features, counts), grid
    if shares is not None and "connector" in replicas and "vision" not in replicas:
        features, shown = shares.take(features), shares.grid_of(grid)
    rows = features.size(0)
    features = connect(connector, features, shown)
    if shares is None or "connector" not in replicas:
        return features
    if getattr(connector, "takes_grid", False):
        return shares.gather(features, connector.rows_of(grid))
    each = rows // features.size(0)  # that become one row
    return shares.gather(features, [count // each for count in counts])
