"""What every builder of a model part needs besides its own branch of the recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megavlm.config.schema import EngineConfig, LoraConfig, ParallelConfig
from megavlm.parallel.device import frees_sent_outputs, has_kernels
from megavlm.parallel.engine import Machine, Part, settings, this_machine


@dataclass(frozen=True)
class BuildContext:
    """Layout, number type and layer implementation of a model that is being built.

    Attributes:
        parallel: the recipe's layout.
        dtype: type of the weights, ``torch.float32`` or ``torch.bfloat16``.
        transformer_engine: build from Transformer Engine's layers, else from plain torch.
        initialize: fill the weights; False builds shapes only (on the meta device).
        engine: the recipe's number formats and kernels.
        lora: the recipe's adapters.
        vision_apart: tower and connector lie on every rank of the job (``parallel.vision_placement``).
        deepstack: behind how many of the language model's layers, from the first on, features of pictures are added.
    """

    parallel: ParallelConfig
    dtype: torch.dtype = torch.float32
    transformer_engine: bool = False
    initialize: bool = True
    engine: EngineConfig = field(default_factory=EngineConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    deepstack: int = 0
    vision_apart: bool = False

    @property
    def vision_whole(self) -> bool:
        """Whether every rank of the job holds tower and connector whole."""
        return self.vision_apart and self.parallel.vision_shards == "whole"

    def transformer_settings(self, part: Part = "connector") -> dict[str, Any]:
        """Return the settings of a TransformerConfig that do not depend on the module's shape.

        Args:
            part: whose configuration it is: they differ in what computes in FP8, and in fused kernels.
        """
        on_cpu = not has_kernels() or not self.initialize
        return {
            "tensor_model_parallel_size": self.parallel.tensor_model_parallel_size,
            "params_dtype": self.dtype,
            "bf16": self.dtype is torch.bfloat16,
            "use_cpu_initialization": on_cpu,
            "perform_initialization": self.initialize,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "masked_softmax_fusion": False,
            "persist_layer_norm": False,
            "calculate_per_token_loss": True,
            **settings(
                self.engine,
                part,
                # Shapes alone ask for no kernels.
                this_machine() if self.initialize else Machine(),
                engine_layers=self.transformer_engine,
                bf16=self.dtype is torch.bfloat16,
            ),
        }

    def language_config(self, **own: Any) -> TransformerConfig:
        """Return the configuration of a language model, which also steers the pipeline schedule and recomputation.

        Args:
            own: what its architecture says: sizes, norms, activation, and what it turns off of the engine's kernels.
        """
        parallel = self.parallel
        virtual, full = parallel.virtual_pipeline_model_parallel_size, parallel.recompute_granularity == "full"
        return TransformerConfig(
            **{
                **self.transformer_settings("language"),
                "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
                "virtual_pipeline_model_parallel_size": virtual,
                "context_parallel_size": parallel.context_parallel_size,
                "cp_comm_type": parallel.cp_comm_type if parallel.context_parallel_size > 1 else None,
                "num_layers_in_first_pipeline_stage": parallel.num_layers_in_first_pipeline_stage,
                "sequence_parallel": parallel.sequence_parallel,
                "pipeline_dtype": self.dtype,
                # Outputs freed early, and batched sends, train wrongly over gloo (facts: Megatron on CPU, trap 4).
                "deallocate_pipeline_outputs": frees_sent_outputs(),
                "overlap_p2p_comm": virtual is not None,
                "batch_p2p_comm": virtual is None,
                "recompute_granularity": parallel.recompute_granularity,
                "recompute_method": "uniform" if full else None,
                "recompute_num_layers": (parallel.recompute_num_layers or 1) if full else None,
                **own,
            }
        )

    def headless_config(self, part: Part, hidden_size: int, init_method_std: float, **own: Any) -> TransformerConfig:
        """Return the configuration of a part without attention heads: linear layers, norms, convolutions.

        Args:
            part: whose it is.
            hidden_size: width of what it gives.
            init_method_std: standard deviation of its initial weights.
            own: fields of its own, such as ``normalization``.
        """
        return TransformerConfig(
            hidden_size=hidden_size,
            num_attention_heads=self.parallel.tensor_model_parallel_size,  # there are none: any number will do
            init_method_std=init_method_std,
            **{"num_layers": 1, **own, **self.transformer_settings(part)},
        )
