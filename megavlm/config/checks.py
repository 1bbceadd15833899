"""Rules between keys: what the types alone cannot say, checked before any process group starts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from megavlm.config.architecture import BRANCHES, CONNECTORS, architecture_of
from megavlm.config.codes import codes_rules
from megavlm.config.context import CP, context_rules
from megavlm.config.encoder import encoder_rules
from megavlm.config.engine import engine_rules
from megavlm.config.errors import RecipeError
from megavlm.config.experts import expert_rules, expert_world
from megavlm.config.lora import lora_rules
from megavlm.config.prepared import META
from megavlm.config.rules import TP, choices, divides
from megavlm.config.schema import ConnectorConfig, DataSource, Recipe
from megavlm.config.split import part_rules
from megavlm.config.vision import vision_rules

__all__ = ["RecipeError", "check_paths", "check_recipe"]

TEXT_TOKENS = 8
"""The least text that must fit beside one image in a sequence: less than a ChatML turn leaves nothing to train on."""


_MORE: list[Callable[[Recipe], Iterator[str]]] = []


def add_rule(rule: Callable[[Recipe], Iterator[str]]) -> None:
    """Add a rule of a room above, whose keys this one does not know; it yields a line for each broken one."""
    _MORE.append(rule)


def check_recipe(recipe: Recipe, world_size: int | None = None) -> None:
    """Check the rules between keys.

    Args:
        recipe: The recipe.
        world_size: Number of processes; None leaves out the rules that need it.

    Raises:
        RecipeError: with a line for each broken rule: key, rule, remedy.
    """
    lines = [line for rule in rules_of(world_size) for line in rule(recipe)]
    if lines:
        raise RecipeError.of(lines)


def rules_of(world_size: int | None = None) -> list[Callable[[Recipe], Iterator[str]]]:
    """Return the rules that :func:`check_recipe` asks, in their order; each goes by the recipe alone."""
    rules: list[Callable[[Recipe], Iterator[str]]] = [
        _architectures, _deepstack, _stages, _parallel, _data, _modules, _optimizer, _recorded, _exports, _loss,
        engine_rules, expert_rules, lora_rules, vision_rules, context_rules, codes_rules, encoder_rules,
        *_MORE,
    ]  # fmt: skip
    return rules if world_size is None else [*rules, functools.partial(_world, world_size=world_size)]


def remarks(recipe: Recipe) -> list[str]:
    """Return what is allowed and seldom meant, a line each: key, what it does, remedy."""
    length, longest = recipe.data.sequence_length, recipe.model.language.max_position_embeddings
    if length <= longest:
        return []
    return [
        f"data.sequence_length: samples may have {length} tokens, but the language model's positions end at {longest} "
        "(model.language.max_position_embeddings), and nothing stretches them in training (dynamic rope_scaling "
        f"neither): set it to {longest} or less, unless the model is to learn longer texts"
    ]


def check_paths(recipe: Recipe) -> None:
    """Check that the files and directories of the recipe are there.

    Raises:
        RecipeError: with a line for each that is not.
    """
    lines: list[str] = []
    tokenizer = recipe.data.tokenizer
    if tokenizer is not None and not Path(tokenizer).exists():
        lines.append(f"data.tokenizer: no file {tokenizer!r}; give the path of a tokenizer file")
    for key, sources in (("data.train", recipe.data.train), ("data.validation", recipe.data.validation)):
        for position, source in enumerate(sources):
            name = f"{key}.{position}.path"
            plain = not (Path(source.path) / META).is_dir()
            if plain and "://" not in source.path and not Path(source.path).exists():
                lines.append(
                    f"{name}: no file or directory {source.path!r}; name one that megavlm prepare wrote, or plain data"
                )
            for other in ("images", "format") if not plain else ():
                if getattr(source, other) is not None:
                    lines.append(f"{key}.{position}.{other}: {source.path!r} is prepared already; leave it out")
            images = source.images
            if images is not None and "://" not in images and not Path(images).is_dir():
                lines.append(f"{key}.{position}.images: no directory {images!r}; correct the path")
    load = recipe.checkpoint.load
    if load is not None and not Path(load).exists():
        lines.append(f"checkpoint.load: no checkpoint {load!r}; correct the path, or leave the key out")
    if Path(recipe.output_dir).exists() and not Path(recipe.output_dir).is_dir():
        lines.append(f"output_dir: {recipe.output_dir!r} is a file; name a directory")
    if lines:
        raise RecipeError.of(lines)


_PP = "parallel.pipeline_model_parallel_size"
_VPP = "parallel.virtual_pipeline_model_parallel_size"
_FIRST = "parallel.num_layers_in_first_pipeline_stage"


def _architectures(recipe: Recipe) -> Iterator[str]:
    """Yield what the architectures of the model's branches have against their keys."""
    for branch in BRANCHES:
        architecture = architecture_of(recipe.model, branch)
        yield from part_rules(recipe.model, branch, recipe.parallel)
        if architecture.cost is None and recipe.data.balance_images:
            yield (
                f"data.balance_images: orders packs by their cost, and the {architecture.name} architecture of"
                f" model.{branch} has no figures of its own; set it to false"
            )


def _deepstack(recipe: Recipe) -> Iterator[str]:
    """Check that connector and language model take what the tower's layers give them."""
    vision, connector = recipe.model.vision, recipe.model.connector
    if vision.packed and not connector.packed:
        takers = [one.name for one in CONNECTORS.architectures() if one.config.packed is not ConnectorConfig.packed]
        yield (
            f"model.connector.preset: {connector.preset} takes pictures of one size, and those of the tower "
            f"{vision.preset!r} have sizes of their own; name one of {', '.join(takers)}, or another tower"
        )
    if vision.class_features and not connector.takes_class_feature:
        plain = ConnectorConfig.takes_class_feature
        takers = [one.name for one in CONNECTORS.architectures() if one.config.takes_class_feature is not plain]
        yield (
            f"model.vision.class_feature: the connector {connector.preset} takes features of patches alone; set this"
            f" to false, or name {' or '.join(takers)}"
        )
    language, levels, key = recipe.model.language, recipe.model.vision.deepstack, "model.vision.deepstack_layers"
    if levels and not language.takes_deepstack:
        yield f"{key}: the language model {language.preset!r} adds nothing behind its layers; set this to []"
    elif levels > language.num_layers:
        yield f"{key}: {levels} layers, each for one of model.language.num_layers ({language.num_layers}); name fewer"


def _stages(recipe: Recipe) -> Iterator[str]:
    """Check how the language model's layers fall on stages and chunks."""
    parallel, layers = recipe.parallel, recipe.model.language.num_layers
    pp, vpp = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    first = parallel.num_layers_in_first_pipeline_stage
    if pp == 1:
        for key, value in ((_VPP, vpp), (_FIRST, first)):
            if value is not None:
                yield f"{key}: needs {_PP} > 1; raise that, or set this to null"
        yield from _recompute(recipe, [layers])
        return
    if first is None:
        if layers % pp:
            yield (
                f"{_PP}: model.language.num_layers ({layers}) is not divisible by it ({pp}); change it, or set {_FIRST}"
            )
            return
        stages = [layers // pp] * 2
    else:
        rest = layers - first
        if rest < pp - 1 or rest % (pp - 1):
            fitting = [layers - per * (pp - 1) for per in range(1, layers) if layers - per * (pp - 1) > 0]
            choice = f"take one of {choices(fitting)}" if fitting else f"lower {_PP}"
            yield (
                f"{_FIRST}: {first} of {layers} layers leaves {rest},"
                f" which do not split evenly over the {pp - 1} other stages; {choice}"
            )
            return
        stages = [first, rest // (pp - 1)]
    if vpp is not None and any(stage % vpp for stage in stages):
        counts = str(stages[0]) if stages[0] == stages[1] else f"{stages[0]} in the first, {stages[1]} in the others"
        yield f"{_VPP}: the layers of a stage ({counts}) are not divisible by it ({vpp}); change it, or the split"
        return
    yield from _recompute(recipe, [stage // (vpp or 1) for stage in stages])


def _recompute(recipe: Recipe, chunks: Sequence[int]) -> Iterator[str]:
    parallel = recipe.parallel
    key, unit = "parallel.recompute_num_layers", parallel.recompute_num_layers
    if unit is None:
        return
    if parallel.recompute_granularity != "full":
        yield f"{key}: only goes with parallel.recompute_granularity 'full'; set that, or set this to null"
    elif any(chunk % unit for chunk in chunks):
        counts = " and ".join(str(chunk) for chunk in sorted(set(chunks)))
        yield f"{key}: {unit} does not divide the layers of a model chunk ({counts}); take a divisor"


def _parallel(recipe: Recipe) -> Iterator[str]:
    parallel = recipe.parallel
    tp = parallel.tensor_model_parallel_size
    if parallel.sequence_parallel:
        if tp == 1:
            yield f"parallel.sequence_parallel: needs {TP} > 1; raise that, or set this to false"
        yield from divides("data.sequence_length", recipe.data.sequence_length, tp, f"{TP}, as sequence_parallel asks")
    if parallel.overlap_param_gather:
        for name in ("overlap_grad_reduce", "use_distributed_optimizer"):
            if not getattr(parallel, name):
                yield f"parallel.overlap_param_gather: needs parallel.{name}; set that to true, or this to false"
    if parallel.ddp_bucket_size is not None and not parallel.overlap_grad_reduce:
        yield "parallel.ddp_bucket_size: needs parallel.overlap_grad_reduce; set that to true, or this to null"


def _data(recipe: Recipe) -> Iterator[str]:
    for key, sources in (("data.train", recipe.data.train), ("data.validation", recipe.data.validation)):
        seen: dict[str, int] = {}
        for position, source in enumerate(sources):
            name = source_name(source)
            if name in seen:
                yield (
                    f"{key}.{position}.name: {name!r} is the name of {key}.{seen[name]} as well;"
                    " give one of them another name"
                )
            seen.setdefault(name, position)


def source_name(source: DataSource) -> str:
    """Return the name of a data set in logs: its own, or its directory's."""
    return source.name if source.name is not None else Path(source.path).name


def task_name(source: DataSource) -> str:
    """Return the task of a data set: its own, or its name."""
    return source.task if source.task is not None else source_name(source)


def _loss(recipe: Recipe) -> Iterator[str]:
    """Check the keys of tasks: where they would have no effect, and that a task has one weight."""
    data, by_task = recipe.data, recipe.loss.kind == "task_mean"
    first: dict[str, int] = {}
    for key, sources in (("data.train", data.train), ("data.validation", data.validation)):
        for position, source in enumerate(sources):
            for name, value in (("task", source.task), ("loss_weight", source.loss_weight)):
                if value in (None, 1.0):
                    continue
                own = f"{key}.{position}.{name}"
                if key == "data.validation":
                    yield f"{own}: only data.train has tasks; leave it out"
                elif not by_task:
                    yield f"{own}: has no effect with loss.kind token_mean; set that to task_mean, or leave this out"
    for position, source in enumerate(data.train if by_task else ()):
        other = first.setdefault(task_name(source), position)
        if data.train[other].loss_weight != source.loss_weight:
            yield (
                f"data.train.{position}.loss_weight: {source.loss_weight:g}, but data.train.{other} of the same task"
                f" {task_name(source)!r} has {data.train[other].loss_weight:g}; give both the same"
            )


def _modules(recipe: Recipe) -> Iterator[str]:
    modules = recipe.modules
    if modules.vision.freeze and modules.connector.freeze and modules.language.freeze:
        yield "modules: all three parts are frozen, so nothing would be trained; set freeze to false for one of them"
    for name in ("connector", "language"):
        if getattr(modules, name).layer_decay != 1.0:
            yield f"modules.{name}.layer_decay: only the vision tower has layer-wise decay; set it to 1"


def _optimizer(recipe: Recipe) -> Iterator[str]:
    optimizer, steps, epochs = recipe.optimizer, recipe.training.train_steps, recipe.training.epochs
    if (steps is None) == (epochs is None):
        both = "and training.epochs are both set; set one to null" if steps else "missing; set it, or training.epochs"
        yield f"training.train_steps: {both}"
    if optimizer.min_lr > optimizer.lr:
        yield f"optimizer.min_lr: {optimizer.min_lr:g} is above optimizer.lr ({optimizer.lr:g}); lower it"
    decay = optimizer.wsd_decay_steps
    if optimizer.schedule == "WSD" and decay is None:
        yield "optimizer.wsd_decay_steps: the WSD schedule needs it; set it to the steps of the final decay"
    if optimizer.schedule != "WSD" and decay is not None:
        yield f"optimizer.wsd_decay_steps: the {optimizer.schedule} schedule has none; set it to null"
        decay = None
    warmup = optimizer.warmup_steps
    if steps is None:  # checked again when they are counted
        return
    # Megatron's scheduler asserts that something is left after the warm-up.
    if warmup >= steps:
        yield f"optimizer.warmup_steps: {warmup} must be below training.train_steps ({steps}); lower it"
    elif warmup + (decay or 0) > steps:
        yield (
            f"optimizer.wsd_decay_steps: with optimizer.warmup_steps it makes {warmup + (decay or 0)} steps,"
            f" above training.train_steps ({steps}); lower one of the two"
        )


def idle_intervals(recipe: Recipe) -> list[str]:
    """Return the keys that have no effect as ``data.validation`` is empty."""
    given = {
        "logging.panel_interval": recipe.logging.panel_interval,
        "training.validation_interval": recipe.training.validation_interval,
    }
    return [] if recipe.data.validation else [key for key, value in given.items() if value is not None]


def _exports(recipe: Recipe) -> Iterator[str]:
    """Check that exports are of steps that have a checkpoint."""
    rule, interval = recipe.checkpoint.export_hf, recipe.checkpoint.save_interval
    if not isinstance(rule, int):
        return
    if rule < 1:
        yield f"checkpoint.export_hf: {rule} is no number of steps; write last, every, or 1 or more"
    elif interval is None:
        yield f"checkpoint.export_hf: {rule} needs checkpoint.save_interval: checkpoints are exported; set that too"
    elif rule % interval:
        yield (
            f"checkpoint.export_hf: {rule} is not a multiple of checkpoint.save_interval ({interval}), and checkpoints"
            " are exported; take a multiple of it"
        )


def _recorded(recipe: Recipe) -> Iterator[str]:
    """Check the steps and ranks of profiles and memory snapshots."""
    logging, steps = recipe.logging, recipe.training.train_steps
    for name in ("profile_steps", "memory_snapshot_steps"):
        chosen = getattr(logging, name)
        if chosen is not None and not 1 <= chosen[0] <= chosen[1] <= (steps or chosen[1]):
            yield (
                f"logging.{name}: {list(chosen)} is no first and last step of 1 to training.train_steps ({steps});"
                " name two of them, the lower one first"
            )
    if min(logging.profile_ranks) < 0:
        yield f"logging.profile_ranks: {min(logging.profile_ranks)} is no rank; they count from 0"


def _world(recipe: Recipe, world_size: int) -> Iterator[str]:
    """Check the rules that depend on the number of processes."""
    parallel, highest = recipe.parallel, max(recipe.logging.profile_ranks)
    if highest >= world_size:
        yield (
            f"logging.profile_ranks: there is no rank {highest} among the {world_size} processes of this job;"
            f" name ranks from 0 to {world_size - 1}"
        )
    tp, pp, cp = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    if world_size % (tp * cp * pp):
        shared = f" x {CP} ({cp})" if cp > 1 else ""
        yield (
            f"{TP}: {tp}{shared} x {_PP} ({pp}) = {tp * cp * pp} does not divide the {world_size} processes of this"
            " job; change the layout, or start as many processes with torchrun --nproc-per-node"
        )
        return
    yield from expert_world(recipe, world_size)
    dp, batch = world_size // (tp * cp * pp), recipe.training.global_batch_size
    key = "training.global_batch_size"
    if batch % dp:
        yield f"{key}: {batch} is not divisible by the data-parallel size ({dp}); take a multiple of it"
    elif parallel.virtual_pipeline_model_parallel_size is not None and (batch // dp) % pp:
        yield (
            f"{key}: {batch} gives {batch // dp} micro-batches per data-parallel rank; the interleaved schedule needs"
            f" a multiple of {_PP} ({pp}); take a multiple of {dp * pp}"
        )
