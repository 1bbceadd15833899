"""An encoder and a decoder in one block of layers (T5, arXiv 1910.10683; UL2, arXiv 2205.05131).

What stands in front of a sample's answer goes through the encoder, whose positions all see each other; the rest through
the decoder, whose layers attend to what is before them, and then to what the encoder made of their sample. Its first
position is the last one in front of the answer (T5's ``decoder_start_token_id``). Which these are is told by the spans
of the pack (``megavlm.data.spans``, kind ``prefix``).

Heads have a bias by the distance between query and key, one table for all layers of a stack, in self-attention alone;
products of queries and keys are not divided (``T5Attention`` of Transformers, ``models/t5/modeling_t5.py``).

The block takes and gives the rows of the whole pack, as Megatron-Core's GPTModel has them between embedding and output
layer: those of the encoder come back as zeros, and no loss counts them.

Shape legend: S positions of a pack, P and Q those of the encoder and of the decoder with what fills them up for
sequence parallelism, K keys, N heads of this tensor-parallel rank, D width of a head, E width of the model, L one more
than the largest distance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
    scatter_to_tensor_model_parallel_region,
)
from megatron.core.transformer.attention import CrossAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megavlm.layers.segments import packed_segments, segment_lengths, to_device, two_way_spans

_ENCODED = "encoded"
"""Attribute of the decoder's pack: the lengths of the encoder's segments, one for each of its own."""


@dataclass(frozen=True)
class Parting:
    """Which positions of a pack go where; both lists have an entry for each segment, and one for what fills up."""

    encoder: list[int]
    """Lengths of the encoder's segments; 0 where a sample has nothing in front of its answer."""
    decoder: list[int]
    encoder_rows: list[int]
    """Positions in the pack."""
    decoder_rows: list[int]

    @staticmethod
    def of(packed: PackedSeqParams, multiple: int) -> Parting:
        """Part a pack; both stacks get at least one row that fills up, so that all weights have a gradient.

        Args:
            packed: the pack.
            multiple: what the rows of either stack are a multiple of.
        """
        spans, start = dict(two_way_spans(packed) or ()), 0
        found = Parting([], [], [], [])
        for length in segment_lengths(packed):
            stop = start + length
            middle = max(spans.get(start, start) - 1, start)
            found.encoder.append(middle - start)
            found.decoder.append(stop - middle)
            found.encoder_rows.extend(range(start, middle))
            found.decoder_rows.extend(range(middle, stop))
            start = stop
        for lengths in (found.encoder, found.decoder):
            lengths.append(multiple - sum(lengths) % multiple)
        return found


class DistanceBias(MegatronModule):
    """T5's bias of heads by distance.

    Args:
        config: of the block.
        buckets: rows of the table.
        farthest: distance from which on all share the last bucket.
        both_ways: keys behind the query have half of the buckets.
    """

    def __init__(self, config: TransformerConfig, buckets: int, farthest: int, *, both_ways: bool) -> None:
        super().__init__(config=config)
        self.buckets, self.farthest, self.both_ways = buckets, farthest, both_ways
        # Whole on each rank: the mapping behind it gathers the gradients of all ranks' heads.
        self.weight = torch.nn.Parameter(torch.empty(buckets, config.num_attention_heads, dtype=config.params_dtype))
        if config.perform_initialization:
            assert config.init_method is not None
            config.init_method(self.weight)

    def forward(self, length: int) -> Tensor:
        """Return [2 L - 1, N]: of keys from L - 1 positions before the query to as many behind it, L = ``length``."""
        rows = to_device(torch.from_numpy(self.rows(np.arange(1 - length, length))), self.weight.device)
        return scatter_to_tensor_model_parallel_region(F.embedding(rows, self.weight))

    def rows(self, distances: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return the row of the table for each distance, which is the key's position less the query's."""
        buckets, far = self.buckets, np.maximum(-distances, 0)
        first = np.zeros_like(distances)
        if self.both_ways:
            buckets //= 2
            first, far = np.where(distances > 0, buckets, 0), np.abs(distances)
        exact = buckets // 2
        # In fp32 as there, where it decides between two rows.
        part = np.log(np.maximum(far, 1).astype(np.float32) / np.float32(exact)) / np.float32(
            math.log(self.farthest / exact)
        )
        wide = exact + (part * np.float32(buckets - exact)).astype(np.int64)
        return first + np.where(far < exact, far, np.minimum(wide, buckets - 1))


class DistanceAttention(MegatronModule):
    """Attention within segments, and from the decoder's to the encoder's, behind Megatron-Core's interface.

    What else it takes is Megatron-Core's.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.causal, self.across = attn_mask_type is AttnMaskType.causal, attention_type == "cross"
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [Q, N, D].
            key: [K, N, D].
            value: like ``key``.
            attention_mask: [2 L - 1, N] biases of :class:`DistanceBias`; None from decoder to encoder. Megatron-Core
                hands its mask through recomputation, with gradients, and its bias not.
            attn_mask_type: that of the constructor.
            attention_bias: None.
            packed_seq_params: the segments.

        Returns:
            [Q, N, D]; zeros where a segment has no keys.
        """
        assert packed_seq_params is not None and attention_bias is None, "packs alone, with biases by distance"
        lengths = segment_lengths(packed_seq_params)
        others = getattr(packed_seq_params, _ENCODED) if self.across else lengths
        parts = []
        for q, k, v in zip(query.split(lengths), key.split(others), value.split(others), strict=True):
            if not (len(q) and len(k)):
                parts.append(q * 0.0)
                continue
            q_1NQD, k_1NKD, v_1NKD = (one.transpose(0, 1).unsqueeze(0) for one in (q, k, v))
            bias = None if attention_mask is None else self._bias(attention_mask, len(q)).to(q.dtype)
            context_1NQD = F.scaled_dot_product_attention(
                q_1NQD, k_1NKD, v_1NKD, attn_mask=bias, scale=self.softmax_scale
            )
            parts.append(context_1NQD.squeeze(0).transpose(0, 1))
        return torch.cat(parts)

    def _bias(self, by_distance: Tensor, length: int) -> Tensor:
        """Return [N, Q, Q] of a segment."""
        middle, places = by_distance.size(0) // 2, torch.arange(length, device=by_distance.device)
        distances = places - places[:, None]
        bias_NQQ = by_distance.T[:, distances + middle]
        return bias_NQQ.masked_fill(distances > 0, float("-inf")) if self.causal else bias_NQQ


class EncodedAttention(CrossAttention):
    """Attention to the encoder's positions of the same sample."""

    packed: PackedSeqParams | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Attend; arguments as of Megatron-Core's, which has no pack for it."""
        return super().forward(*args, packed_seq_params=self.packed, **kwargs)


class AnsweringLayer(TransformerLayer):
    """A layer of the decoder."""

    def forward(self, *args: Any, packed_seq_params: Any = None, **kwargs: Any) -> Any:
        """Run the layer; arguments as of Megatron-Core's, ``context`` is the encoder's output [P, 1, E]."""
        self.cross_attention.packed = packed_seq_params
        return super().forward(*args, packed_seq_params=packed_seq_params, **kwargs)


class EncoderDecoderBlock(TransformerBlock):
    """The decoder's block, which has the encoder's in it. A built block is turned into one."""

    encoder: TransformerBlock
    relative: DistanceBias
    encoder_relative: DistanceBias

    @classmethod
    def take_over(cls, block: TransformerBlock, encoder: TransformerBlock, buckets: int, farthest: int) -> None:
        """Turn ``block``, of layers that attend to ``encoder``'s output, into one of these."""
        block.__class__ = cls
        block.encoder = encoder
        block.encoder_relative = DistanceBias(block.config, buckets, farthest, both_ways=True)
        block.relative = DistanceBias(block.config, buckets, farthest, both_ways=False)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *, packed_seq_params: Any, **kwargs: Any
    ) -> Tensor:
        """Return [S, 1, E] of a pack of whole samples, with sequence parallelism this rank's rows.

        Args:
            hidden_states: [S, 1, E], of all positions.
            attention_mask: None.
            packed_seq_params: the pack, with its spans.
            kwargs: what else GPTModel hands to its layers.
        """
        assert attention_mask is None, "who sees whom follows from the pack"
        shared = bool(self.config.sequence_parallel)
        parting = Parting.of(packed_seq_params, self.config.tensor_model_parallel_size if shared else 1)
        whole_S1E = hidden_states
        if shared:
            whole_S1E = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=False)
        device = whole_S1E.device
        asked, answer = (_pack(lengths, device) for lengths in (parting.encoder, parting.decoder))
        setattr(answer, _ENCODED, parting.encoder)
        encoded = self.encoder(
            _rows(whole_S1E, parting.encoder_rows, parting.encoder, shared=shared),
            attention_mask=self.encoder_relative(max(parting.encoder)),
            packed_seq_params=asked,
        )
        answered = super().forward(
            _rows(whole_S1E, parting.decoder_rows, parting.decoder, shared=shared),
            attention_mask=self.relative(max(parting.decoder)),
            context=encoded,
            packed_seq_params=answer,
            **kwargs,
        )
        if shared:
            answered = gather_from_sequence_parallel_region(answered, tensor_parallel_output_grad=False)
        rows = to_device(torch.tensor(parting.decoder_rows), device)
        back_S1E = torch.zeros_like(whole_S1E).index_copy(0, rows, answered[: len(parting.decoder_rows)])
        return scatter_to_sequence_parallel_region(back_S1E) if shared else back_S1E


def _pack(lengths: list[int], device: torch.device) -> PackedSeqParams:
    """Describe the segments of a stack."""
    return packed_segments(np.cumsum([0, *lengths], dtype=np.int32), device)


def _rows(whole_S1E: Tensor, rows: list[int], lengths: list[int], *, shared: bool) -> Tensor:
    """Return these rows, filled up with zeros, with sequence parallelism this rank's of them."""
    own = whole_S1E.index_select(0, to_device(torch.tensor(rows, dtype=torch.int64), whole_S1E.device))
    own = F.pad(own, (0, 0, 0, 0, 0, sum(lengths) - len(rows)))
    return scatter_to_sequence_parallel_region(own) if shared else own
