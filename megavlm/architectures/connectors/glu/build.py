"""CogVLM's connector (arXiv 2311.03079; ``GLU``, ``boi`` and ``eoi`` in ``visual.py`` of THUDM/cogvlm-chat-hf).

Shape legend: N images, P patches of an image, W width of the tower, E width of the language model.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from megavlm.architectures.connectors.glu.config import own
from megavlm.architectures.context import BuildContext
from megavlm.config.schema import ModelConfig
from megavlm.layers.linear import column_linear, row_linear
from megavlm.layers.norm import TorchNorm


class GLUConnector(MegatronModule):
    """[P, N, W] patch features to [P + 2, N, E] image tokens: the first begins a picture, the last ends it."""

    def __init__(self, model: ModelConfig, context: BuildContext) -> None:
        connector, width, embed = own(model), model.vision.feature_size, model.language.hidden_size
        config = context.headless_config("connector", embed, connector.init_method_std, normalization="LayerNorm")
        super().__init__(config=config)
        init, ffn = config.init_method, connector.ffn_hidden_size
        # The norm is over all of it.
        self.proj = column_linear(width, embed, config=config, init_method=init, bias=False, gather_output=True)
        # The same on all tensor-parallel ranks, and so are its gradients: the layers behind it add up theirs.
        self.norm = TorchNorm(replace(config, sequence_parallel=False), embed, eps=connector.layernorm_epsilon)
        self.gate = column_linear(embed, ffn, config=config, init_method=init, bias=False)
        self.up = column_linear(embed, ffn, config=config, init_method=init, bias=False)
        self.down = row_linear(ffn, embed, config=config, init_method=init, bias=False)
        self.begin = nn.Parameter(torch.zeros(embed, dtype=context.dtype))
        self.end = nn.Parameter(torch.zeros(embed, dtype=context.dtype))

    def forward(self, features_PNW: Tensor) -> Tensor:
        """Return [P + 2, N, E] image tokens of [P, N, W] patch features."""
        with get_fp8_context(self.config):  # nothing in bf16
            x_PNE = F.gelu(self.norm(self.proj(features_PNW)[0]))
            x_PNE = self.down(F.silu(self.gate(x_PNE)[0]) * self.up(x_PNE)[0])[0]
        begin_1NE, end_1NE = (one.expand(1, x_PNE.size(1), -1) for one in (self.begin, self.end))
        return torch.cat([begin_1NE, x_PNE, end_1NE])


def build(model: ModelConfig, context: BuildContext) -> GLUConnector:
    """Build the connector (the function that every module of this folder has)."""
    return GLUConnector(model, context)
