"""DeepSeek-VL-7B's connector (``low_high_hybrid_split_mlp_gelu`` of its authors' ``projector.py``; arXiv 2403.05525).

Vary's is its two first layers (``vary/model/vary_toy_qwen1_8.py`` of Ucas-HaoranWei/Vary-toy @ c6e40597).

Shape legend: N images, P patches, W width of both towers' features side by side, E width of the language model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megavlm.architectures.context import BuildContext
from megavlm.config.schema import ModelConfig
from megavlm.layers.linear import column_linear


class HybridSplit(MegatronModule):
    """[P, N, W] features of two towers to [P, N, E] image tokens.

    Each layer's output is gathered: ranks have parts of either half, which do not make a part of the whole.
    """

    def __init__(self, model: ModelConfig, context: BuildContext) -> None:
        embed = model.language.hidden_size
        config = context.headless_config("connector", embed, model.connector.init_method_std)
        super().__init__(config=config)
        self.sizes = list(model.vision.feature_sizes)

        def linear(size_in: int, size_out: int) -> torch.nn.Module:
            layer: torch.nn.Module = column_linear(
                size_in, size_out, config=config, init_method=config.init_method, gather_output=True
            )
            return layer

        self.low = linear(self.sizes[0], embed // 2)
        self.high = linear(self.sizes[1], embed // 2)
        self.low_first = model.connector.first == "low"
        self.proj = linear(embed, embed) if model.connector.output_layer else None

    def forward(self, features_PNW: Tensor) -> Tensor:
        """Return [P, N, E] image tokens of [P, N, W]."""
        low, high = (part.contiguous() for part in features_PNW.split(self.sizes, dim=-1))
        with get_fp8_context(self.config):  # nothing in bf16
            halves = [self.low(low)[0], self.high(high)[0]]
            halves_PNE = torch.cat(halves if self.low_first else halves[::-1], dim=-1)
            if self.proj is None:
                return halves_PNE
            tokens_PNE: Tensor = self.proj(F.gelu(halves_PNE))[0]
        return tokens_PNE


def build(model: ModelConfig, context: BuildContext) -> HybridSplit:
    """Build the connector (the function that every module of this folder has)."""
    return HybridSplit(model, context)
