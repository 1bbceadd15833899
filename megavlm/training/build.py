"""From a recipe to the model of this rank, wrapped for training, with optimizer and schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module

from megavlm.config.schema import Recipe
from megavlm.models.context import BuildContext
from megavlm.models.vlm import VisionLanguageModel, build_chunks
from megavlm.parallel.device import local_device
from megavlm.parallel.specs import use_transformer_engine
from megavlm.training.optimizer import MODULES, build_optimizer, build_scheduler


@dataclass
class TrainingModel:
    """What a training step works on."""

    chunks: list[Any]
    """Model chunks of this rank, wrapped in Megatron-Core's DistributedDataParallel."""
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler

    @property
    def modules(self) -> list[VisionLanguageModel]:
        """The bare chunks."""
        return [unwrap(chunk) for chunk in self.chunks]


def unwrap(chunk: Any) -> VisionLanguageModel:
    """Return the model inside Megatron-Core's wrappers."""
    while not isinstance(chunk, VisionLanguageModel):
        chunk = chunk.module
    return chunk


def build_context(recipe: Recipe) -> BuildContext:
    """Return how the recipe wants its modules built."""
    return BuildContext(
        parallel=recipe.parallel,
        dtype=torch.bfloat16 if recipe.training.precision == "bf16" else torch.float32,
        transformer_engine=use_transformer_engine(recipe.parallel.transformer_impl),
    )


def build_model(recipe: Recipe, image_token_id: int) -> list[Any]:
    """Build this rank's chunks in the recipe's precision, on the device, without wrapping them for training."""
    chunks: list[Any] = build_chunks(recipe.model, build_context(recipe), image_token_id)
    for i, chunk in enumerate(chunks):
        for name in MODULES:
            part = getattr(chunk, name)
            if part is not None and getattr(recipe.modules, name).freeze:
                part.requires_grad_(False)
        chunk.to(local_device())
        if recipe.training.precision == "bf16":
            chunks[i] = Float16Module(chunk.config, chunk)
    return chunks


def build_training(recipe: Recipe, image_token_id: int) -> TrainingModel:
    """Build model, optimizer and schedule, and tell Megatron-Core's schedules how gradients are finished."""
    parallel = recipe.parallel
    chunks = build_model(recipe, image_token_id)
    config = unwrap(chunks[0]).config
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
    )
    wrapped = [
        # As Megatron-LM does it: buckets, and so overlap, for the first chunk only.
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=i > 0)
        for i, chunk in enumerate(chunks)
    ]
    for chunk in wrapped:
        chunk.broadcast_params()
    optimizer = build_optimizer(recipe, wrapped)
    for chunk in wrapped:
        settings = unwrap(chunk).config
        settings.finalize_model_grads_func = finalize_model_grads
        settings.grad_scale_func = optimizer.scale_loss
        if parallel.overlap_grad_reduce:
            settings.no_sync_func = [c.no_sync for c in wrapped] if len(wrapped) > 1 else wrapped[0].no_sync
    return TrainingModel(wrapped, optimizer, build_scheduler(recipe, optimizer))
