"""Attention whose queries, and whose keys, are normalised over all heads together (InternViT-6B).

Shape legend: S positions, B batch, N heads of this tensor-parallel rank, D width of a head.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from megavlm.layers.attention import CompactSelfAttention


class _Scale(torch.nn.Module):
    """The weight of a norm over all heads: each tensor-parallel rank has that of its own heads."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(size, dtype=dtype))
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)


class WidthNormSelfAttention(CompactSelfAttention):
    """Self-attention with an RMSNorm over the whole width of queries, and one of keys.

    Each rank has some of the heads, so the mean squares are summed over the ranks: both norms' in one all-reduce, of a
    number per position. The gradient of these sums is summed likewise, since every rank's heads are divided by them.
    The weights are not called ``q_layernorm``: Megatron-Core adds up the gradients of what is called so over the ranks,
    and these are each rank's own.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        own = self.num_attention_heads_per_partition * self.hidden_size_per_attention_head
        assert config.num_query_groups == config.num_attention_heads, "of grouped queries nothing is known"
        self.query_norm = _Scale(own, config.params_dtype)
        self.key_norm = _Scale(own, config.params_dtype)

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        """Return queries, keys and values [S, B, N, D]."""
        query, key, value = super().get_query_key_value_tensors(*args, **kwargs)
        group = self.pg_collection.tp
        wide = [query.float(), key.float()]
        squares_2SB11 = torch.stack([x.square().sum((-2, -1), keepdim=True) for x in wide])
        if group.size() > 1:
            squares_2SB11 = reduce_from_tensor_model_parallel_region(squares_2SB11, group=group)
            squares_2SB11 = copy_to_tensor_model_parallel_region(squares_2SB11, group=group)
        width = self.config.num_attention_heads * self.hidden_size_per_attention_head
        inverse_2SB11 = torch.rsqrt(squares_2SB11 / width + self.config.layernorm_epsilon)
        normed = [
            (x * inverse).to(query.dtype) * scale.weight.view(x.shape[-2:])
            for x, inverse, scale in zip(wide, inverse_2SB11, (self.query_norm, self.key_norm), strict=True)
        ]
        return normed[0], normed[1], value


@functools.cache
def without_bias(linear: Any) -> Any:
    """Return a kind of linear layer without a bias, whatever the configuration says of all of a layer's."""

    class Unbiased(linear):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "bias": False})

    Unbiased.__name__ = Unbiased.__qualname__ = f"Unbiased{linear.__name__}"
    return Unbiased
