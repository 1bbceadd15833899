"""GLM-4.1V's connector (arXiv 2507.01006; Transformers: ``downsample`` and ``Glm4vVisionPatchMerger``).

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
from megavlm.architectures.connectors.downsample_merger.config import DownsampleMergerConfig
from megavlm.architectures.context import BuildContext
from megavlm.config.schema import ModelConfig
from megavlm.layers.linear import column_linear, row_linear
from megavlm.layers.norm import TorchNorm


class DownsampleMerger(MegatronModule):
    """[P, 1, W] patch features to [Q, 1, E] image tokens."""

    def __init__(self, model: ModelConfig, context: BuildContext) -> None:
        connector, embed = model.connector, model.language.hidden_size
        assert isinstance(connector, DownsampleMergerConfig)
        config = context.headless_config("connector", embed, connector.init_method_std, normalization="LayerNorm")
        super().__init__(config=config)
        self.block, ffn = connector.merge_size**2, connector.ffn_hidden_size
        init = config.init_method
        # A convolution whose stride is its side is a linear layer on the block; its outputs stay split, as the layer
        # behind it takes them.
        self.downsample = column_linear(width_of(model), embed, config=config, init_method=init)
        self.proj = row_linear(embed, embed, config=config, init_method=init, bias=False)
        # The same on all tensor-parallel ranks, and so are its gradients: the layers behind it add up theirs.
        self.norm = TorchNorm(replace(config, sequence_parallel=False), embed, eps=connector.layernorm_epsilon)
        self.gate = column_linear(embed, ffn, config=config, init_method=init, bias=False)
        self.up = column_linear(embed, ffn, config=config, init_method=init, bias=False)
        self.down = row_linear(ffn, embed, config=config, init_method=init, bias=False)

    def forward(self, features_P1W: Tensor) -> Tensor:
        """Return [Q, 1, E] image tokens of [P, 1, W] patch features."""
        # [Q, m^2, 1, W] to [Q, 1, W m^2], in the order of the convolution's weights.
        x = features_P1W.unflatten(0, (-1, self.block)).permute(0, 2, 3, 1).flatten(2)
        with get_fp8_context(self.config):  # nothing in bf16
            x = self.proj(self.downsample(x)[0])[0]
            x = F.gelu(self.norm(x))
            return self.down(F.silu(self.gate(x)[0]) * self.up(x)[0])[0]


def build(model: ModelConfig, context: BuildContext) -> DownsampleMerger:
    """Build the connector (the function that every module of this folder has)."""
    return DownsampleMerger(model, context)
