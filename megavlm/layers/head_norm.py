"""LayerNorm of each head's queries and keys, with a weight and a bias of that head's own (Chameleon, arXiv 2405.09818).

Chameleon was trained with such a norm on each tensor-parallel rank, whose weights grew apart; published ones have a row
for each head.

Shape legend: S positions, B batch, N heads of this tensor-parallel rank, D width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megavlm.layers.attention import CompactSelfAttention

EPSILON = 1e-5
"""Of these norms, whatever the model's others have: ``ChameleonLayerNorm`` of Transformers has it fixed."""


class HeadLayerNorm(torch.nn.Module):
    """The norm of this rank's heads.

    Weight and bias have one axis, as those of other norms have, by which the optimizer knows what has no weight decay.

    Args:
        heads: N.
        width: D.
        dtype: of weight and bias.
    """

    def __init__(self, heads: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(heads * width, dtype=dtype))
        self.bias = torch.nn.Parameter(torch.zeros(heads * width, dtype=dtype))
        for parameter in self.parameters():
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)

    def forward(self, x_SBND: Tensor) -> Tensor:
        """Return [S, B, N, D], in the number type of ``x_SBND``."""
        shape = x_SBND.shape[-2:]
        normed = F.layer_norm(x_SBND, shape[-1:], eps=EPSILON)
        return normed * self.weight.view(shape) + self.bias.view(shape)


class HeadNormSelfAttention(CompactSelfAttention):
    """Self-attention with a :class:`HeadLayerNorm` of queries and one of keys; ranks share no key/value head.

    They are not called ``q_layernorm``: Megatron-Core adds up the gradients of what is called so over the ranks, and
    these are each rank's own.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        assert config.num_query_groups is not None
        assert config.num_query_groups % self.world_size == 0, "of key/value heads that ranks share nothing is known"
        width, dtype = self.hidden_size_per_attention_head, config.params_dtype
        self.query_norm = HeadLayerNorm(self.num_attention_heads_per_partition, width, dtype)
        self.key_norm = HeadLayerNorm(self.num_query_groups_per_partition, width, dtype)

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        """Return queries, keys and values [S, B, N, D]."""
        query, key, value = super().get_query_key_value_tensors(*args, **kwargs)
        return self.query_norm(query), self.key_norm(key), value
