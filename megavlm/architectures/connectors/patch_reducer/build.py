"""Connectors that make one token of several patches.

Their published forms: four patches one behind the other and one linear layer (MiniGPT-v2, arXiv 2310.09478); squares
and a linear layer without bias (Idefics3, arXiv 2408.12637); means of squares, a norm around 1 and a linear layer
without bias (Gemma 3, arXiv 2503.19786).

Shape legend: N images, P patches of an image, k patches of a token, Q = P / k tokens, W width of the tower, V width of
a token in front of the linear layers, E width of the language model.
"""

from __future__ import annotations

from dataclasses import replace

from megatron.core.fp8_utils import get_fp8_context
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megavlm.architectures.connectors.patch_reducer.config import own, widths
from megavlm.architectures.context import BuildContext
from megavlm.config.schema import ModelConfig
from megavlm.layers.norm import TorchNorm
from megavlm.layers.stack import linear_stack, run_stack


class PatchReducer(MegatronModule):
    """[P, N, W] patch features to [Q, N, E] image tokens."""

    def __init__(self, model: ModelConfig, context: BuildContext) -> None:
        connector = own(model)
        config = context.headless_config(
            "connector",
            model.language.hidden_size,
            connector.init_method_std,
            normalization=connector.normalization or "LayerNorm",
        )
        super().__init__(config=config)
        self.settings, self.grid = connector, model.vision.grid
        self.norm: TorchNorm | None = None
        if connector.normalization is not None:
            # The same on all tensor-parallel ranks, and so are its gradients: the layer behind it adds up theirs.
            whole = replace(config, sequence_parallel=False)
            # Megatron-Core refuses it where it would build a norm of its own that cannot.
            whole.layernorm_zero_centered_gamma = connector.layernorm_zero_centered_gamma
            self.norm = TorchNorm(whole, widths(model)[0], eps=connector.layernorm_epsilon)
        self.layers = linear_stack(widths(model), config, bias=connector.add_bias_linear)

    def forward(self, features_PNW: Tensor) -> Tensor:
        """Return [Q, N, E] image tokens of [P, N, W] patch features."""
        x_QNV = self._merged(features_PNW)
        if self.norm is not None:
            x_QNV = self.norm(x_QNV)
        with get_fp8_context(self.config):  # nothing in bf16
            return run_stack(self.layers, x_QNV)

    def _merged(self, features_PNW: Tensor) -> Tensor:
        """Return [Q, N, V]."""
        if self.settings.merge == "row":
            return features_PNW.unflatten(0, (-1, self.settings.patches)).transpose(1, 2).flatten(2)
        side, (rows, columns) = self.settings.side, self.grid
        x_rscsNW = features_PNW.unflatten(0, (rows // side, side, columns // side, side))
        if self.settings.merge == "mean":
            return x_rscsNW.mean((1, 3)).flatten(0, 1)
        return x_rscsNW.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(0, 1)


def build(model: ModelConfig, context: BuildContext) -> PatchReducer:
    """Build the connector (the function that every module of this folder has)."""
    return PatchReducer(model, context)
