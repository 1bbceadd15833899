"""BLIP-2's Q-Former (arXiv 2301.12597), as MiniGPT-4 (arXiv 2304.10592) puts it in front of a language model.

Of its two branches that of the queries alone is here: no text goes in, and nothing is dropped out (MiniGPT-4 runs it in
evaluation mode). Norms stand behind attention and MLP, as in BERT.

Shape legend: N images, P features of an image (patches, and the class token's where the tower gives it), W width of the
tower, Q queries, H their width, A = H / TP (whole heads), E width of the language model. Until queries look at an image
they are the same for all: N is 1 there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megavlm.architectures.connectors.q_former.config import own
from megavlm.architectures.context import BuildContext
from megavlm.config.schema import ModelConfig
from megavlm.layers.linear import column_linear, row_linear
from megavlm.layers.specs import LayerKind, Modules, layer_modules
from megavlm.layers.stack import linear_stack, run_stack


class QueryAttention(MegatronModule):
    """Attention of queries to each other, or to an image's features, added to the queries and normed.

    Args:
        config: of the Q-Former.
        modules: norm and attention.
        seen: width of what is looked at; None for the queries themselves.
    """

    def __init__(self, config: TransformerConfig, modules: Modules, seen: int | None) -> None:
        super().__init__(config=config)
        width, init = config.hidden_size, config.init_method

        def column(size_in: int) -> nn.Module:
            layer: nn.Module = column_linear(size_in, width, config=config, init_method=init)
            return layer

        self.head_dim = width // config.num_attention_heads
        self.linear_q, self.linear_k, self.linear_v = column(width), column(seen or width), column(seen or width)
        self.core_attention = build_module(
            modules.core_attention,
            config=config,
            layer_number=1,
            attn_mask_type=AttnMaskType.no_mask,
            attention_type="self" if seen is None else "cross",
        )
        self.linear_proj = row_linear(width, width, config=config, init_method=init)
        self.norm = modules.norm(config=config, hidden_size=width, eps=config.layernorm_epsilon)

    def forward(self, x_QNH: Tensor, features_PNW: Tensor | None = None) -> Tensor:
        """Return [Q, N, H]; N of the features, where the queries have none yet."""
        seen = x_QNH if features_PNW is None else features_PNW
        query, key, value = (
            layer(x)[0].unflatten(-1, (-1, self.head_dim))
            for layer, x in ((self.linear_q, x_QNH), (self.linear_k, seen), (self.linear_v, seen))
        )
        query = query.expand(-1, key.size(1), -1, -1).contiguous()
        attended_QNA = self.core_attention(query, key, value, None, attn_mask_type=AttnMaskType.no_mask)
        normed_QNH: Tensor = self.norm(self.linear_proj(attended_QNA)[0] + x_QNH)
        return normed_QNH


class QFormerLayer(MegatronModule):
    """One layer: the queries' attention to each other, to an image if it looks at one, and its MLP."""

    def __init__(self, config: TransformerConfig, modules: Modules, seen: int | None) -> None:
        super().__init__(config=config)
        width, ffn, init = config.hidden_size, config.ffn_hidden_size, config.init_method
        assert ffn is not None
        self.self_attention = QueryAttention(config, modules, None)
        self.cross_attention = None if seen is None else QueryAttention(config, modules, seen)
        self.linear_fc1 = column_linear(width, ffn, config=config, init_method=init)
        self.linear_fc2 = row_linear(ffn, width, config=config, init_method=init)
        self.norm = modules.norm(config=config, hidden_size=width, eps=config.layernorm_epsilon)

    def forward(self, x_QNH: Tensor, features_PNW: Tensor) -> Tensor:
        """Return [Q, N, H]."""
        x_QNH = self.self_attention(x_QNH)
        if self.cross_attention is not None:
            x_QNH = self.cross_attention(x_QNH, features_PNW)
        mixed_QNH = self.linear_fc2(F.gelu(self.linear_fc1(x_QNH)[0]))[0]
        normed_QNH: Tensor = self.norm(mixed_QNH + x_QNH)
        return normed_QNH


class QFormer(MegatronModule):
    """[P, N, W] features to [Q, N, E] image tokens.

    Heads and the MLPs' width are split over the tensor-parallel ranks; the last layer's output is gathered.
    """

    def __init__(self, model: ModelConfig, context: BuildContext) -> None:
        connector = own(model)
        config = TransformerConfig(
            num_layers=connector.num_layers,
            hidden_size=connector.hidden_size,
            ffn_hidden_size=connector.ffn_hidden_size,
            num_attention_heads=connector.num_attention_heads,
            normalization="LayerNorm",
            layernorm_epsilon=connector.layernorm_epsilon,
            init_method_std=connector.init_method_std,
            **context.transformer_settings("connector"),
        )
        super().__init__(config=config)
        width = connector.hidden_size
        kind = LayerKind("full", head_dim=width // connector.num_attention_heads)
        modules = layer_modules(kind, transformer_engine=context.transformer_engine)
        self.query = nn.Parameter(torch.empty(connector.num_queries, width, dtype=context.dtype))
        self.norm = modules.norm(config=config, hidden_size=width, eps=connector.layernorm_epsilon)
        seen = model.vision.feature_size
        self.blocks = nn.ModuleList(
            QFormerLayer(config, modules, seen if connector.looks(i) else None) for i in range(connector.num_layers)
        )
        if connector.trained == "projection":
            self.requires_grad_(False)
        self.layers = linear_stack(connector.projected(model.language.hidden_size), config)
        if context.initialize:
            nn.init.normal_(self.query, std=connector.init_method_std)

    def forward(self, features_PNW: Tensor) -> Tensor:
        """Return [Q, N, E] image tokens of [P, N, W] features."""
        with get_fp8_context(self.config):  # nothing in bf16
            x_QNH = self.norm(self.query).unsqueeze(1)
            for block in self.blocks:
                x_QNH = block(x_QNH, features_PNW)
            return run_stack(self.layers, x_QNH, nn.Identity())


def build(model: ModelConfig, context: BuildContext) -> QFormer:
    """Build the connector (the function that every module of this folder has)."""
    return QFormer(model, context)
