"""Checkpoints of runs with adapters: they hold what learns, and name what holds the rest (:mod:`.base`)."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megavlm.architectures.adapters import frozen_linears
from megavlm.checkpoint.base import holds_adapters
from megavlm.checkpoint.paths import read_tree
from megavlm.checkpoint.slots import Slot
from megavlm.checkpoint.stream import CheckpointReader
from megavlm.config.errors import RecipeError
from megavlm.config.help import to_tree
from megavlm.config.lora import OF_IMAGES
from megavlm.config.schema import Recipe
from megavlm.layers.lora import FrozenColumnParallelLinear
from megavlm.layers.nf4 import quantise


def select(state: dict[str, Any], chosen: Callable[[str, Any], bool]) -> dict[str, Any]:
    """Return the entries of :func:`megavlm.checkpoint.slots.model_state` that are ``chosen``, by name and entry."""
    return {
        chunk: {name: entry for name, entry in entries.items() if chosen(name, entry)}
        for chunk, entries in state.items()
    }


def load_quantised(checkpoint: Path, module: Any) -> None:
    """Read the weights that ``lora.quantize`` keeps in 4 bits, one after the other, and quantise them.

    Args:
        checkpoint: the base.
        module: a bare chunk of the model.

    Raises:
        UserError: the checkpoint lacks one, or has it in another shape.
    """
    wanted = [entry for entry in frozen_linears(module.language) if entry[2].quantize]
    if not wanted:
        return
    reader = CheckpointReader(checkpoint)
    device = next(module.language.parameters()).device
    for number, name, linear in wanted:
        rank, size = linear.tp_group.rank(), linear.tp_group.size()
        shape = (linear.output_size, linear.input_size)
        column = isinstance(linear, FrozenColumnParallelLinear)
        # Gate and up are cut each for itself.
        parts = 2 if name.removesuffix(OF_IMAGES).endswith("fc1") and module.config.gated_linear_unit else 1
        part = shape[0 if column else 1] // parts
        share = part // size
        pieces = [(i * part + rank * share, i * part + (rank + 1) * share) for i in range(parts)]
        if size == 1:
            pieces = [(0, part * parts)]
        weight = reader.read(_slot(module.config, number, name, shape)).to(
            device=device, dtype=linear.config.params_dtype
        )
        with torch.no_grad():
            linear.nf4 = quantise(weight, pieces, transposed=not column)


def _slot(config: Any, number: int, name: str, shape: tuple[int, int]) -> Slot:
    """Return where the weight of a linear layer lies, whose name has an expert's number in the whole model.

    Layers of several kinds are not stacked.
    """
    alike = not config.hetereogenous_dist_checkpoint and config.moe_layer_freq == 1
    layer, layers = (number, config.num_layers) if alike else (None, 0)
    key = name if alike else f"{number}.{name}"
    expert = re.search(r"\.local_experts\.(\d+)\.", name)
    own, experts = (None, 0) if expert is None else (int(expert[1]), config.num_moe_experts)
    key = key if expert is None else key.replace(expert[0], ".experts.")
    return Slot(f"language.decoder.layers.{key}.weight", shape, layer, layers, expert=own, experts=experts)


def check_same_adapters(path: Path, recipe: Recipe, *, resuming: bool) -> None:
    """Refuse a checkpoint whose adapters are others than the recipe's.

    Args:
        path: the checkpoint.
        recipe: of the run that loads it.
        resuming: the run goes on from it; else its weights alone are taken, and new adapters may stand beside them.

    Raises:
        RecipeError: naming the key.
    """
    key = "output_dir" if resuming else "checkpoint.load"
    if not holds_adapters(path):
        if resuming and recipe.lora.rank is not None:
            raise RecipeError(
                f"lora.rank: {recipe.lora.rank}, but {path} is of a run without adapters; choose another output_dir, "
                "and name that run's in checkpoint.load"
            )
        return
    saved = read_tree(path).get("lora") or {}
    if recipe.lora.rank is None:
        raise RecipeError(
            f"lora.rank: null, but {path} holds adapters of rank {saved.get('rank')} alone; set the lora branch as "
            f"there, or write whole weights with megavlm convert merge and name these"
        )
    wanted = to_tree(recipe)["lora"]
    for name in ("rank", "alpha", "targets", "train_embeddings", "train_head", "train_norms", "quantize"):
        there = saved.get(name)
        if name == "targets":
            there, wanted[name] = sorted(there or []), sorted(wanted[name])
        if there != wanted[name]:
            raise RecipeError(
                f"lora.{name}: {wanted[name]!r}, but {path} has {there!r}; set it to that, or choose another {key}"
            )
