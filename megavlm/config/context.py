"""Rules of context parallelism (``parallel.context_parallel_size``)."""

from __future__ import annotations

from collections.abc import Iterator

from megavlm.config.schema import Recipe

CP = "parallel.context_parallel_size"


def context_rules(recipe: Recipe) -> Iterator[str]:
    """Yield what does not go with cutting sequences over ranks; see docs/context-parallel.md."""
    parallel, engine, size = recipe.parallel, recipe.engine, recipe.parallel.context_parallel_size
    if size == 1:
        if parallel.cp_comm_type != "p2p":
            yield f"parallel.cp_comm_type: has no effect without {CP} above 1; set that, or leave this out"
        return
    if recipe.model.language.recurrent:
        yield (
            f"{CP}: cuts each sample over ranks, and Mamba's layers hand a state from position to position; set it to 1"
        )
        return
    length, least = recipe.data.sequence_length, 2 * size
    if length < least:
        yield (
            f"{CP}: cuts each sample into {least} pieces, and data.sequence_length is {length}; take"
            f" {max(length // 2, 1)} or less, or longer sequences"
        )
    yield from _exchange(recipe)
    for key, wrong, remedy in (
        ("engine.fp8", engine.fp8 is not None, "null"),
        ("engine.cuda_graph_impl", engine.cuda_graph_impl != "none", "none"),
        ("engine.tp_comm_overlap", engine.tp_comm_overlap, "false"),
    ):
        if wrong:  # buffers, graphs and blocks of one length: samples are filled up, and packs differ by it
            yield f"{CP}: does not go with {key}, which asks for equally long packs; set that to {remedy}, or this to 1"
    language = recipe.model.language
    if not language.one_weight:  # they would have to know which positions are a rank's
        yield (
            f"{CP}: is not proven with weights of their own for image tokens (model.language.visual_expert); set it"
            " to 1"
        )
    if language.shared_positions:
        yield f"{CP}: is not proven with model.language.image_positions shared; set it to 1"
    if engine.apply_rope_fusion == "on":
        yield f"{CP}: does not go with engine.apply_rope_fusion on; set that to auto or off, or this to 1"
    if parallel.vision_placement != "first_stage":
        yield (
            f"{CP}: shares the pictures out over its ranks of the first stage, and does not go with"
            f" parallel.vision_placement {parallel.vision_placement}; set that to first_stage, or this to 1"
        )


def _exchange(recipe: Recipe) -> Iterator[str]:
    """Yield what stands against exchanging heads for positions."""
    parallel, language = recipe.parallel, recipe.model.language
    if parallel.cp_comm_type != "a2a":
        return
    key, ranks = "parallel.cp_comm_type: a2a", parallel.tensor_model_parallel_size * parallel.context_parallel_size
    if language.latent_attention:
        yield f"{key} is not proven with latent attention (model.language.kv_lora_rank); set it to p2p"
    if parallel.transformer_impl != "transformer_engine":
        yield f"{key} is Transformer Engine's; set parallel.transformer_impl to transformer_engine, or this to p2p"
    for name in ("num_attention_heads", "num_query_groups"):
        heads = getattr(language, name)
        if heads % ranks:
            yield (
                f"{key} gives each rank whole heads, and model.language.{name} ({heads}) is not divisible by"
                f" parallel.tensor_model_parallel_size x {CP} ({ranks}); set it to p2p"
            )
