"""DenseConnector (arXiv 2405.13800): sparse token, sparse channel, and dense channel integration.

As its published code has it, the last layer comes first: the features that LLaVA would take, then what comes to them.

Shape legend: N images, P patches of an image, L layers, W width of the tower, T tokens, V width of a token in front of
the linear layers, E width of the language model.
"""

from __future__ import annotations

import torch
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megavlm.architectures.connectors.dense_connector.config import layers_of, own, widths
from megavlm.architectures.context import BuildContext
from megavlm.config.schema import ModelConfig
from megavlm.layers.stack import linear_stack, run_stack


class DenseConnector(MegatronModule):
    """[P, N, L * W] features of patches to [T, N, E] image tokens."""

    def __init__(self, model: ModelConfig, context: BuildContext) -> None:
        config = context.headless_config("connector", model.language.hidden_size, own(model).init_method_std)
        super().__init__(config=config)
        self.settings, self.num_layers = own(model), layers_of(model)
        self.layers = linear_stack(widths(model), config)

    def forward(self, features_PNLW: Tensor) -> Tensor:
        """Return [T, N, E] image tokens of [P, N, L * W] features: of L layers side by side."""
        with get_fp8_context(self.config):  # nothing in bf16
            return run_stack(self.layers, self._together(features_PNLW))

    def _together(self, features_PNLW: Tensor) -> Tensor:
        """Return [T, N, V]."""
        how, streams = self.settings.integration, self.settings.streams
        if how == "sci":
            return features_PNLW
        layers_PNLW = features_PNLW.unflatten(-1, (self.num_layers, -1))
        if how == "sti":
            first_PNW, others_PNLW = layers_PNLW[:, :, 0], layers_PNLW[:, :, 1:]
            whole = len(first_PNW) // self.settings.pool
            means_QNLW = others_PNLW[: whole * self.settings.pool].unflatten(0, (whole, -1)).mean(1)
            return torch.cat([first_PNW, *means_QNLW.unbind(2)])
        group = self.num_layers // streams
        means_PNGW = layers_PNLW[:, :, : group * streams].unflatten(2, (streams, group)).mean(3)
        return torch.cat([layers_PNLW[:, :, -1], means_PNGW.flatten(2)], dim=-1)


def build(model: ModelConfig, context: BuildContext) -> DenseConnector:
    """Build the connector (the function that every module of this folder has)."""
    return DenseConnector(model, context)
