"""Language layers that attend to features of pictures, not to text (Llama 3.2 Vision, arXiv 2407.21783, section 7).

Queries are the text's, keys and values are made of the features that go from layer to layer as Megatron-Core's
``context``. Which pictures a position sees follows from the spans of the pack (``megavlm.data.spans``, kind ``cross``):
those of the picture that stands last in front of it in its sample, and of the ones that stand directly before that one.
A position that sees none goes through such a layer as it is, as in the authors' code (meta-llama/llama-models,
``CrossAttentionTransformerBlock``: ``full_text_row_masked_out_mask`` multiplies both branches).

Shape legend: S positions of a pack, F rows of features of all its pictures and what fills them up for sequence
parallelism, N query and G key/value heads of this tensor-parallel rank, D width of a head, E width of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megavlm.layers.attention import TorchAttention
from megavlm.layers.scale import GatedSum
from megavlm.layers.segments import context_split, segment_lengths, to_device, two_way_plans, two_way_spans
from megavlm.parallel.context import ContextSplit

_SIGHTS, _SEEN, _CALLS = "cross sights", "cross seen", "cross calls"
"""Where a pack keeps what is made once for all layers (:func:`two_way_plans`)."""


class Sight(NamedTuple):
    """Positions of a pack that see the same pictures."""

    start: int
    stop: int
    first: int
    """The first picture, of those of the pack."""
    last: int
    """The one behind the last."""


def tell_pictures(packed: PackedSeqParams, rows: Sequence[int]) -> None:
    """Say how many rows of features each picture of a pack has, in their order."""
    told: Any = packed
    told.picture_rows = list(rows)


def picture_rows(packed: PackedSeqParams) -> list[int]:
    """Return what :func:`tell_pictures` was told; nothing for a pack without pictures."""
    rows: list[int] = getattr(packed, "picture_rows", [])
    return rows


def tell_sights(packed: PackedSeqParams, seen: Sequence[Sight], rows: Sequence[int]) -> None:
    """Say who sees which pictures, where that does not follow from spans of kind ``cross``, and their rows."""
    tell_pictures(packed, rows)
    two_way_plans(packed)[_SIGHTS] = list(seen)


def sights(packed: PackedSeqParams) -> list[Sight]:
    """Return who sees which pictures, ascending; positions in between see none.

    Of a pack that context-parallel ranks share, they are this rank's positions, and its features those of all pictures.

    Raises:
        ValueError: there are not as many places in the text as pictures.
    """
    kept, spans, rows = two_way_plans(packed), two_way_spans(packed) or [], picture_rows(packed)
    if _SIGHTS not in kept:
        if len(spans) != len(rows):
            raise ValueError(f"{len(spans)} places of pictures in a pack, but {len(rows)} pictures with features")
        split = context_split(packed)
        lengths = segment_lengths(packed) if split is None else split.lengths
        starts = {0, *np.cumsum(lengths).tolist()}
        found: list[Sight] = []
        for number, (start, stop) in enumerate(spans):
            before = found[-1] if found else None
            # Behind a place that is its own token alone, in one sample: pictures side by side are seen together.
            joined = before is not None and before.stop == start == before.start + 1 and start not in starts
            found.append(Sight(start, stop, before.first if joined and before else number, number + 1))
        kept[_SIGHTS] = found if split is None else _of_rank(found, split)
    seen: list[Sight] = kept[_SIGHTS]
    return seen


def _of_rank(seen: Sequence[Sight], split: ContextSplit) -> list[Sight]:
    """Return what of it is this rank's: its positions ascend in the filled-up pack, so that each sight is one piece."""
    own = np.concatenate([
        start + np.arange(*chunk)
        for start, length in zip(split.cu_seqlens.tolist(), split.lengths, strict=False)
        for chunk in split.chunks(length)
    ])  # fmt: skip
    cut = np.searchsorted(own, [(one.start, one.stop) for one in seen]).reshape(-1, 2).tolist()
    found = [one._replace(start=start, stop=stop) for one, (start, stop) in zip(seen, cut, strict=True)]
    return [one for one in found if one.start < one.stop]


def last_sights(packed: PackedSeqParams) -> list[tuple[int, int] | None]:
    """Return for each segment from which row of features on, and up to which, what follows its end would see."""
    ends = {one.stop: one for one in sights(packed)}
    borders = np.cumsum([0, *picture_rows(packed)]).tolist()
    found = [ends.get(int(stop)) for stop in np.cumsum(segment_lengths(packed))]
    return [None if one is None else (borders[one.first], borders[one.last]) for one in found]


def seen_positions(packed: PackedSeqParams, length: int, device: torch.device) -> Tensor:
    """Return [S, 1, 1] bool of which positions see a picture."""
    kept = two_way_plans(packed)
    if _SEEN not in kept:
        mask = np.zeros(length, np.bool_)
        for one in sights(packed):
            mask[one.start : one.stop] = True
        kept[_SEEN] = to_device(torch.from_numpy(mask), device)[:, None, None]
    found: Tensor = kept[_SEEN]
    return found


class CrossHeads(NamedTuple):
    """Shape of :class:`PictureAttention`, where it is not the language model's."""

    number: int
    """Query heads, and as many of keys and values."""
    width: int
    """Of one."""
    features: int
    """Width of a feature."""


@dataclass
class CrossSubmodules:
    """The parts of :class:`PictureAttention`."""

    linear_q: Any
    linear_kv: Any
    linear_proj: Any
    q_layernorm: Any
    k_layernorm: Any


class KeptPictures(Protocol):
    """Keys and values of pictures that answers go on seeing (``megavlm.inference.cache``)."""

    @property
    def goes_on(self) -> bool:
        """Whether answers go on, and no prompt is read."""

    def attend(self, query_SND: Tensor) -> Tensor | None:
        """Return what new positions see, [S, N, D]; None while prompts are read."""

    def remember(self, key_FGD: Tensor, value_FGD: Tensor, packed: PackedSeqParams) -> None:
        """Keep what prompts that are read will see."""

    def seen(self, length: int, device: torch.device) -> Tensor:
        """Return [S, 1, 1] bool of which new positions see a picture."""


class PictureAttention(MegatronModule):
    """Attention from text to features, with norms of each head's queries and keys, without positions.

    Every tensor-parallel rank has whole key/value heads; the rows of ``linear_kv`` are [k, v] of one after the other.
    (Megatron-Core's ``CrossAttention`` has no grouped heads, and no packs.)

    Args:
        config: of the language model.
        submodules: its parts.
        layer_number: of its layer.
        shape: of its heads and features; None for self-attention's heads, and features of the model's width.
    """

    def __init__(
        self, config: TransformerConfig, submodules: CrossSubmodules, layer_number: int,
        shape: CrossHeads | None = None, **_: Any,
    ) -> None:  # fmt: skip
        super().__init__(config=config)
        heads, groups, width, features = config.num_attention_heads, config.num_query_groups, config.kv_channels, None
        if shape is not None:
            heads, groups, width, features = shape.number, shape.number, shape.width, shape.features
        tensor = mpu.get_tensor_model_parallel_world_size()
        assert width is not None and groups is not None
        assert groups % tensor == 0, "each rank needs whole key/value heads"
        self.width, self.groups = width, groups // tensor
        common = {"config": config, "bias": False, "is_expert": False, "tp_comm_buffer_name": None}
        column = {**common, "init_method": config.init_method, "gather_output": False, "skip_bias_add": False}
        self.linear_q = build_module(submodules.linear_q, config.hidden_size, heads * width, **column)
        self.linear_kv = build_module(
            submodules.linear_kv, features or config.hidden_size, 2 * groups * width, **column
        )
        self.linear_proj = build_module(
            submodules.linear_proj, heads * width, config.hidden_size, **common,
            init_method=config.output_layer_init_method, input_is_parallel=True, skip_bias_add=True,
        )  # fmt: skip
        norm = {"config": config, "hidden_size": width, "eps": config.layernorm_epsilon}
        self.q_layernorm = build_module(submodules.q_layernorm, **norm)
        self.k_layernorm = build_module(submodules.k_layernorm, **norm)
        self.core_attention = TorchAttention(config, layer_number, AttnMaskType.no_mask, "cross")
        self.kept: KeptPictures | None = None

    def forward(self, hidden_S1E: Tensor, features_F1E: Tensor | None, packed: PackedSeqParams) -> Tensor:
        """Return [S, 1, E]; zeros for positions that see nothing.

        With sequence parallelism all three are this rank's rows.

        Args:
            hidden_S1E: the text.
            features_F1E: of the pack's pictures; None where answers go on.
            packed: segments, spans, and how many rows each picture has.
        """
        query_SND = self.q_layernorm(self.linear_q(hidden_S1E)[0].unflatten(-1, (-1, self.width)).squeeze(1))
        found = None if self.kept is None else self.kept.attend(query_SND)
        if found is None:
            assert features_F1E is not None, "a pack of text alone does not come here"
            key_value = self.linear_kv(features_F1E)[0].unflatten(-1, (self.groups, 2, self.width)).squeeze(1)
            key_FGD, value_FGD = key_value.unbind(2)
            key_FGD = self.k_layernorm(key_FGD)
            if self.kept is not None:
                self.kept.remember(key_FGD, value_FGD, packed)
            found = self._attend(query_SND, key_FGD, value_FGD, packed)
        output: Tensor = self.linear_proj(found.flatten(1).unsqueeze(1))[0]
        return output

    def _attend(self, query_SND: Tensor, key_FGD: Tensor, value_FGD: Tensor, packed: PackedSeqParams) -> Tensor:
        seen = sights(packed)
        if not seen:
            # Nothing is seen, but all parameters have a gradient: zeros.
            return query_SND * 0.0 + (key_FGD.sum() + value_FGD.sum()) * 0.0
        if self.core_attention.takes_kernel(query_SND):
            return self._one_call(query_SND, key_FGD, value_FGD, packed)
        rows = picture_rows(packed)
        if all(one.last <= two.first for one, two in pairwise(seen)):  # nobody sees what others see: no copies
            rows, seen = _seen_together(rows, seen)
        sizes = [*rows, key_FGD.size(0) - sum(rows)]
        # Split, and not sliced: a slice's gradient is as long as the whole, and there are several of them.
        keys, values = key_FGD.split(sizes), value_FGD.split(sizes)
        bounds = [0, *(at for one in seen for at in (one.start, one.stop)), query_SND.size(0)]
        parts = list(query_SND.split([b - a for a, b in pairwise(bounds)]))
        for number, one in enumerate(seen):
            own = slice(one.first, one.last)
            parts[1 + 2 * number] = attend(
                parts[1 + 2 * number], _joined(keys[own]), _joined(values[own]), self.core_attention.softmax_scale
            )
        for number in range(0, len(parts), 2):
            parts[number] = parts[number] * 0.0
        return torch.cat(parts)

    def _one_call(self, query_SND: Tensor, key_FGD: Tensor, value_FGD: Tensor, packed: PackedSeqParams) -> Tensor:
        """Attend by one call of torch's attention on packs (not run on a GPU)."""
        kept, device = two_way_plans(packed), query_SND.device
        if _CALLS not in kept:
            seen, borders = sights(packed), np.cumsum([0, *picture_rows(packed)])
            queries = [np.arange(one.start, one.stop) for one in seen]
            keys = [np.arange(borders[one.first], borders[one.last]) for one in seen]
            index = [to_device(torch.from_numpy(np.concatenate(some)), device) for some in (queries, keys)]
            cuts = [
                to_device(torch.from_numpy(np.cumsum([0, *map(len, some)]).astype(np.int32)), device)
                for some in (queries, keys)
            ]
            kept[_CALLS] = *index, *cuts, max(map(len, queries)), max(map(len, keys))
        rows, columns, cuts_q, cuts_k, longest, most = kept[_CALLS]
        found = self.core_attention.kernel(
            query_SND[rows], key_FGD[columns], value_FGD[columns], cuts_q, cuts_k, longest, most, (-1, -1)
        )
        return (query_SND * 0.0).index_copy(0, rows, found)


def _seen_together(rows: Sequence[int], seen: Sequence[Sight]) -> tuple[list[int], list[Sight]]:
    """Return pictures that are seen together as one, for sights of which none sees another's."""
    found, told, at = list[int](), list[Sight](), 0
    for one in seen:
        found += rows[at : one.first]
        told.append(one._replace(first=len(found), last=len(found) + 1))
        found.append(sum(rows[one.first : one.last]))
        at = one.last
    return [*found, *rows[at:]], told


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def attend(query_SND: Tensor, key_FGD: Tensor, value_FGD: Tensor, scale: float | None) -> Tensor:
    """Return [S, N, D]: all queries see all keys."""
    query, key, value = (one.transpose(0, 1).unsqueeze(0) for one in (query_SND, key_FGD, value_FGD))
    grouped = query.size(1) != key.size(1)
    found = F.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=grouped)
    return found.squeeze(0).transpose(0, 1)


class PictureLayer(TransformerLayer):
    """A layer whose attention is :class:`PictureAttention`; both branches are gated, and none reaches who sees nothing.

    Without pictures, and without gradients, it does nothing at all.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.mlp_bda = GatedSum(config)  # which Megatron-Core builds without the configuration

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, context: Tensor | None = None, **given: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Return [S, 1, E], and the features [F, 1, E] for the layers behind it."""
        packed: PackedSeqParams = given["packed_seq_params"]
        kept = self.cross_attention.kept
        going_on = kept is not None and kept.goes_on
        if context is None and not going_on:
            assert not torch.is_grad_enabled(), "in training there are always features to learn by"
            return hidden_states, None
        attended = self.cross_attention(self.input_layernorm(hidden_states), context, packed)
        hidden_states = self._sum(self.cross_attn_bda, attended, hidden_states)
        output, bias = self.mlp(self.pre_mlp_layernorm(hidden_states))
        assert bias is None, "a bias would reach positions that see nothing"
        output = torch.where(self._seen(output, packed, going_on), output, torch.zeros_like(output))
        return self._sum(self.mlp_bda, output, hidden_states), context

    def _sum(self, gate: Any, branch: Tensor, stream: Tensor) -> Tensor:
        added: Tensor = gate(self.training, self.config.bias_dropout_fusion)(
            (branch, None), stream, self.hidden_dropout
        )
        return added

    def _seen(self, like: Tensor, packed: PackedSeqParams, going_on: bool) -> Tensor:
        """Return [S, 1, 1], with sequence parallelism of this rank's positions."""
        ranks = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        length = like.size(0) * ranks
        if going_on:
            mask = self.cross_attention.kept.seen(length, like.device)
        else:
            mask = seen_positions(packed, length, like.device)
        return mask if ranks == 1 else mask.chunk(ranks)[mpu.get_tensor_model_parallel_rank()]
