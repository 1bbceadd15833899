"""Multi-head latent attention (MLA; DeepSeek-V2, arXiv 2405.04434): keys and values are made of one narrow latent.

A token's latent is normalised and expanded to each head's keys and values; beside it stands one short key for all
heads, which alone carries the position. Here a head's channels that have the position stand in front of those that
have none, in queries and in keys: the scores are the same, and what turns a part of a head (rotary positions, the cache
of generation) takes the first channels.

Megatron-Core's ``MLASelfAttention`` (0.16.1) is not this: it refuses angles of positions from outside, which packs and
generation here bring, and with plain linear layers it gives each tensor-parallel rank its own heads' part of the
gradient of the shared key (``gather_from_tensor_model_parallel_region`` adds nothing up on the way back). The linear
layers, the attention around them and the core are Megatron-Core's here too.

Values may be narrower than keys. They are filled up with zeros, which every core attention takes (flash attention
needs one width), and cut out of its result.

Shape legend: S positions, L those of this rank's part of the sequence (S without sequence parallelism), B batch, N
heads of this tensor-parallel rank, D width of a head's queries and keys, R of those channels that are turned, V width
of its values, K width of the latent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megavlm.parallel.device import local_device

EPSILON = 1e-6
"""Of the norms of latents, whatever the model's others have: ``DeepseekV2RMSNorm`` is made without one for these
(modeling_deepseek.py of deepseek-ai/DeepSeek-VL2 @ ef9f91e2, modeling_deepseek_v2.py of Transformers)."""


@dataclass(frozen=True)
class LatentHeads:
    """Sizes of latent attention."""

    turned: int
    """R. D is ``config.kv_channels``."""
    value: int
    """V."""
    latent: int
    """K."""
    query_latent: int | None
    """Width of the latent that queries are made of; None where they are made of the stream."""


@dataclass
class LatentSubmodules:
    """The parts of :class:`LatentAttention`."""

    linear_q: Any
    """Column-parallel: to the queries, of the stream or of their latent."""
    linear_kv_up: Any
    """Column-parallel: latent to keys and values."""
    linear_proj: Any
    """Row-parallel."""
    core_attention: Any
    norm: Any


class WholeLinear(torch.nn.Module):
    """A linear layer without bias that every tensor-parallel rank has whole, for its part of the sequence.

    Args:
        input_size: in.
        output_size: out.
        config: number type, initial weights, sequence parallelism.
    """

    def __init__(self, input_size: int, output_size: int, config: TransformerConfig) -> None:
        super().__init__()
        device = "cpu" if config.use_cpu_initialization else local_device()
        self.weight = torch.nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype, device=device))
        if config.perform_initialization:
            assert config.init_method is not None
            config.init_method(self.weight)  # drawn alike by all ranks, as a router's
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """[.., in] to [.., out]."""
        return F.linear(x, self.weight)


class LatentAttention(Attention):
    """Self-attention whose keys and values are made of a latent.

    Args:
        heads: sizes; what else it takes is Megatron-Core's.
    """

    def __init__(
        self, config: TransformerConfig, submodules: LatentSubmodules, *args: Any, heads: LatentHeads, **kwargs: Any
    ) -> None:
        super().__init__(config, submodules, *args, attention_type="self", **kwargs)
        assert config.num_query_groups == config.num_attention_heads, "each head has keys of its own"
        self.heads, self.unturned = heads, self.hidden_size_per_attention_head - heads.turned
        # Megatron-Core's has asked for these; queries and keys have no norm of their own.
        self.q_layernorm = self.k_layernorm = None
        hidden, count = config.hidden_size, config.num_attention_heads
        column = {"config": config, "init_method": config.init_method, "gather_output": False, "bias": False,
                  "skip_bias_add": False, "is_expert": False, "tp_group": self.pg_collection.tp}  # fmt: skip
        width = hidden
        if heads.query_latent is not None:
            width = heads.query_latent
            self.linear_q_down_proj = WholeLinear(hidden, width, config)
            self.q_latent_norm = build_module(submodules.norm, hidden_size=width, config=config, eps=EPSILON)
        name = "linear_q_proj" if heads.query_latent is None else "linear_q_up_proj"
        self.add_module(name, build_module(submodules.linear_q, width, self.query_projection_size, **column))
        self.linear_kv_down_proj = WholeLinear(hidden, heads.latent + heads.turned, config)
        self.kv_latent_norm = build_module(submodules.norm, hidden_size=heads.latent, config=config, eps=EPSILON)
        self.linear_kv_up_proj = build_module(
            submodules.linear_kv_up, heads.latent, count * (self.unturned + heads.value), **column
        )
        # Of the width of values, in the place of Megatron-Core's, whose are as wide as keys.
        self.linear_proj = build_module(
            submodules.linear_proj, count * heads.value, hidden, config=config,
            init_method=config.output_layer_init_method, bias=False, input_is_parallel=True, skip_bias_add=True,
            is_expert=False, tp_comm_buffer_name="proj", tp_group=self.pg_collection.tp,
        )  # fmt: skip
        self.linear_proj.register_forward_pre_hook(lambda _, inputs: (self._values(inputs[0]), *inputs[1:]))

    def _values(self, context_SBC: Tensor) -> Tensor:
        """Cut the zeros that values were filled up with out of [S, B, N * D]: [S, B, N * V]."""
        wide = context_SBC.unflatten(-1, (-1, self.hidden_size_per_attention_head))
        return wide[..., : self.heads.value].flatten(-2)

    def get_query_key_value_tensors(
        self, hidden_states: Tensor, *_: Any, output_gate: bool = False, split_qkv: bool = True, **__: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values [S, B, N, D] of ``hidden_states`` [L, B, H]."""
        assert split_qkv and not output_gate, "of these Megatron-Core knows self-attention alone"
        heads, own = self.heads, self.num_attention_heads_per_partition
        if heads.query_latent is None:
            query, _ = self.linear_q_proj(hidden_states)
        else:
            query, _ = self.linear_q_up_proj(self.q_latent_norm(self.linear_q_down_proj(hidden_states)))
        query = query.unflatten(-1, (own, -1))
        latent, turned = self.linear_kv_down_proj(hidden_states).split((heads.latent, heads.turned), dim=-1)
        expanded = self.linear_kv_up_proj(self.kv_latent_norm(latent))[0].unflatten(-1, (own, -1))
        # Each rank's heads add to the gradient of the one short key.
        if self.config.sequence_parallel:
            turned = gather_from_sequence_parallel_region(turned, tensor_parallel_output_grad=True, group=self.tp_group)
        else:
            turned = copy_to_tensor_model_parallel_region(turned, group=self.tp_group)
        free = self.unturned
        query = torch.cat((query[..., free:], query[..., :free]), dim=-1)
        key = torch.cat((turned.unsqueeze(2).expand(-1, -1, own, -1), expanded[..., :free]), dim=-1)
        value = F.pad(expanded[..., free:], (0, query.size(-1) - heads.value))
        return query, key, value
