"""Qwen2-VL's connector (arXiv 2409.12191, "patch merger"): neighbouring patches become one token.

Shape legend: P patches of all pictures, block by block, m side of a block, Q = P / m^2 tokens, W width of the tower, E
width of the language model; 1 stands for the batch dimension.
"""

from __future__ import annotations

from dataclasses import replace

import torch.nn.functional as F
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megavlm.architectures.blocks import width_of
from megavlm.architectures.connectors.patch_merger.config import PatchMergerConfig, norm_width
from megavlm.architectures.context import BuildContext
from megavlm.config.schema import ModelConfig
from megavlm.layers.linear import column_linear, row_linear
from megavlm.layers.norm import TorchNorm


class PatchMerger(MegatronModule):
    """[P, 1, W] patch features to [Q, 1, E] image tokens."""

    def __init__(self, model: ModelConfig, context: BuildContext) -> None:
        connector, embed = model.connector, model.language.hidden_size
        assert isinstance(connector, PatchMergerConfig)
        config = context.headless_config(
            "connector", embed, connector.init_method_std, normalization=connector.normalization
        )
        super().__init__(config=config)
        self.block, self.norm_after_merge = connector.merge_size**2, connector.norm_after_merge
        width, init = width_of(model), config.init_method
        # The same on all tensor-parallel ranks, and so are its gradients: the layer behind it adds up theirs.
        whole = replace(config, sequence_parallel=False)
        self.norm = TorchNorm(whole, norm_width(model), eps=connector.layernorm_epsilon)
        self.linear_1 = column_linear(width, width, config=config, init_method=init)
        self.linear_2 = row_linear(width, embed, config=config, init_method=init)

    def forward(self, features_P1W: Tensor) -> Tensor:
        """Return [Q, 1, E] image tokens of [P, 1, W] patch features."""
        x = features_P1W if self.norm_after_merge else self.norm(features_P1W)
        x = x.unflatten(0, (-1, self.block)).transpose(1, 2).flatten(2)
        if self.norm_after_merge:
            x = self.norm(x)
        with get_fp8_context(self.config):  # nothing in bf16
            x = F.gelu(self.linear_1(x)[0])
            return self.linear_2(x)[0]


def build(model: ModelConfig, context: BuildContext) -> PatchMerger:
    """Build the connector (the function that every module of this folder has)."""
    return PatchMerger(model, context)
