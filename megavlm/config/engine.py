"""Rules of the recipe's ``engine`` branch: what FP8 asks of shapes and layout, and which keys go together.

The shapes are those of Transformer Engine 2.9 (``assert_dim_for_fp8_exec``, and ``is_quantizable`` of its quantizers).
What depends on the machine is checked where the run starts (:mod:`megavlm.parallel.engine`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from megavlm.config.architecture import architecture_of, own_of
from megavlm.config.schema import EngineConfig, Recipe
from megavlm.config.split import tensor_ranks

_KEY = "engine."
_TP = "parallel.tensor_model_parallel_size"
_DELAYED_ONLY = ("fp8_margin", "fp8_amax_history_len", "fp8_amax_compute_algo", "fp8_wgrad")
_FP8_ONLY = (
    "fp8_recipe",
    *_DELAYED_ONLY,
    "fp8_param_gather",
    "first_last_layers_bf16",
    "vision_bf16",
    "connector_bf16",
)
_BLOCK = 128


def for_inference(recipe: Recipe) -> Recipe:
    """Return ``recipe`` as evaluation runs it: in BF16 or FP32, with no key that a smaller machine may lack."""
    return dataclasses.replace(recipe, engine=EngineConfig())


def engine_rules(recipe: Recipe) -> Iterator[str]:
    """Yield a line for each broken rule: key, rule, remedy."""
    yield from _fusions(recipe)
    yield from _overlap(recipe)
    yield from _graphs(recipe)
    engine = recipe.engine
    if recipe.model.language.cross_layers:
        for name in _changed(engine, ("fp8", "cuda_graph_impl", "tp_comm_overlap")):
            yield f"{_KEY}{name}: does not go with model.language.cross_attention_layers; leave it out"
    if not recipe.model.language.one_weight:
        for name in _changed(engine, ("fp8", "cuda_graph_impl", "tp_comm_overlap")):
            yield f"{_KEY}{name}: does not go with model.language.visual_expert; leave it out"
    if engine.fp8 is None:
        for name in _changed(engine, _FP8_ONLY):
            yield f"{_KEY}{name}: has no effect without {_KEY}fp8; set that to hybrid, or leave this out"
        yield from _bf16_ends(recipe)
        return
    if recipe.training.precision != "bf16":
        yield f"{_KEY}fp8: needs training.precision bf16; set that, or this to null"
    if recipe.parallel.transformer_impl == "torch":
        yield (
            f"{_KEY}fp8: plain torch layers have no FP8; set parallel.transformer_impl to transformer_engine, or this "
            "to null"
        )
    yield from _scaling(recipe)
    yield from _bf16_ends(recipe)
    yield from _shapes(recipe)


def _changed(engine: EngineConfig, names: tuple[str, ...]) -> list[str]:
    plain = EngineConfig()
    return [name for name in names if getattr(engine, name) != getattr(plain, name)]


def _fusions(recipe: Recipe) -> Iterator[str]:
    engine = recipe.engine
    if engine.cross_entropy_loss_fusion == "on" and recipe.training.precision != "bf16":
        # Megatron-Core's fused loss rounds its gradient to bf16, whatever the logits are.
        yield f"{_KEY}cross_entropy_loss_fusion: needs training.precision bf16; set it to off or auto"
    if engine.cross_entropy_fusion_impl == "te" and engine.cross_entropy_loss_fusion != "on":
        yield f"{_KEY}cross_entropy_fusion_impl: te needs {_KEY}cross_entropy_loss_fusion on; set both"
    if engine.cross_entropy_loss_fusion == "on" and recipe.loss.z_loss:
        yield f"{_KEY}cross_entropy_loss_fusion: loss.z_loss has a loss of its own; set it to off or auto, or that to 0"
    language = recipe.model.language
    if engine.apply_rope_fusion == "on" and not language.fused_rotary:
        why = "model.language.rotary_* ask for more"
        if language.recurrent or language.encodes:
            why = "Mamba has no heads" if language.recurrent else "an encoder-decoder's are not turned"
        yield (
            f"{_KEY}apply_rope_fusion: Transformer Engine's kernel turns whole heads by one position, and {why}; set it"
            " to auto or off"
        )
    if engine.bias_activation_fusion == "on" and language.recurrent:
        yield f"{_KEY}bias_activation_fusion: is of MLPs, and Mamba's layers have none; set it to auto"


def _overlap(recipe: Recipe) -> Iterator[str]:
    engine, parallel = recipe.engine, recipe.parallel
    if not engine.tp_comm_overlap:
        return
    key = f"{_KEY}tp_comm_overlap"
    if recipe.model.language.recurrent:
        yield f"{key}: is for Transformer Engine's linear layers, and Mamba's are Megatron-Core's; set it to false"
    if recipe.model.language.latent_attention:
        yield f"{key}: has no buffers for the projections of latent attention; set it to false"
    if not parallel.sequence_parallel:
        yield f"{key}: needs parallel.sequence_parallel, and with it {_TP} > 1; set these, or this to false"
    if parallel.transformer_impl == "torch":
        yield f"{key}: is Transformer Engine's; set parallel.transformer_impl to transformer_engine, or this to false"
    if engine.fp8 is not None and engine.fp8_recipe == "blockwise":
        yield f"{key}: has no buffers for blockwise FP8; take another {_KEY}fp8_recipe, or set this to false"


def _graphs(recipe: Recipe) -> Iterator[str]:
    if recipe.engine.cuda_graph_impl == "none":
        return
    key = f"{_KEY}cuda_graph_impl"
    if recipe.model.language.recurrent:
        yield f"{key}: graphs are of attention and MLP, and Mamba's layers have neither; set it to none"
    if recipe.model.language.latent_attention:
        yield f"{key}: is not proven with latent attention (model.language.kv_lora_rank); set it to none"
    if recipe.training.precision != "bf16":
        yield f"{key}: needs training.precision bf16; set that, or this to none"
    if recipe.parallel.transformer_impl == "torch":
        yield f"{key}: is Transformer Engine's; set parallel.transformer_impl to transformer_engine, or this to none"
    if recipe.parallel.recompute_granularity == "full":
        yield f"{key}: not with parallel.recompute_granularity full; set that to selective or null, or this to none"
    if recipe.modules.language.freeze:
        yield f"{key}: a frozen language model has no backward pass to replay; set this to none"


def _scaling(recipe: Recipe) -> Iterator[str]:
    """Check what goes with which way of scaling."""
    engine = recipe.engine
    if engine.fp8_recipe != "delayed":
        for name in _changed(engine, _DELAYED_ONLY):
            yield f"{_KEY}{name}: belongs to {_KEY}fp8_recipe delayed, not to {engine.fp8_recipe}; leave it out"
    else:
        if engine.first_last_layers_bf16:
            yield f"{_KEY}first_last_layers_bf16: not with {_KEY}fp8_recipe delayed; take tensorwise, or set to false"
        for name in ("vision_bf16", "connector_bf16"):
            if not getattr(engine, name):
                # Delayed scaling reduces over all replicas whenever an FP8 block ends, and which replicas have images
                # differs between micro-batches: they would wait for each other.
                yield f"{_KEY}{name}: must be true with {_KEY}fp8_recipe delayed; take tensorwise, or set it to true"
    if engine.fp8_param_gather:
        if not recipe.parallel.use_distributed_optimizer:
            yield f"{_KEY}fp8_param_gather: needs parallel.use_distributed_optimizer; set that, or this to false"
        if engine.fp8_recipe == "mxfp8":
            yield f"{_KEY}fp8_param_gather: not with {_KEY}fp8_recipe mxfp8; take another recipe, or set it to false"


def _bf16_ends(recipe: Recipe) -> Iterator[str]:
    """Check the first and last layers that stay in BF16."""
    engine, most = recipe.engine, recipe.model.language.num_layers // recipe.parallel.pipeline_model_parallel_size
    for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
        value = getattr(engine, name)
        if not engine.first_last_layers_bf16:
            if _changed(engine, (name,)):
                yield f"{_KEY}{name}: has no effect without {_KEY}first_last_layers_bf16; set that, or leave this out"
        elif value > most:
            yield f"{_KEY}{name}: {value} is more than the layers of a pipeline stage ({most}); lower it"


def _shapes(recipe: Recipe) -> Iterator[str]:
    """Check that what FP8 multiplies has whole blocks."""
    engine, parallel, model = recipe.engine, recipe.parallel, recipe.model
    unit = 32 if engine.fp8_recipe == "mxfp8" else 16
    tp = parallel.tensor_model_parallel_size
    shards = tp if parallel.sequence_parallel else 1
    gathered = shards > 1 and engine.fp8_recipe == "blockwise"  # activations travel quantised, in whole blocks
    rows = _BLOCK if gathered else unit
    language = model.language
    what = f"{rows} x {shards}, as {engine.fp8_recipe} FP8 asks" + (" with sequence_parallel" if shards > 1 else "")
    if recipe.data.sequence_length % (rows * shards):
        yield f"data.sequence_length: {recipe.data.sequence_length} is not divisible by {what}; change it"
    if gathered and language.hidden_size % _BLOCK:
        yield (
            f"model.language.hidden_size: {language.hidden_size} is not divisible by {_BLOCK}, as blockwise FP8 asks "
            f"with sequence_parallel; take another {_KEY}fp8_recipe"
        )
    parts = {"fp8": "language"}
    parts |= {f"{part}_bf16": part for part in ("vision", "connector") if not getattr(engine, f"{part}_bf16")}
    for name, part in parts.items():
        architecture = architecture_of(model, part)
        if architecture.products is None:
            remedy = f"set {_KEY}fp8 to null" if name == "fp8" else f"set {_KEY}{name} to true"
            yield f"model.{part}.preset: FP8 is not known to fit the {architecture.name} architecture; {remedy}"
            continue
        checks = architecture.products(own_of(model, part), tensor_ranks(model, part, tp))
        seen: set[str] = set()
        for key, value, split in checks:
            if key in seen or not value % (unit * split):
                continue
            seen.add(key)
            yield _not_divisible(key, value, unit, split, name, engine)


def _not_divisible(key: str, value: int, unit: int, split: int, part: str, engine: Any) -> str:
    count = {
        "model.language.kv_channels": " (all heads together)",
        "model.vision.image_size": " positions of an image",
    }.get(key, "")
    over = f" over {_TP} ({split})" if split > 1 else ""
    remedy = f"set {_KEY}fp8 to null" if part == "fp8" else f"set {_KEY}{part} to true"
    return f"{key}: {value}{count}{over} gives no multiple of {unit}, as {engine.fp8_recipe} FP8 asks; {remedy}"
