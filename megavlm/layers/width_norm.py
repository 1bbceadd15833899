"""Norms over a width that the tensor-parallel ranks share, and biases of some of queries, keys and values.

Queries and keys over all heads together (InternViT-6B); what goes into the last layer of attention or MLP (EVA02).

Shape legend: S positions, B batch, N heads of this tensor-parallel rank, D width of a head.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megavlm.layers.arrival import wait_for_weights
from megavlm.layers.attention import CompactSelfAttention


class _Scale(torch.nn.Module):
    """The weight of a norm over all heads: each tensor-parallel rank has that of its own heads."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(size, dtype=dtype))
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)


class _Bias(torch.nn.Module):
    """A bias of the heads of each tensor-parallel rank."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(size, dtype=dtype))
        set_tensor_model_parallel_attributes(self.bias, is_parallel=True, dim=0, stride=1)


class QueryValueBiasSelfAttention(CompactSelfAttention):
    """Self-attention whose queries and values have a bias, and whose keys have none (EVA); its projection has none."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        own = self.num_attention_heads_per_partition * self.hidden_size_per_attention_head
        assert config.num_query_groups == config.num_attention_heads, "of grouped queries nothing is known"
        self.query = _Bias(own, config.params_dtype)
        self.value = _Bias(own, config.params_dtype)

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        """Return queries, keys and values [S, B, N, D]."""
        query, key, value = super().get_query_key_value_tensors(*args, **kwargs)
        wait_for_weights(self.query, self.value)  # which nobody calls
        return query + self.query.bias.view(query.shape[-2:]), key, value + self.value.bias.view(value.shape[-2:])


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
        wait_for_weights(self.query_norm, self.key_norm)  # which nobody calls
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


class SharedLayerNorm(torch.nn.Module):
    """LayerNorm of [.., size], of which each tensor-parallel rank has a part: of the numbers and of the parameters.

    The mean is summed over the ranks before the squares around it are: two all-reduces of a number per position, and as
    many for the gradients.

    Args:
        size: numbers of a position, of all ranks together.
        eps: added to the variance.
        dtype: of the parameters.
    """

    def __init__(self, size: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.tp_group = mpu.get_tensor_model_parallel_group()  # that of now: a part may be built as on one rank
        self.size, self.eps = size, eps
        own = size // self.tp_group.size()
        self.weight = torch.nn.Parameter(torch.ones(own, dtype=dtype))
        self.bias = torch.nn.Parameter(torch.zeros(own, dtype=dtype))
        for parameter in self.parameters():
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the part of this rank [.., size / TP], normalised; in the number type of ``x``."""
        if self.tp_group.size() == 1:
            return F.layer_norm(x, (self.size,), self.weight, self.bias, self.eps)
        wide = x.float()
        wide = wide - self._mean(wide)
        normed = wide * torch.rsqrt(self._mean(wide.square()) + self.eps)
        return (normed * self.weight.float() + self.bias.float()).to(x.dtype)

    def _mean(self, x: Tensor) -> Tensor:
        """[.., 1] mean over all ranks' parts, each of which depends on it."""
        total = reduce_from_tensor_model_parallel_region(x.sum(-1, keepdim=True), group=self.tp_group)
        return copy_to_tensor_model_parallel_region(total, group=self.tp_group) / self.size

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return where the parameters lie in a checkpoint, as Megatron-Core's layers do."""
        assert metadata is not None
        own = self.state_dict(keep_vars=True)
        state: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            own, prefix, dict.fromkeys(own, 0), sharded_offsets, tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )  # fmt: skip
        return state


@functools.cache
def with_input_norm(linear: Any) -> Any:
    """Return a kind of row-parallel layer with a LayerNorm, ``norm``, of what goes into it."""

    class Normed(linear):
        def __init__(self, input_size: int, *args: Any, config: TransformerConfig, **kwargs: Any) -> None:
            super().__init__(input_size, *args, config=config, **kwargs)
            self.norm = SharedLayerNorm(input_size, config.layernorm_epsilon, config.params_dtype)

        def forward(self, x: Tensor) -> Any:
            return super().forward(self.norm(x))

        def sharded_state_dict(
            self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
        ) -> dict[str, Any]:
            state: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
            # Megatron-Core's layer takes all but its weight for the same on all ranks.
            return state | self.norm.sharded_state_dict(f"{prefix}norm.", sharded_offsets, metadata)

    Normed.__name__ = Normed.__qualname__ = f"Normed{linear.__name__}"
    return Normed
