"""Floating-point operations of a training step, counted from the model's shapes (for MFU).

A multiply-add is two operations. Counted are the matrix products that the model needs: projections, MLPs,
attention inside the segments (and windows), output layer, tower and connector: the tower's by its own patches, never by
the tokens that an image becomes. Three ways of counting stand side by side (:class:`StepFlops`), since published
figures differ in what they take for work: padding, the masked half of causal attention, activations that are computed
twice.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from megavlm.architectures.cost import (
    Pictures,
    adapter_products,
    attended_squares,
    cost_of,
    crossed_work,
    decoder_cost,
    features_of,
    layer_kinds,
)
from megavlm.config.architecture import own_of
from megavlm.config.schema import LanguageConfig, LoraConfig, ModelConfig, ModuleTraining, Recipe


def cross_flops(model: ModelConfig, tokens: float, images: float | Pictures) -> float:
    """Return the forward operations of the layers that attend to pictures; 0 where there are none.

    Raises:
        NoCostError: an architecture has no cost.
    """
    if not model.language.attending_layers:
        return 0
    return len(model.language.attending_layers) * crossed_work(model, tokens, pictures_of(model, images)).total


def language_flops(language: LanguageConfig, tokens: int, squared_lengths: int) -> int:
    """Return the forward operations of the language model, without those of layers that attend to pictures.

    Args:
        language: its shape.
        tokens: tokens of all segments.
        squared_lengths: sum of the squares of the segments' lengths.

    Raises:
        NoCostError: its architecture has no cost.
    """
    cost, crossed = decoder_cost(language), set(language.cross_layers)
    kinds = Counter(kind for number, kind in enumerate(layer_kinds(language)) if number not in crossed)
    layers = sum(count * cost.layer_work(kind, tokens, squared_lengths).total for kind, count in kinds.items())
    return int(layers) + 2 * tokens * language.hidden_size * language.output_rows


def adapter_flops(language: LanguageConfig, lora: LoraConfig, tokens: int, features: float = 0.0) -> int:
    """Return the forward operations of the adapters; ``features``: of pictures that layers attend to."""
    crossed = set(language.cross_layers)
    kinds = [kind for number, kind in enumerate(layer_kinds(language)) if number not in crossed]
    total: float = 2 * tokens * sum(sum(adapter_products(kind, lora)) for kind in kinds)
    if crossed:
        total += len(crossed) * decoder_cost(language).cross_adapter_work(language, lora, tokens, features)
    return int(total)


def _seen(model: ModelConfig, images: float | Pictures) -> float:
    """Return the features of pictures that layers attend to, where there are such layers."""
    return features_of(model, pictures_of(model, images)) if model.language.cross_layers else 0.0


def pictures_of(model: ModelConfig, images: float | Pictures) -> Pictures:
    """Return pictures; of a mere number, each is of the usual size."""
    return images if isinstance(images, Pictures) else Pictures.alike(images, model.vision.grid)


def image_flops(model: ModelConfig, part: str, images: float | Pictures) -> float:
    """Return the forward operations of ``vision`` or ``connector`` for pictures: so many of usual size, or these.

    Raises:
        NoCostError: its architecture has no cost.
    """
    total: float = cost_of(model, part).work(own_of(model, part), pictures_of(model, images)).total
    return total


def picture_work(recipe: Recipe, images: float | Pictures) -> tuple[float, float]:
    """Return what tower and connector do for pictures, forward and backward, in 1e12 operations.

    Raises:
        NoCostError: an architecture has no cost.
    """
    model, (in_vision, in_connector, _) = recipe.model, passes(recipe)
    vision, connector = (image_flops(model, part, images) / 1e12 for part in ("vision", "connector"))
    tower = model.vision
    recomputes = cost_of(model, "vision").again(tower, Pictures.alike(1, tower.grid)) > 0
    again = int(recomputes and in_vision == 3)
    return vision + connector, (in_vision - 1 + again) * vision + (in_connector - 1) * connector


def step_flops(recipe: Recipe, tokens: int, squared_lengths: int, images: float | Pictures) -> int:
    """Return the operations of one step, forward and backward, over the global batch.

    A backward pass costs as much as the forward pass for the gradients of the inputs, and once more for those of
    the weights; a frozen module needs the first only where something below it learns, and never the second.

    Args:
        recipe: the run.
        tokens: tokens of all segments without padding.
        squared_lengths: sum of the squares of the segments' lengths.
        images: images, of usual size where they are a mere number.
    """
    vision, connector, language = passes(recipe)
    model, lora = recipe.model, recipe.lora
    total = (
        vision * int(image_flops(model, "vision", images))
        + connector * int(image_flops(model, "connector", images))
        + language * (language_flops(model.language, tokens, squared_lengths) + int(cross_flops(model, tokens, images)))
    )
    if lora.rank is not None:
        total += 3 * adapter_flops(model.language, lora, tokens, _seen(model, images))
        # Attention has no weights: its backward pass is that of a model that learns.
        total += language_flops(model.language, 0, squared_lengths)
        if model.language.attending_layers:
            crossed = crossed_work(model, tokens, pictures_of(model, images))
            total += len(model.language.attending_layers) * int(crossed.attention)
        total += int(lora.train_head) * 2 * tokens * model.language.hidden_size * model.language.vocab_size
    return total


@dataclass(frozen=True)
class StepFlops:
    """Operations of one step, or of some, over the global batch."""

    useful: int
    """What the model needs for its tokens: no padding, the causal half of attention, nothing twice."""
    conventional: int
    """As PaLM (arXiv 2204.02311, appendix B) and most published figures count: all positions, padding among them, and
    the whole square of attention."""
    hardware: int
    """That, and what is recomputed: PaLM's HFU."""


def count_step(
    recipe: Recipe,
    *,
    tokens: int,
    squared_lengths: int,
    positions: int,
    squared_positions: int,
    images: float | Pictures,
) -> StepFlops:
    """Count the operations of steps in each way.

    Args:
        recipe: the run.
        tokens: tokens of all segments without padding.
        squared_lengths: sum of the squares of the segments' lengths.
        positions: ``tokens``, and padding.
        squared_positions: ``squared_lengths``, and the squares of the lengths of padding.
        images: images.
    """
    language = recipe.model.language
    squared_lengths = round(attended_squares(language, tokens, squared_lengths))
    squared_positions = round(attended_squares(language, positions, squared_positions))
    # Twice the causal half is the square.
    whole = step_flops(recipe, positions, 2 * squared_positions, images)
    return StepFlops(
        useful=step_flops(recipe, tokens, squared_lengths, images),
        conventional=whole,
        hardware=whole + recomputed_flops(recipe, positions, 2 * squared_positions, images),
    )


def recomputed_flops(recipe: Recipe, tokens: int, squared_lengths: int, images: float | Pictures) -> int:
    """Return the forward operations of a step that are made a second time, as backward passes need them.

    Arguments as of :func:`step_flops`.
    """
    language, granularity = recipe.model.language, recipe.parallel.recompute_granularity
    vision, _, language_passes = passes(recipe)
    total = 0
    if granularity is not None and language_passes > 1:
        total = language_flops(language, 0, squared_lengths)  # attention's
    if granularity == "full" and language_passes > 1:
        # The output layer is not among the layers.
        total += language_flops(language, tokens, 0) - 2 * tokens * language.hidden_size * language.output_rows
        total += int(cross_flops(recipe.model, tokens, images))
        if recipe.lora.rank is not None:
            total += adapter_flops(language, recipe.lora, tokens, _seen(recipe.model, images))
    if vision > 1:
        tower = recipe.model.vision
        total += int(cost_of(recipe.model, "vision").again(tower, pictures_of(recipe.model, images)))
    return total


def passes(recipe: Recipe) -> tuple[int, int, int]:
    """Return what forward and backward of tower, connector and language model cost, in forward passes of each.

    Frozen weights beside adapters have gradients of their inputs only.
    """
    modules = recipe.modules
    if recipe.model.vision.codes is not None:  # neither the tower nor what is behind it has weights that learn
        modules = replace(modules, vision=ModuleTraining(freeze=True), connector=ModuleTraining(freeze=True))
    language = _passes(modules.language, below_learns=not (modules.vision.freeze and modules.connector.freeze))
    return (
        _passes(modules.vision, below_learns=False),
        _passes(modules.connector, below_learns=not modules.vision.freeze),
        language if recipe.lora.rank is None else 2,
    )


def _passes(module: ModuleTraining, *, below_learns: bool) -> int:
    """Return what forward and backward of a module cost, in forward passes."""
    if not module.freeze:
        return 3
    return 2 if below_learns else 1
