"""Rules of language models with an encoder of their own (T5), beside those of their keys."""

from __future__ import annotations

from collections.abc import Iterator

from megavlm.config.errors import UserError
from megavlm.config.schema import ModelConfig, Recipe


def encoder_rules(recipe: Recipe) -> Iterator[str]:
    """Yield what does not go with an encoder and a decoder."""
    if not recipe.model.language.encodes:
        return
    engine, what = recipe.engine, f"an encoder-decoder (model.language.preset {recipe.model.language.preset})"
    for key, wrong, why, remedy in (
        ("engine.cuda_graph_impl", engine.cuda_graph_impl != "none", "its stacks' lengths differ by the pack", "none"),
        ("engine.tp_comm_overlap", engine.tp_comm_overlap, "its linear layers are Megatron-Core's", "false"),
        ("logging.panel_interval", recipe.logging.panel_interval is not None, "it does not answer", "null"),
    ):
        if wrong:
            yield f"{key}: does not go with {what}: {why}; set it to {remedy}"


def check_answers(model: ModelConfig) -> None:
    """Check that a model can answer.

    Raises:
        UserError: it cannot.
    """
    if model.language.encodes:
        raise UserError(
            f"model.language.preset: {model.language.preset} is an encoder-decoder, which is trained here and does not"
            " answer; its loss on data.validation is what there is to measure it by"
        )
