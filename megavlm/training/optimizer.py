"""Megatron-Core's optimizer and scheduler, set up from a recipe: one parameter group per learning rate."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, ParamKey, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride
from megatron.core.transformer.module import MegatronModule

from megavlm.config.schema import ModuleTraining, Recipe
from megavlm.models.build import MODULES
from megavlm.parallel.megatron_versions import groups_known_by_kind
from megavlm.training.chained import JoinedOptimizer, groups_of_all
from megavlm.training.vision import groups

_ABOVE = ("ln_post.", "neck.", "second_neck.", "second_scale", "halve", "post_tile", "global_transformer.")
"""How names of what lies above a tower's layers begin: it learns as the last of them."""
_GROUP_SETTINGS = ("max_lr", "min_lr", "wd_mult", "betas", "eps")


def learning_rate_factor(name: str, module: ModuleTraining, num_layers: int) -> float:
    """Return the factor on the learning rate of one parameter.

    With layer-wise decay d, layer i of ``num_layers`` (from 0) gets d ** (num_layers - 1 - i), and what lies below
    the layers (patch embedding, positions, first norm) d ** num_layers (BEiT's rule, arXiv 2106.08254). The norm
    above the layers learns like the last of them, and so do the gated layers of a tower on tiles.

    Args:
        name: the parameter's name inside its module.
        module: the recipe's branch of the module.
        num_layers: layers of the module.
    """
    above = name.startswith(_ABOVE)
    layer = re.search(r"\blayers\.(\d+)\.", name)
    if layer and not above:
        depth = num_layers - 1 - int(layer.group(1))
    else:
        depth = 0 if above else num_layers
    return module.lr_multiplier * module.layer_decay**depth


def _module_of(name: str) -> tuple[str, str]:
    """Split a name such as ``module.module.vision.conv1.weight`` into ``vision`` and ``conv1.weight``."""
    head, _, tail = name.partition(".")
    while head not in MODULES:
        assert tail, f"parameter {name} belongs to no module"
        head, _, tail = tail.partition(".")
    return head, tail


@dataclasses.dataclass(frozen=True)
class _Factors:
    """The factors on the learning rate of a module's parameters, or of those of one of two towers."""

    module: ModuleTraining
    layers: int
    prefix: str = ""

    @property
    def all(self) -> set[float]:
        """Every one that there may be."""
        depths = range(self.layers + 1) if self.module.layer_decay != 1.0 else (0,)
        return {self.module.lr_multiplier * self.module.layer_decay**depth for depth in depths}

    def of(self, name: str) -> float | None:
        """Return that of a parameter; None where it is another tower's."""
        if not name.startswith(self.prefix):
            return None
        return learning_rate_factor(name.removeprefix(self.prefix), self.module, self.layers)


def _factors(recipe: Recipe, name: str) -> list[_Factors]:
    module, vision = getattr(recipe.modules, name), recipe.model.vision
    if name != "vision":
        return [_Factors(module, vision.num_layers)]
    rated = [(dataclasses.replace(module, lr_multiplier=module.lr_multiplier * one.rate), one) for one in vision.towers]
    return [_Factors(own, one.layers, one.prefix) for own, one in rated]


def _overrides(recipe: Recipe) -> dict[ParamKey, ParamGroupOverride]:
    """Return Megatron-Core's parameter groups: no decay on biases and norms, and one group per LR factor."""
    opt = recipe.optimizer
    no_decay = ParamWithNamePredicate("no_decay", lambda param, name: param.dim() == 1 or name.endswith(".bias"))
    overrides = {ParamKey(with_name_predicate=no_decay): ParamGroupOverride(wd_mult=0.0)}
    for module_name in MODULES:
        factors = _factors(recipe, module_name)
        for factor in {factor for part in factors for factor in part.all} - {1.0}:

            def matches(
                _: Any,
                name: str,
                wanted: str = module_name,
                factor: float = factor,
                parts: Sequence[_Factors] = factors,
            ) -> bool:
                owner, rest = _module_of(name)
                return owner == wanted and any(part.of(rest) == factor for part in parts)

            key = ParamKey(with_name_predicate=ParamWithNamePredicate(f"{module_name}x{factor}", matches))
            overrides[key] = ParamGroupOverride(max_lr=opt.lr * factor, min_lr=opt.min_lr * factor)
    return overrides


def build_optimizer(
    recipe: Recipe, chunks: Sequence[MegatronModule], vision: MegatronModule | None = None
) -> MegatronOptimizer:
    """Build Megatron-Core's (distributed) AdamW over the trainable parameters of the wrapped ``chunks``.

    Args:
        recipe: the run.
        chunks: of the pipeline.
        vision: tower and connector, where every rank of the job holds them whole.
    """
    opt = recipe.optimizer
    config = OptimizerConfig(
        optimizer="adam",
        lr=opt.lr,
        min_lr=opt.min_lr,
        weight_decay=opt.weight_decay,
        adam_beta1=opt.adam_beta1,
        adam_beta2=opt.adam_beta2,
        adam_eps=opt.adam_eps,
        clip_grad=opt.clip_grad,
        bf16=recipe.training.precision == "bf16",
        use_distributed_optimizer=recipe.parallel.use_distributed_optimizer,
        overlap_param_gather=recipe.parallel.overlap_param_gather,
        fp8_recipe=recipe.engine.fp8_recipe if recipe.engine.fp8 is not None else None,
    )
    overrides = _overrides(recipe)
    if vision is None:
        return _without_stubs(get_megatron_optimizer(config, list(chunks), config_overrides=overrides))
    with groups_of_all([*chunks, vision]):
        pipeline = get_megatron_optimizer(config, list(chunks), config_overrides=overrides)
        apart = get_megatron_optimizer(
            config,
            [vision],
            config_overrides=overrides,
            use_gloo_process_groups=False,
            pg_collection=groups(recipe.parallel),
        )
    return JoinedOptimizer([*pipeline.chained_optimizers, *apart.chained_optimizers])


def _without_stubs(optimizer: MegatronOptimizer) -> MegatronOptimizer:
    """Return what Megatron-Core made, without the optimizer that stands for parameters that no rank has.

    With expert parallelism there is one for experts and one for the rest. Where experts alone are trainable, the other
    has no torch optimizer behind it, which Megatron-Core's state of several asks for. All ranks know the groups of all:
    none has it or all have it. What is left is one optimizer, in a checkpoint too: like that of one process.
    """
    chained = getattr(optimizer, "chained_optimizers", [])
    real = [one for one in chained if not getattr(one, "is_stub_optimizer", False)]
    if real and len(real) < len(chained):
        optimizer.chained_optimizers = real
        for group in optimizer.param_groups:  # by which a saved one is found
            group["is_expert_parallel"] = False
    return optimizer


def build_scheduler(recipe: Recipe, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Build Megatron-Core's schedule; its steps are optimizer steps."""
    opt = recipe.optimizer
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=opt.lr,
        min_lr=opt.min_lr,
        lr_warmup_steps=opt.warmup_steps,
        lr_decay_steps=recipe.training.steps,
        lr_decay_style=opt.schedule,
        start_wd=opt.weight_decay,
        end_wd=opt.weight_decay,
        wd_incr_steps=recipe.training.steps,
        wd_incr_style="constant",
        wsd_decay_steps=opt.wsd_decay_steps,
        lr_wsd_decay_style="cosine",
        # The recipe of this run rules, not what a checkpoint was made with.
        override_opt_param_scheduler=True,
        use_checkpoint_opt_param_scheduler=False,
    )


@contextlib.contextmanager
def recipe_settings_kept(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Keep the recipe's rates, decay and betas of each group while a checkpoint's optimizer state is loaded.

    Megatron-Core restores them from the checkpoint, and a changed recipe would have no effect without a word.
    """
    kept = [{key: group[key] for key in _GROUP_SETTINGS if key in group} for group in optimizer.param_groups]
    with groups_known_by_kind():
        yield
    groups = optimizer.param_groups
    assert len(groups) == len(kept), f"{len(groups)} parameter groups after loading, {len(kept)} before"
    for group, settings in zip(groups, kept, strict=True):
        group.update(settings)


def learning_rates(recipe: Recipe, optimizer: MegatronOptimizer) -> dict[str, float]:
    """Return the current learning rate of each trained module (of its top layer, with layer-wise decay)."""
    base = next((group["lr"] / group["max_lr"] for group in optimizer.param_groups if group["max_lr"]), 0.0)
    rates = {}
    for name in MODULES:
        module = getattr(recipe.modules, name)
        if not module.freeze:
            rates[name] = base * recipe.optimizer.lr * module.lr_multiplier
    return rates
