"""MiniGemini's connector (arXiv 2403.18814, ``unified_resampler`` of its authors' ``mgm_arch.py``).

Shape legend: N images, P patches, L width of the first tower's feature, K features of the second in the place of a
patch, C their width, A = L / TP, E width of the language model.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state as mpu
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn

from megavlm.architectures.connectors.patch_mining.config import places, widths
from megavlm.architectures.context import BuildContext
from megavlm.config.schema import ModelConfig
from megavlm.layers.convolution import channel_norm
from megavlm.layers.linear import column_linear
from megavlm.layers.stack import linear_stack, run_stack


class PatchMining(MegatronModule):
    """[P, N, L + K * C] features of two towers to [P, N, E] image tokens.

    A patch's one query attends to its K keys; the ranks share the width of queries, keys and values. Each has a part of
    every score, which are summed, and so is the gradient that each rank's values give them.
    """

    def __init__(self, model: ModelConfig, context: BuildContext) -> None:
        connector, (low, high) = model.connector, model.vision.feature_sizes
        config = context.headless_config("connector", model.language.hidden_size, connector.init_method_std)
        super().__init__(config=config)
        self.low, self.places = low, places(model)
        self._group = mpu.get_tensor_model_parallel_group()  # that of now: a part may be built as on one rank
        each = high // self.places
        self.norms = nn.ModuleDict()
        self.linears = nn.ModuleDict()
        for name, size in (("query", low), ("key", each), ("value", each)):
            self.norms[name] = channel_norm(size, config, connector.layernorm_epsilon)
            self.linears[name] = column_linear(size, low, config=config, init_method=config.init_method)
        self.layers = linear_stack(widths(model), config)
        # Rounded to the weights' type first, as that of embeddings is.
        self.multiplier = torch.tensor(connector.output_multiplier, dtype=context.dtype, device="cpu").item()

    def forward(self, features_PNW: Tensor) -> Tensor:
        """Return [P, N, E] image tokens of the features."""
        low_PNL = features_PNW[..., : self.low].contiguous()
        high_PNKC = features_PNW[..., self.low :].unflatten(-1, (self.places, -1)).contiguous()
        with get_fp8_context(self.config):  # nothing in bf16
            query_PNA = self._made("query", low_PNL)
            key_PNKA, value_PNKA = self._made("key", high_PNKC), self._made("value", high_PNKC)
            scores_PNK = torch.matmul(key_PNKA * self.low**-0.5, query_PNA.unsqueeze(-1)).squeeze(-1)
            scores_PNK = reduce_from_tensor_model_parallel_region(scores_PNK, self._group)
            scores_PNK = copy_to_tensor_model_parallel_region(scores_PNK, self._group)
            mined_PNA = torch.matmul(scores_PNK.softmax(-1).unsqueeze(-2), value_PNKA).squeeze(-2)
            mined_PNL = gather_from_tensor_model_parallel_region(mined_PNA, self._group)
            tokens_PNE = run_stack(self.layers, low_PNL + mined_PNL)
        return tokens_PNE if self.multiplier == 1 else tokens_PNE * self.multiplier

    def _made(self, name: str, x: Tensor) -> Tensor:
        # Megatron-Core's layers take three dimensions.
        made: Tensor = self.linears[name](self.norms[name](x).flatten(1, -2))[0]
        return made.unflatten(1, x.shape[1:-1])


def build(model: ModelConfig, context: BuildContext) -> PatchMining:
    """Build the connector (the function that every module of this folder has)."""
    return PatchMining(model, context)
