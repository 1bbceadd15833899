"""Bytes of activations: what a forward pass keeps for the backward pass, and what comes and goes on top of it.

Read off the layers that megavlm builds, tensor by tensor, for both kinds of layers (Transformer Engine's fused ones
and plain torch). ``tests/planning/test_activations.py`` holds what is kept against the tensors that autograd saves in
the plain-torch layers. Korthikanti et al. (arXiv 2205.05198) count the same for GPT's layers.

Legend: S tokens of a pack; s tokens that this rank has between the tensor-parallel regions (S / TP with sequence
parallelism, else S); E width of the language model, F of its MLP; b bytes of a number. Towers and connectors
count their own (``cost.py`` of their architectures).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megavlm.architectures.cost import Kernels, cost_of, decoder_cost, features_of, final_norm_kept
from megavlm.config.schema import Recipe
from megavlm.planning.experts import kinds_of
from megavlm.planning.layout import Chunk, Layout
from megavlm.planning.shares import Seen, seen_by_layers, share


@dataclass(frozen=True)
class Held:
    """Bytes of one pass of a micro-batch through a chunk, on one rank."""

    language: int
    """Kept by the language layers, from the forward to the backward pass."""
    vision: int
    """Kept by tower and connector."""
    output: int
    """Kept by the output layer and the loss."""
    forward: int
    """Most that comes and goes within the forward pass, beyond what is kept."""
    backward: int
    """Most that comes and goes within the backward pass, with the activations of what is recomputed."""

    @property
    def kept(self) -> int:
        """All that is kept."""
        return self.language + self.vision + self.output


def kernels_of(recipe: Recipe) -> Kernels:
    """Return the kernels on a GPU: Transformer Engine, unless the recipe asks for plain torch or for fp32."""
    half = recipe.training.precision != "fp32"
    fused = half and recipe.parallel.transformer_impl != "torch"
    fp8 = fused and engine_key(recipe, "fp8") is not None
    return Kernels(fused=fused, number_bytes=2 if half else 4, fp8=fp8)


def engine_key(recipe: Recipe, name: str) -> Any:
    """Return a key of the recipe's ``engine`` branch, or None where it has none."""
    return getattr(getattr(recipe, "engine", None), name, None)


def weights_learn(recipe: Recipe) -> bool:
    """Whether the language model's own weights learn, and so do not wait beside adapters."""
    return not recipe.modules.language.freeze and recipe.lora.rank is None


def carried_streams(recipe: Recipe, layout: Layout) -> int:
    """Return how many streams go from chunk to chunk beside the residual one: ``megavlm.models.streams``."""
    return max(recipe.model.vision.deepstack - layout.chunks[0].layers, 0) if len(layout.chunks) > 1 else 0


def _beside_kept(recipe: Recipe, layout: Layout, chunk: Chunk, stream: int) -> int:
    """Return the bytes of these streams that a chunk keeps: those it received, or recomputes its layers with."""
    if not chunk.first:
        return carried_streams(recipe, layout) * stream
    return recipe.model.vision.deepstack * stream * int(recipe.parallel.recompute_granularity == "full")


def language_kept(
    recipe: Recipe, layout: Layout, chunk: Chunk, tokens: int, kernels: Kernels, images: Seen = 0.0
) -> int:
    """Return the bytes that the language layers of a chunk keep, with the recipe's recomputation."""
    language, parallel, cost = recipe.model.language, recipe.parallel, decoder_cost(recipe.model.language)
    learns, adapted = weights_learn(recipe), recipe.lora.rank is not None
    local = tokens // layout.tensor if layout.sequence_parallel else tokens
    stream = local * language.hidden_size * kernels.number_bytes
    beside = _beside_kept(recipe, layout, chunk, stream)
    crossed = 0
    if chunk.features_go_on:
        features = features_of(recipe.model, seen_by_layers(recipe.model, images, layout.context))
        shared = features / layout.tensor if layout.sequence_parallel else features
        # As they came, or went into the first layers: what those that attend to them keep of them.
        beside += int(shared * (language.feature_width or language.hidden_size) * kernels.number_bytes)
        if chunk.attending:
            crossed = cost.cross_kept(language, layout, tokens, features, kernels, learns=learns)
            if adapted and not language.feature_width:  # beside text that attention has none
                crossed += cost.cross_adapters_kept(language, recipe.lora, layout, tokens, features, kernels)
                crossed -= cost.adapters_kept(language, recipe.lora, layout, tokens, kernels)
    if parallel.recompute_granularity == "full":
        units = -(-chunk.layers // (parallel.recompute_num_layers or 1))
        return units * stream + beside + cost.shared_kept(language, tokens)
    kinds = kinds_of(recipe, chunk)
    layers = sum(n * cost.layer_kept(kind, layout, tokens, kernels, learns=learns) for kind, n in kinds)
    if parallel.recompute_granularity == "selective":
        layers -= chunk.layers * cost.attention_kept(language, layout, tokens, kernels, learns=learns)
    if adapted:
        layers += sum(n * cost.adapters_kept(kind, recipe.lora, layout, tokens, kernels) for kind, n in kinds)
    # Of those that attend to pictures, what they keep instead, or beside.
    layers += chunk.attending * crossed
    layers -= chunk.crossed * cost.layer_kept(language, layout, tokens, kernels, learns=learns)
    return layers + beside


def vision_kept(recipe: Recipe, layout: Layout, images: Seen, kernels: Kernels) -> int:
    """Return the bytes that tower and connector keep of pictures."""
    model, modules = recipe.model, recipe.modules
    kept = 0
    if not modules.vision.freeze:
        ranks, seen = share(model, "vision", layout, images)
        kept += int(cost_of(model, "vision").kept(model.vision, ranks, seen, kernels))
    if not (modules.vision.freeze and modules.connector.freeze):
        learns = not modules.connector.freeze
        ranks, seen = share(model, "connector", layout, images)
        kept += int(cost_of(model, "connector").kept(model, ranks, seen, kernels, learns=learns))
    return kept


def held_by(recipe: Recipe, layout: Layout, chunk: Chunk, tokens: int, images: Seen) -> Held:
    """Return the bytes of one micro-batch in one chunk, on one rank; ``images``: what the tower sees of it."""
    kernels = kernels_of(recipe)
    b, tp, language = kernels.number_bytes, layout.tensor, recipe.model.language
    learns, lora, cost = weights_learn(recipe), recipe.lora, decoder_cost(language)
    head = learns or lora.train_head
    hidden = language.hidden_size
    local = tokens // tp if layout.sequence_parallel else tokens
    wide, stream = tokens * hidden * b, local * hidden * b
    kept = language_kept(recipe, layout, chunk, tokens, kernels, images)
    vision = output = 0
    kinds = [kind for kind, _ in kinds_of(recipe, chunk)] or [language]
    passing = [cost.layer_passing(kind, lora, layout, tokens, kernels, learns=learns) for kind in kinds]
    forward, backward, gathered = (max(column) for column in zip(*passing, strict=True))
    layer = max(
        cost.layer_kept(kind, layout, tokens, kernels, learns=learns)
        + (0 if lora.rank is None else cost.adapters_kept(kind, lora, layout, tokens, kernels))
        for kind in kinds
    )
    if recipe.parallel.recompute_granularity == "full":
        unit = min(recipe.parallel.recompute_num_layers or 1, chunk.layers)
        backward += unit * layer
        if gathered:
            forward = max(forward, gathered + 2 * stream)
            backward = max(backward, gathered + 2 * stream + (unit - 1) * layer)
    elif gathered:
        forward, backward = (max(most, gathered + 4 * stream - layer) for most in (forward, backward))
    if chunk.last:
        rows = cost.vocabulary(language, tp) // tp
        # The final norm and the output layer keep their inputs; the loss keeps the softmax in fp32.
        output = final_norm_kept(language, local * hidden, kernels, learns=learns or lora.train_norms)
        output += stream * int(head) + tokens * rows * 4
        # The logits themselves, forward; their gradient and the weight's, backward. In fp32 these are in place.
        logits = tokens * rows * b * int(b == 2)
        forward = max(forward, logits)
        products = logits + wide + int(head) * rows * hidden * b - tokens * rows * 4 * int(b == 2)
        # By the time that the layers' turn comes, the loss has let go of what it kept.
        backward = max(logits, products, backward - output)
    if chunk.first:
        vision = vision_kept(recipe, layout, images, kernels) if chunk.encodes else 0
        if layout.sequence_parallel:  # the first layer's input is a view of the whole sequence
            vision += wide - stream
    if chunk.encodes:
        # The tower comes before, and its backward pass after, what the language layers keep.
        tower, (ranks, seen) = cost_of(recipe.model, "vision"), share(recipe.model, "vision", layout, images)
        trains_vision = not recipe.modules.vision.freeze
        most = int(tower.passing(recipe.model.vision, ranks, seen, kernels, learns=trains_vision))
        rebuilt = int(tower.rebuilt(recipe.model.vision, ranks, seen, kernels)) if trains_vision else 0
        forward = max(forward, most - kept - output - (vision if recipe.modules.vision.freeze else 0))
        backward = max(backward, rebuilt - kept - output)
    if chunk.first and (learns or lora.train_embeddings):  # the embedding's gradient
        # All of the pack is embedded on each context-parallel rank.
        embedded = wide * layout.context
        backward = max(backward, cost.vocabulary(language, tp) // tp * hidden * b + embedded - kept - output)
    return Held(language=kept, vision=vision, output=output, forward=forward, backward=backward)
