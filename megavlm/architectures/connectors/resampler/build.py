"""Qwen-VL's cross-attention connector: fixed learned queries that look at the patches (arXiv 2308.12966).

Shape legend: N images, P patches of an image, W width of the tower, Q queries, E width of the language model,
and A = E / TP, the part of E on this tensor-parallel rank (whole heads).
"""

from __future__ import annotations

import math

import torch
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megavlm.architectures.connectors.resampler.config import ResamplerConfig
from megavlm.architectures.context import BuildContext
from megavlm.architectures.positions import resize_table, sincos_table
from megavlm.config.schema import ModelConfig
from megavlm.layers.linear import column_linear, row_linear
from megavlm.layers.specs import LayerKind, layer_modules


class Resampler(MegatronModule):
    """[P, N, W] patch features to [Q, N, E] image tokens: cross-attention, ``ln_post``, ``proj``.

    Heads are split over the tensor-parallel ranks; so are ``kv_proj`` and ``proj``, whose outputs are gathered.
    Keys see positions, values do not. Queries and positions are the same for every image.
    """

    def __init__(self, model: ModelConfig, context: BuildContext, *, query_positions: bool = True) -> None:
        width, embed = model.vision.feature_size, model.language.hidden_size
        connector = model.connector
        assert isinstance(connector, ResamplerConfig)
        assert connector.num_queries is not None and connector.head_dim is not None  # its rules
        config = TransformerConfig(
            num_layers=1,
            hidden_size=embed,
            num_attention_heads=embed // connector.head_dim,
            normalization="LayerNorm",
            layernorm_epsilon=model.vision.layernorm_epsilon,
            init_method_std=connector.init_method_std,
            **context.transformer_settings("connector"),
        )
        super().__init__(config=config)
        self.grid = model.vision.grid[0]
        self.head_dim = connector.head_dim
        dtype, side = context.dtype, math.isqrt(connector.num_queries)

        def column(size_in: int, size_out: int, *, bias: bool, gather: bool) -> torch.nn.Module:
            return column_linear(
                size_in, size_out, config=config, init_method=config.init_method, bias=bias, gather_output=gather
            )

        kind = LayerKind("full", head_dim=connector.head_dim)
        modules = layer_modules(kind, transformer_engine=context.transformer_engine)
        self.query = torch.nn.Parameter(torch.empty(connector.num_queries, embed, dtype=dtype))
        self.pos_embed: torch.nn.Parameter | None = None
        if query_positions:  # stored, never trained
            table = torch.empty(connector.num_queries, embed, dtype=dtype)
            self.pos_embed = torch.nn.Parameter(table, requires_grad=False)
        self.kv_proj = None if width == embed else column(width, embed, bias=False, gather=True)
        self.ln_q = modules.norm(config=config, hidden_size=embed, eps=config.layernorm_epsilon)
        self.ln_kv = modules.norm(config=config, hidden_size=embed, eps=config.layernorm_epsilon)
        self.linear_q = column(embed, embed, bias=True, gather=False)
        self.linear_k = column(embed, embed, bias=True, gather=False)
        self.linear_v = column(embed, embed, bias=True, gather=False)
        self.core_attention = build_module(
            modules.core_attention,
            config=config,
            layer_number=1,
            attn_mask_type=AttnMaskType.no_mask,
            attention_type="cross",
        )
        self.out_proj = row_linear(embed, embed, config=config, init_method=config.init_method)
        self.ln_post = modules.norm(config=config, hidden_size=embed, eps=config.layernorm_epsilon)
        self.proj = column_linear(
            embed,
            embed,
            config=config,
            init_method=lambda weight: torch.nn.init.normal_(weight, std=embed**-0.5),
            bias=False,
            gather_output=True,
        )
        if context.initialize:
            torch.nn.init.normal_(self.query, std=connector.init_method_std)
            if self.pos_embed is not None:
                with torch.no_grad():
                    self.pos_embed.copy_(sincos_table(embed, side))

    def forward(self, features_PNW: Tensor) -> Tensor:
        """Return [Q, N, E] image tokens of [P, N, W] patch features."""
        with get_fp8_context(self.config):  # nothing in bf16
            return self._resample(features_PNW)

    def _resample(self, features_PNW: Tensor) -> Tensor:
        images = features_PNW.size(1)
        x_PNE = self._narrowed(features_PNW)
        assert self.pos_embed is not None
        key_positions_PE = resize_table(self.pos_embed, self.grid)
        query_QNA = self._queries().expand(-1, images, -1)
        key_PNA = self.linear_k(x_PNE + key_positions_PE.unsqueeze(1))[0]
        value_PNA = self.linear_v(x_PNE)[0]
        context_QNA = self.core_attention(
            self._heads(query_QNA),
            self._heads(key_PNA),
            self._heads(value_PNA),
            None,
            attn_mask_type=AttnMaskType.no_mask,
        )
        return self._behind(context_QNA)

    def _narrowed(self, features_PNW: Tensor) -> Tensor:
        """Return [P, N, E]."""
        x_PNE: Tensor = self.ln_kv(features_PNW if self.kv_proj is None else self.kv_proj(features_PNW)[0])
        return x_PNE

    def _queries(self) -> Tensor:
        """Return [Q, 1, A]."""
        query_QE = self.ln_q(self.query)
        if self.pos_embed is not None:
            query_QE = query_QE + self.pos_embed
        query_Q1A: Tensor = self.linear_q(query_QE.unsqueeze(1))[0]
        return query_Q1A

    def _behind(self, context_QNA: Tensor) -> Tensor:
        """Return [Q, N, E] of what the heads give."""
        x_QNE = self.ln_post(self.out_proj(context_QNA)[0])
        tokens_QNE: Tensor = self.proj(x_QNE)[0]
        return tokens_QNE

    def _heads(self, x: Tensor) -> Tensor:
        """[positions, N, A] to [positions, N, heads of this rank, head_dim]."""
        return x.unflatten(-1, (-1, self.head_dim)).contiguous()


def build(model: ModelConfig, context: BuildContext) -> Resampler:
    """Build the connector (the function that every module of this folder has)."""
    return Resampler(model, context)
