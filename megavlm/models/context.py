"""What every builder of a model part needs besides its own branch of the recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from megavlm.config.schema import ParallelConfig
from megavlm.parallel.device import has_cuda


@dataclass(frozen=True)
class BuildContext:
    """Layout, number type and layer implementation of a model that is being built.

    Attributes:
        parallel: the recipe's layout.
        dtype: type of the weights, ``torch.float32`` or ``torch.bfloat16``.
        transformer_engine: build from Transformer Engine's layers, else from plain torch.
        initialize: fill the weights; False builds shapes only (on the meta device).
    """

    parallel: ParallelConfig
    dtype: torch.dtype = torch.float32
    transformer_engine: bool = False
    initialize: bool = True

    def transformer_settings(self) -> dict[str, Any]:
        """Return the settings that the TransformerConfigs of tower, connector and language model share."""
        on_cpu = not has_cuda() or not self.initialize
        return {
            "tensor_model_parallel_size": self.parallel.tensor_model_parallel_size,
            "params_dtype": self.dtype,
            "bf16": self.dtype is torch.bfloat16,
            "use_cpu_initialization": on_cpu,
            "perform_initialization": self.initialize,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "gradient_accumulation_fusion": False,
            "bias_dropout_fusion": not on_cpu,
            "masked_softmax_fusion": False,
            "persist_layer_norm": False,
            "calculate_per_token_loss": True,
        }
