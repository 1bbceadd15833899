"""Attention as megavlm plugs it into Megatron-Core's layers: a core in plain torch, and what is kept of split heads.

Shape legend: S query positions, K key positions, B batch, T = tokens of a pack, N query heads and G key/value
heads of this tensor-parallel rank, D width of a head.
"""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megavlm.layers.context_attention import chunk_call, gathered, lower_right
from megavlm.layers.segments import context_split, segment_lengths
from megavlm.parallel.context import ContextSplit
from megavlm.parallel.device import has_kernels

_varlen_attn: Any = None
if has_kernels():  # torch 2.10 and later; without it, segments are attended to one by one
    with contextlib.suppress(ImportError):
        from torch.nn.attention.varlen import varlen_attn as _varlen_attn

_SIXTEEN_BITS = (torch.bfloat16, torch.float16)


def _has_argument(function: Any, name: str) -> bool:
    return function is not None and name in inspect.signature(function).parameters


# Later versions want to be told that keys are grouped; earlier ones see it.
_GROUPED = {"enable_gqa": True} if _has_argument(_varlen_attn, "enable_gqa") else {}


class TorchAttention(MegatronModule):
    """``scaled_dot_product_attention`` behind Megatron-Core's core-attention interface.

    Unpacked input is [S, B, N, D]. Packed input (``qkv_format="thd"``) is [T, N, D]; each segment attends to
    itself alone, and what follows the last segment gets zeros.

    Args:
        sliding_window: causal attention to so many positions, each's own among them; None for all before it. What else
            it takes is Megatron-Core's.

    Raises:
        ValueError: an explicit attention mask or bias, or a mask type that is neither causal nor no_mask.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        sliding_window: int | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.attn_mask_type = attn_mask_type
        self.sliding_window = sliding_window
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

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
            query: [S, B, N, D] or [T, N, D].
            key: [K, B, G, D] or [T, G, D].
            value: like ``key``.
            attention_mask: must be None: the mask follows from the mask type and the packing.
            attn_mask_type: overrides the mask type of the constructor.
            attention_bias: must be None.
            packed_seq_params: segment borders of a packed input.

        Returns:
            [S, B, N * D], or [T, N, D] where the input was packed.
        """
        if attention_mask is not None or attention_bias is not None:
            raise ValueError("TorchAttention takes no explicit mask or bias")
        mask_type = attn_mask_type or self.attn_mask_type
        if mask_type in (AttnMaskType.causal, AttnMaskType.padding_causal):
            causal = True
        elif mask_type in (AttnMaskType.no_mask, AttnMaskType.padding):
            causal = False
        else:
            raise ValueError(f"TorchAttention knows causal and no_mask, not {mask_type}")
        if packed_seq_params is not None and packed_seq_params.qkv_format == "thd":
            if (split := context_split(packed_seq_params)) is not None:
                assert causal and not (self.dropout and self.training), "a pack that is cut is causal, without dropout"
                return self._cut(query, *gathered(key, value, split), packed_seq_params, split)
            return self._packed(query, key, value, causal, packed_seq_params)
        context_BNSD = self._attend(
            query.permute(1, 2, 0, 3), key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3), causal
        )
        return context_BNSD.permute(2, 0, 1, 3).flatten(2)

    def _packed(
        self, query_TND: Tensor, key_TGD: Tensor, value_TGD: Tensor, causal: bool, packed: PackedSeqParams
    ) -> Tensor:
        lengths = segment_lengths(packed)
        total = sum(lengths)
        rest = query_TND.size(0) - total
        if self.takes_kernel(query_TND):
            context_TND = self._all_segments(query_TND[:total], key_TGD[:total], value_TGD[:total], causal, packed)
            return F.pad(context_TND, (0, 0, 0, 0, 0, rest)) if rest else context_TND
        parts = []
        for q, k, v in zip(
            query_TND[:total].split(lengths),
            key_TGD[:total].split(lengths),
            value_TGD[:total].split(lengths),
            strict=True,
        ):
            context_BNSD = self._attend(
                q.transpose(0, 1).unsqueeze(0), k.transpose(0, 1).unsqueeze(0), v.transpose(0, 1).unsqueeze(0), causal
            )
            parts.append(context_BNSD.squeeze(0).transpose(0, 1))
        if rest:
            parts.append(query_TND.new_zeros(rest, *query_TND.shape[1:]))
        return torch.cat(parts)

    def _cut(
        self, query_PND: Tensor, key_LGD: Tensor, value_LGD: Tensor, packed: PackedSeqParams, split: ContextSplit
    ) -> Tensor:
        """Return [P, N, D] of this rank's positions of a pack that context-parallel ranks share, given all keys."""
        if self.takes_kernel(query_PND):
            call = chunk_call(split, self.sliding_window, query_PND.device)
            return self.kernel(
                query_PND, key_LGD.index_select(0, call.keys), value_LGD.index_select(0, call.keys), call.borders,
                call.key_borders, call.longest, call.most_keys, ((self.sliding_window or 0) - 1, 0),
            )  # fmt: skip
        lengths, parts = split.lengths, []
        queries = iter(query_PND.split([stop - start for one in lengths for start, stop in split.chunks(one)]))
        for length, key, value in zip(lengths, key_LGD.split(lengths), value_LGD.split(lengths), strict=True):
            key_1GSD, value_1GSD = (one.transpose(0, 1).unsqueeze(0) for one in (key, value))
            for _, stop in split.chunks(length):
                query_1NQD = next(queries).transpose(0, 1).unsqueeze(0)
                context_1NQD = self._attend_last(query_1NQD, key_1GSD[:, :, :stop], value_1GSD[:, :, :stop])
                parts.append(context_1NQD.squeeze(0).transpose(0, 1))
        return torch.cat(parts)

    def _attend_last(self, query_BNQD: Tensor, key_BGKD: Tensor, value_BGKD: Tensor) -> Tensor:
        """Attend causally from the last Q of K positions."""
        window = self.sliding_window
        if window is not None and key_BGKD.size(2) > window:
            return self._in_window(query_BNQD, key_BGKD, value_BGKD, window)
        return lower_right(query_BNQD, key_BGKD, value_BGKD, self.softmax_scale)

    def takes_kernel(self, query_TND: Tensor) -> bool:
        """Whether a kernel for packs can attend."""
        dropout = self.dropout if self.training else 0.0
        return _varlen_attn is not None and query_TND.is_cuda and query_TND.dtype in _SIXTEEN_BITS and not dropout

    def _all_segments(
        self, query_TND: Tensor, key_TGD: Tensor, value_TGD: Tensor, causal: bool, packed: PackedSeqParams
    ) -> Tensor:
        """One flash-attention kernel for the whole pack.

        Its cost does not depend on how the pack is cut. ``scaled_dot_product_attention`` on each segment would take
        cuDNN's attention on Hopper, which builds and keeps a plan for every length that it has not seen.
        """
        borders, longest = packed.cu_seqlens_q, max(segment_lengths(packed))
        window = ((self.sliding_window or 0) - 1, 0) if causal else (-1, -1)
        return self.kernel(query_TND, key_TGD, value_TGD, borders, borders, longest, longest, window)

    def kernel(
        self, query_TND: Tensor, key_LGD: Tensor, value_LGD: Tensor, borders: Tensor, key_borders: Tensor,
        longest: int, most_keys: int, window: tuple[int, int],
    ) -> Tensor:  # fmt: skip
        """Attend from each segment of queries to one of keys, whose last positions are aligned.

        Args:
            query_TND: queries.
            key_LGD: keys.
            value_LGD: values.
            borders: int32, where each segment of queries starts, and T.
            key_borders: the same of keys, and L.
            longest: positions of the longest segment of queries.
            most_keys: of keys.
            window: keys before and behind a query's own that it sees; -1 for all.

        Returns:
            [T, N, D].
        """
        return _varlen_attn(
            query_TND,
            key_LGD,
            value_LGD,
            borders,
            key_borders,
            longest,
            most_keys,
            scale=self.softmax_scale,
            window_size=window,
            **_GROUPED,
        )

    def _attend(self, query_BNSD: Tensor, key_BGKD: Tensor, value_BGKD: Tensor, causal: bool) -> Tensor:
        window = self.sliding_window
        if causal and window is not None and query_BNSD.size(2) > window:
            return self._in_window(query_BNSD, key_BGKD, value_BGKD, window)
        return F.scaled_dot_product_attention(
            query_BNSD,
            key_BGKD,
            value_BGKD,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=causal,
            scale=self.softmax_scale,
            enable_gqa=query_BNSD.size(1) != key_BGKD.size(1),
        )

    def _in_window(self, query_BNSD: Tensor, key_BGKD: Tensor, value_BGKD: Tensor, window: int) -> Tensor:
        """Attend causally to ``window`` positions, as many queries at a time: to at most twice as many keys.

        Queries are the last of the positions that have keys.
        """
        parts, length = [], key_BGKD.size(2)
        before = length - query_BNSD.size(2)
        for start in range(before, length, window):
            stop, first = min(start + window, length), max(start - window + 1, 0)
            rows = torch.arange(start, stop, device=query_BNSD.device)[:, None]
            columns = torch.arange(first, stop, device=query_BNSD.device)
            parts.append(
                F.scaled_dot_product_attention(
                    query_BNSD[:, :, start - before : stop - before],
                    key_BGKD[:, :, first:stop],
                    value_BGKD[:, :, first:stop],
                    attn_mask=(columns <= rows) & (columns > rows - window),
                    dropout_p=self.dropout if self.training else 0.0,
                    scale=self.softmax_scale,
                    enable_gqa=query_BNSD.size(1) != key_BGKD.size(1),
                )
            )
        return torch.cat(parts, dim=2)


class CompactSelfAttention(SelfAttention):
    """Megatron-Core's self-attention, which lets go of what it gathers.

    Where tensor parallelism is larger than the number of key/value heads, several ranks share one. Each has an even
    part of the rows of ``linear_qkv``, whichever heads these belong to; Megatron-Core gathers the outputs of all ranks,
    and each takes its queries and its one key/value head. These are views: a value of width D would keep all
    N x D + 2 G x D gathered numbers of a token in memory until the backward pass.

    Args:
        sliding_window: what its core attention was told, for who stands in for that; None for no window. What else it
            takes is Megatron-Core's.
        rotary_part: which of the two tables it turns heads by that :class:`megavlm.layers.rotary.TwoRotaries` gives;
            None where there is one.
    """

    def __init__(
        self, *args: Any, sliding_window: int | None = None, rotary_part: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.sliding_window, self.rotary_part = sliding_window, rotary_part

    def forward(self, *args: Any, rotary_pos_emb: Any = None, **kwargs: Any) -> Any:
        """Attend; arguments as of Megatron-Core's."""
        if self.rotary_part is not None and isinstance(rotary_pos_emb, Tensor):
            rotary_pos_emb = rotary_pos_emb.chunk(2, dim=-1)[self.rotary_part]
        return super().forward(*args, rotary_pos_emb=rotary_pos_emb, **kwargs)

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        """Return queries, keys and values [S, B, heads of this rank, D]."""
        tensors = super().get_query_key_value_tensors(*args, **kwargs)
        if self.config.num_query_groups >= self.world_size:
            return tensors
        return tuple(tensor.contiguous() for tensor in tensors)
