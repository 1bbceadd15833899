"""LLaVA's connectors: one linear layer, or N linear layers with GELU between them (arXiv 2310.03744).

Shape legend: N images, P patches of an image, W width of the tower, E width of the language model.
"""

from __future__ import annotations

import torch
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megavlm.architectures.connectors.mlp.config import MLPConfig, widths
from megavlm.architectures.context import BuildContext
from megavlm.config.schema import ModelConfig
from megavlm.layers.stack import linear_stack, run_stack


class MLPConnector(MegatronModule):
    """[P, N, W] patch features to [P, N, E] image tokens, one per patch, or for each but the first ([P - 1, N, E]).

    Layers alternate between column-parallel and row-parallel; with an odd number of them the last one's output
    is gathered.
    """

    def __init__(self, model: ModelConfig, context: BuildContext) -> None:
        embed, connector = model.language.hidden_size, model.connector
        assert isinstance(connector, MLPConfig)
        config = context.headless_config("connector", embed, connector.init_method_std)
        super().__init__(config=config)
        self.first = int(connector.drop_first_feature)
        self.layers = linear_stack(widths(model), config)
        # Rounded to the weights' type first, as that of embeddings is.
        self.multiplier = torch.tensor(connector.output_multiplier, dtype=context.dtype, device="cpu").item()

    def forward(self, features_PNW: Tensor) -> Tensor:
        """Return [P, N, E] image tokens of [P, N, W] patch features."""
        with get_fp8_context(self.config):  # nothing in bf16
            tokens_PNE = run_stack(self.layers, features_PNW[self.first :] if self.first else features_PNW)
        return tokens_PNE if self.multiplier == 1 else tokens_PNE * self.multiplier


def build(model: ModelConfig, context: BuildContext) -> MLPConnector:
    """Build the connector (the function that every module of this folder has)."""
    return MLPConnector(model, context)
