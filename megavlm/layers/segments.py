"""The segments of a pack, as Megatron-Core takes them, with what the host knows about them already.

Layers that ask the device for the lengths of a pack wait for it, five times each. The host made the pack, so it knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state as mpu
from megatron.core.packed_seq_params import PackedSeqParams
from numpy.typing import NDArray
from torch import Tensor

from megavlm.parallel.context import ContextSplit


def packed_segments(
    cu_seqlens: NDArray[np.int32],
    device: torch.device,
    position_ids: Tensor | None = None,
    spans: Sequence[Sequence[int]] | None = None,
    context: ContextSplit | None = None,
) -> PackedSeqParams:
    """Describe a pack for Megatron-Core (``qkv_format="thd"``).

    Lengths and positions are plain attributes, not fields: Megatron-Core hands every field of this class to
    Transformer Engine's attention as a keyword.

    Args:
        cu_seqlens: [G + 1] where each segment starts, and the length of the pack at the end.
        device: where attention looks for them.
        position_ids: [S] or [3, S] int64 on ``device``: the position of each token for rotary angles, in one number or
            in three. None leaves it to Megatron-Core, which counts from 0 in each segment.
        spans: first position, and the one behind the last, of stretches whose positions see each other both ways, for
            models that have such (:mod:`megavlm.layers.two_way`).
        context: how the pack is cut over context-parallel ranks; ``position_ids`` are then this rank's, and lengths
            and spans those of the pack. None where each rank has all of it.
    """
    lengths = np.diff(cu_seqlens)
    if context is not None:
        if spans is not None:
            spans = [
                [context.moved(start, cu_seqlens), context.moved(stop - 1, cu_seqlens) + 1] for start, stop in spans
            ]
        cu_seqlens = context.cu_seqlens
    # Megatron reads the rotary table as absolute positions where max_seqlen equals the length of the pack: the
    # longest segment is right for both readings, since then it is the only segment.
    longest = int(np.diff(cu_seqlens).max())
    borders = to_device(torch.from_numpy(np.ascontiguousarray(cu_seqlens, np.int32)), device)
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=borders,
        cu_seqlens_kv=borders,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        **_for_engine(context, borders),
    )
    told: Any = packed
    told.segment_lengths = lengths.tolist()
    told.position_ids = position_ids
    told.two_way_spans = None if spans is None else [(int(start), int(stop)) for start, stop in spans]
    told.two_way_plans = {}
    told.context = context
    return packed


def _for_engine(context: ContextSplit | None, borders: Tensor) -> dict[str, Any]:
    """Return what Transformer Engine's attention asks for in a job with context parallelism (not run on a GPU).

    Borders of the filled-up pack, in which what fills up is as good as a token; and whether this pack is cut, which
    Megatron-Core tells it anew with each one.
    """
    group = mpu.get_context_parallel_group(check_initialized=False)
    if context is not None:
        return {"cu_seqlens_q_padded": borders, "cu_seqlens_kv_padded": borders, "cp_group": group}
    return {"local_cp_size": 1} if group is not None and group.size() > 1 else {}


def segment_lengths(packed: PackedSeqParams) -> list[int]:
    """Return the length of each segment; asks the device only for packs that :func:`packed_segments` did not make.

    Of a pack that is cut (:func:`context_split`) they are those of the pack, not of it filled up.
    """
    known = getattr(packed, "segment_lengths", None)
    return packed.cu_seqlens_q.diff().tolist() if known is None else known


def segment_positions(packed: PackedSeqParams | None) -> Tensor | None:
    """Return the [S] or [3, S] positions that :func:`packed_segments` was given, or None."""
    return getattr(packed, "position_ids", None)


def two_way_spans(packed: PackedSeqParams) -> list[tuple[int, int]] | None:
    """Return the spans that :func:`packed_segments` was given, or None."""
    return getattr(packed, "two_way_spans", None)


def two_way_plans(packed: PackedSeqParams) -> dict[Any, Any]:
    """Return where attention keeps what it makes of the spans once for all layers, by their window."""
    told: Any = packed
    return told.two_way_plans


def context_split(packed: PackedSeqParams | None) -> ContextSplit | None:
    """Return how a pack is cut over context-parallel ranks; None where this rank has all of it."""
    return getattr(packed, "context", None)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to ``device``, from the host without waiting for what the device has to do before."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    # A copy from pageable memory waits for the device; pinned memory stays reserved until the copy is done.
    return tensor.pin_memory().to(device, non_blocking=True)
