"""LLaVA's connectors: one linear layer, or N linear layers with GELU between them (arXiv 2310.03744).

Shape legend: N images, P patches of an image, W width of the tower, E width of the language model.
"""

from __future__ import annotations

import torch.nn.functional as F
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megavlm.architectures.connectors.mlp.config import MLPConfig
from megavlm.architectures.context import BuildContext
from megavlm.config.schema import ModelConfig
from megavlm.layers.linear import column_linear, row_linear


class MLPConnector(MegatronModule):
    """[P, N, W] patch features to [P, N, E] image tokens, one per patch.

    Layers alternate between column-parallel and row-parallel; with an odd number of them the last one's output
    is gathered.
    """

    def __init__(self, model: ModelConfig, context: BuildContext) -> None:
        width, embed, connector = model.vision.feature_size, model.language.hidden_size, model.connector
        assert isinstance(connector, MLPConfig)
        config = TransformerConfig(
            num_layers=1,
            hidden_size=embed,
            num_attention_heads=context.parallel.tensor_model_parallel_size,  # there are none: any number will do
            init_method_std=connector.init_method_std,
            **context.transformer_settings("connector"),
        )
        super().__init__(config=config)
        depth = connector.depth
        layers: list[nn.Module] = []
        for i in range(depth):
            size_in = width if i == 0 else embed
            if i % 2 == 0:
                layers.append(
                    column_linear(
                        size_in, embed, config=config, init_method=config.init_method, gather_output=i == depth - 1
                    )
                )
            else:
                layers.append(row_linear(size_in, embed, config=config, init_method=config.init_method))
        self.layers = nn.ModuleList(layers)

    def forward(self, features_PNW: Tensor) -> Tensor:
        """Return [P, N, E] image tokens of [P, N, W] patch features."""
        x = features_PNW
        with get_fp8_context(self.config):  # nothing in bf16
            for i, layer in enumerate(self.layers):
                x = layer(x if i == 0 else F.gelu(x))[0]
        return x


def build(model: ModelConfig, context: BuildContext) -> MLPConnector:
    """Build the connector (the function that every module of this folder has)."""
    return MLPConnector(model, context)
