"""From a recipe to the model chunks of this rank."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.module import Float16Module

from megavlm.architectures.adapters import prepare_adapters
from megavlm.architectures.context import BuildContext
from megavlm.config.schema import ModulesConfig, Recipe
from megavlm.layers.specs import use_transformer_engine
from megavlm.models.vlm import VisionLanguageModel, build_chunks
from megavlm.parallel.device import local_device
from megavlm.parallel.replicas import share_weights

MODULES = ("vision", "connector", "language")
"""The parts of a model, as recipes and parameter names call them."""


def unwrap(chunk: Any) -> VisionLanguageModel:
    """Return the model inside Megatron-Core's wrappers."""
    while not isinstance(chunk, VisionLanguageModel):
        chunk = chunk.module
    return chunk


def build_context(recipe: Recipe, *, vision_apart: bool = False) -> BuildContext:
    """Return how the recipe wants its modules built; see :class:`~megavlm.architectures.context.BuildContext`."""
    return BuildContext(
        parallel=recipe.parallel,
        dtype=torch.bfloat16 if recipe.training.precision == "bf16" else torch.float32,
        transformer_engine=use_transformer_engine(recipe.parallel.transformer_impl, recipe.training.precision),
        engine=recipe.engine,
        lora=recipe.lora,
        vision_apart=vision_apart,
    )


def freeze(model: VisionLanguageModel, modules: ModulesConfig) -> None:
    """Keep the parts of ``model`` that the recipe freezes from learning."""
    for name in MODULES:
        part = getattr(model, name)
        if part is not None and getattr(modules, name).freeze:
            part.requires_grad_(False)


def build_model(recipe: Recipe, image_token_id: int, *, vision_apart: bool = False) -> list[Any]:
    """Build this rank's chunks in the recipe's precision, on the device, without wrapping them for training.

    Args:
        recipe: the run.
        image_token_id: the token of an image slot.
        vision_apart: the first chunk of every rank holds tower and connector whole; else those of the first stage do.
    """
    context = build_context(recipe, vision_apart=vision_apart)
    chunks: list[Any] = build_chunks(recipe.model, context, image_token_id)
    for i, chunk in enumerate(chunks):
        freeze(chunk, recipe.modules)
        if recipe.lora.rank is not None:
            prepare_adapters(chunk.language, recipe.lora, recipe.training.seed)
        chunk.to(local_device())
        share_weights(chunk)
        if recipe.training.precision == "bf16":
            chunks[i] = Float16Module(chunk.config, chunk)
    return chunks
