"""From a recipe to the model of this rank, wrapped for training, with optimizer and schedule."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from megavlm.config.schema import Recipe
from megavlm.layers.z_loss import add_z_loss
from megavlm.models.build import build_model, unwrap
from megavlm.models.codes import say_pictures
from megavlm.models.vlm import VisionLanguageModel
from megavlm.parallel.replicas import sum_gradients
from megavlm.training.gradients import leave_to_experts, zero_stale
from megavlm.training.optimizer import build_optimizer, build_scheduler
from megavlm.training.shards import keep_places
from megavlm.training.vision import VisionPhases, taken_off, wrap


@dataclass
class TrainingModel:
    """What a training step works on."""

    chunks: list[Any]
    """Model chunks of this rank, wrapped in Megatron-Core's DistributedDataParallel."""
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    vision: VisionPhases | None = None
    """Who encodes, where tower and connector are apart from the pipeline (``parallel.vision_placement``)."""

    @property
    def modules(self) -> list[VisionLanguageModel]:
        """The bare chunks."""
        return [unwrap(chunk) for chunk in self.chunks]

    @property
    def configs(self) -> list[Any]:
        """Megatron-Core's configuration of each chunk."""
        return [module.config for module in self.modules]

    @contextlib.contextmanager
    def settled(self) -> Iterator[None]:
        """Have all parameters in place inside the block: for saving, validation and generation.

        With ``overlap_param_gather`` they arrive during the next training forward pass only.
        """
        waiting = [c for c in self.chunks if c.ddp_config.overlap_param_gather and c.use_forward_hook]
        with self._pipeline_alone():
            for chunk in waiting:
                chunk.disable_forward_pre_hook(param_sync=True)
        yield
        with self._pipeline_alone():
            for chunk in waiting:
                chunk.enable_forward_pre_hook()

    def _pipeline_alone(self) -> contextlib.AbstractContextManager[None]:
        """Hide modules that the chunks' DistributedDataParallel was not made with."""
        return contextlib.nullcontext() if self.vision is None else taken_off(self.vision.chunk)


def _finish_gradients(chunks: list[Any], *args: Any, **kwargs: Any) -> None:
    """Finish the gradients of a step: Megatron-Core's ``finalize_model_grads``, then those of replicas."""
    for chunk in chunks:
        zero_stale(chunk)
    finalize_model_grads(chunks, *args, **kwargs)
    sum_gradients(chunks)


def _finish_apart(vision: VisionPhases, chunks: list[Any], num_tokens: Tensor, **kwargs: Any) -> None:
    """Do the same where tower and connector are apart: their backward pass comes first."""
    vision.backward()
    for chunk in chunks:
        zero_stale(chunk)
    with taken_off(vision.chunk):  # Megatron-Core looks for norms by name
        finalize_model_grads(chunks, num_tokens, **kwargs)
    # That has made num_tokens the global batch's, in place.
    if num_tokens > 0:
        vision.wrapped.scale_gradients(1.0 / num_tokens)


def build_training(recipe: Recipe, image_token_id: int) -> TrainingModel:
    """Build model, optimizer and schedule, and tell Megatron-Core's schedules how gradients are finished."""
    parallel = recipe.parallel
    apart = parallel.vision_placement == "all_ranks"
    chunks = build_model(recipe, image_token_id, vision_apart=apart)
    if recipe.loss.image_tokens:
        say_pictures(chunks, True)
    if recipe.loss.z_loss:
        for chunk in chunks:
            if unwrap(chunk).post_process:
                add_z_loss(unwrap(chunk).language, recipe.loss.z_loss)
    first = unwrap(chunks[0])
    config = first.config
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        bucket_size=parallel.ddp_bucket_size,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        fp8_param_gather=recipe.engine.fp8_param_gather,
    )
    tower = wrap(first, recipe) if apart else None
    with taken_off(first) if apart else contextlib.nullcontext():
        wrapped = [
            # As Megatron-LM does it: buckets, and so overlap, for the first chunk only.
            DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=i > 0)
            for i, chunk in enumerate(chunks)
        ]
        for chunk in [*wrapped, *([] if tower is None else [tower])]:
            chunk.broadcast_params()
        optimizer = build_optimizer(recipe, wrapped, tower)
    keep_places(optimizer)
    vision = None if tower is None else VisionPhases(tower, first, recipe)
    for chunk in wrapped:
        leave_to_experts(chunk)
        settings = unwrap(chunk).config
        settings.finalize_model_grads_func = (
            _finish_gradients if vision is None else functools.partial(_finish_apart, vision)
        )
        settings.grad_scale_func = optimizer.scale_loss
        if parallel.overlap_grad_reduce:
            settings.no_sync_func = [c.no_sync for c in wrapped] if len(wrapped) > 1 else wrapped[0].no_sync
    return TrainingModel(wrapped, optimizer, build_scheduler(recipe, optimizer), vision)
