"""Rules of pictures that are tokens: tower, connector and language model go together."""

from __future__ import annotations

from collections.abc import Iterator

from megavlm.config.schema import EngineConfig, Recipe

_TOKENS = "model.language.image_tokens"


def codes_rules(recipe: Recipe) -> Iterator[str]:
    """Yield what does not go with codes, or with no codes."""
    model = recipe.model
    codes, tokens = model.vision.codes, model.language.picture_tokens
    if recipe.loss.image_tokens and tokens is None:
        yield f"loss.image_tokens: pictures of the tower {model.vision.preset!r} are no tokens; set it to 0"
    if recipe.loss.image_tokens and recipe.logging.panel_interval is not None and recipe.data.validation:
        yield (
            "logging.panel_interval: the panel asks what stands in front of the first label, which with"
            " loss.image_tokens is a picture's; set it to null"
        )
    if codes is None:
        if model.connector.takes_codes:
            yield (
                f"model.connector.preset: {model.connector.preset} takes codes, and the tower {model.vision.preset!r}"
                " gives features; name another connector, or chameleon_vq_gan as the tower"
            )
        if tokens is not None:
            yield f"{_TOKENS}: pictures of the tower {model.vision.preset!r} are features; set it to []"
        return
    if not model.connector.takes_codes:
        yield (
            f"model.connector.preset: {model.connector.preset} takes features, and pictures of the tower"
            f" {model.vision.preset!r} are codes; set it to codes"
        )
    if tokens is None or tokens[1] - tokens[0] != codes:
        given = 0 if tokens is None else tokens[1] - tokens[0]
        yield (
            f"{_TOKENS}: has {given} tokens, and the tower {model.vision.preset!r} has {codes} codes"
            " (model.vision.num_codes); give the first of as many, and the one behind the last"
        )
    if recipe.modules.language.freeze:
        yield (
            f"modules.language.freeze: pictures of the tower {model.vision.preset!r} are codes, and neither it nor the"
            " connector ever learns, so nothing would be trained; set it to false"
        )
    for name in ("vision", "connector"):
        module = getattr(recipe.modules, name)
        for key in ("lr_multiplier", "layer_decay"):
            if getattr(module, key) != 1.0 and (name, key) != ("connector", "layer_decay"):  # which has a rule
                yield f"modules.{name}.{key}: has no effect, as no weight of it learns; set it to 1"
    for name in ("fp8", "cuda_graph_impl", "tp_comm_overlap"):
        if getattr(recipe.engine, name) != getattr(EngineConfig(), name):
            yield f"engine.{name}: does not go with {_TOKENS}; leave it out"
    if recipe.parallel.vision_placement == "all_ranks":
        yield (
            f"parallel.vision_placement: all_ranks sends features, and pictures of the tower {model.vision.preset!r}"
            " are codes; set it to first_stage"
        )
