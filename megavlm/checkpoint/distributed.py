"""Loading a training run from Megatron-Core's distributed checkpoints, and saving one at once.

A checkpoint is a directory ``step-00000123`` with Megatron-Core's tensors, the recipe that made it
(``recipe.yaml``), ``run.json`` (step, counters, version), one ``reader-N.json`` per data-parallel rank, one
``random-N.json`` per rank, and ``manifest.json`` with the digest of every file (:mod:`megavlm.checkpoint.saver`).
What has the final name is whole.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException

from megavlm.architectures.adapters import has_adapters, is_adapter
from megavlm.checkpoint import optimizer_state
from megavlm.checkpoint.adapters import load_quantised, select
from megavlm.checkpoint.base import base_of, holds_adapters
from megavlm.checkpoint.damage import check_shapes, check_state
from megavlm.checkpoint.placement import parts
from megavlm.checkpoint.safe import check_files, check_tensors, read_metadata
from megavlm.checkpoint.saver import Saver, State
from megavlm.checkpoint.slots import model_state
from megavlm.config.errors import UserError
from megavlm.parallel.megatron_versions import open_files_plainly
from megavlm.weights.pickles import first_line

logger = logging.getLogger(__name__)

_EXTRA_STATE = "_extra_state"
_ONLY_ADAPTERS = (
    "holds adapters alone, and the recipe has none; set its lora branch as there, or write whole weights with "
    "megavlm convert merge"
)


def save_weights(root: Path, modules: Sequence[Any], step: int = 0, recipe_yaml: str = "") -> Path:
    """Save and publish weights alone; a collective over all ranks.

    Args:
        root: directory of the run's checkpoints.
        modules: the bare model chunks of this rank.
        step: which step they are of.
        recipe_yaml: the resolved recipe.

    Returns:
        The published directory.
    """
    path = Saver(root, keep=1).save(State(modules, run={"step": step}, recipe_yaml=recipe_yaml))
    assert path is not None
    return path


def load(
    path: Path, *, modules: Sequence[Any], optimizer: Any = None, scheduler: Any = None, base: str | Path | None = None,
    fresh: Collection[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Load a checkpoint at this run's layout, whatever layout it was saved at; a collective over all ranks.

    A model with adapters takes its frozen weights from the checkpoint's base, or from ``path`` itself if that is a
    whole one; the adapters then stay as they are.

    Args:
        path: a published checkpoint.
        modules: the bare model chunks of this rank, filled in place.
        optimizer: also load its state; None loads weights alone.
        scheduler: also load its state.
        base: where the base of adapters may lie if it has been moved (a recipe's ``checkpoint.load``).
        fresh: parameters that the checkpoint has not, which stay as they are; of weights alone, without adapters.

    Returns:
        The weights as they are stored, per chunk: what FP8 weights round.

    Raises:
        UserError: the checkpoint is of another model, a file is damaged, or is a pickle that would run code.
    """
    adapted, adapters_alone = any(map(has_adapters, modules)), holds_adapters(path)
    if adapters_alone and not adapted:
        raise UserError(f"{path}: {_ONLY_ADAPTERS}")
    if adapted:
        whole = base_of(path, base) if adapters_alone else path
        _load_tensors(whole, modules, select(model_state(modules), lambda name, _: not is_adapter(name)))
        for module in modules:
            load_quantised(whole, module)
        if not adapters_alone:
            logger.info("loaded %s, beside new adapters", path)
            return {}
        stored = read_metadata(path).state_dict_metadata
        state = select(model_state(modules), lambda name, entry: is_adapter(name) or entry.key in stored)
    else:
        state = select(model_state(modules), lambda name, _: name not in fresh)
    names = list(state)
    if optimizer is not None:
        _said_by_all(lambda: check_state(path, dist.get_rank(), dist.get_world_size()))
        stored = read_metadata(path).state_dict_metadata
        own = optimizer_state.describe(optimizer, state, loading=True)
        state["optimizer"] = optimizer_state.ask(own, optimizer, stored)
    loaded = _load_tensors(path, modules, state)
    if optimizer is not None:
        optimizer.load_state_dict(optimizer_state.answer(loaded["optimizer"], optimizer, stored))
    if scheduler is not None:
        scheduler.load_state_dict(loaded["scheduler"])
    logger.info("loaded %s", path)
    if optimizer is not None and any(_scales_are_history(module) for module in modules):
        logger.info("delayed FP8 scales are not in checkpoints: their history starts anew at scale 1")
    return {name: loaded[name] for name in names}


def _said_by_all(check: Callable[[], None]) -> None:
    """Make what some rank finds wrong with a checkpoint wrong on all of them; a collective.

    Raises:
        UserError: of the first rank that found something, on all ranks.
    """
    said: list[str | None] = [None] * dist.get_world_size()
    own = None
    try:
        check()
    except (UserError, OSError) as error:
        own = str(error)
    dist.all_gather_object(said, own)
    first = next((text for text in said if text is not None), None)
    if first is not None:
        raise UserError(first)


def _load_tensors(path: Path, modules: Sequence[Any], state: dict[str, Any]) -> dict[str, Any]:
    """Read what ``state`` describes and fill the modules with it; return all that was read.

    Raises:
        UserError: as :func:`load`.
    """
    metadata = read_metadata(path)
    check_files(path)
    wanted = [set(state["model" if len(modules) == 1 else f"model{i}"]) for i in range(len(modules))]
    entries = list(nested_values(state))
    assert not any(isinstance(entry, ShardedObject) for entry in entries)
    check_tensors(path, metadata, {entry.key for entry in entries if hasattr(entry, "key")})
    tensors = [entry for entry in entries if isinstance(entry, ShardedTensor | ShardedTensorFactory)]
    asked = ((part, getattr(one, "allow_shape_mismatch", False)) for one in tensors for part in parts(one))
    _said_by_all(lambda: check_shapes(path, metadata, asked))
    open_files_plainly()
    try:
        loaded: dict[str, Any] = dist_checkpointing.load(state, str(path), strict=StrictHandling.RAISE_UNEXPECTED)
    except CheckpointingException as error:
        raise UserError(f"{path}: is of another model: {first_line(error)}") from error
    except CheckpointException as error:  # of torch: something failed on some rank
        causes = sorted({first_line(cause) for cause, _ in error.failures.values()})
        raise UserError(f"{path}: is damaged, or of another model: {'; '.join(causes)}") from error
    for i, module in enumerate(modules):
        result = module.load_state_dict(loaded["model" if len(modules) == 1 else f"model{i}"], strict=False)
        missing = [key for key in result.missing_keys if key in wanted[i] and not key.endswith(_EXTRA_STATE)]
        assert not missing and not result.unexpected_keys, (missing, result.unexpected_keys)
    return loaded


def _scales_are_history(module: Any) -> bool:
    return module.config.fp8 is not None and module.config.fp8_recipe == "delayed"


def load_reader_state(path: Path, world_size: int) -> Any:
    """Return what this reader rank's feed goes on from.

    Args:
        path: a published checkpoint.
        world_size: data-parallel size of this run.

    Raises:
        UserError: the checkpoint was saved with another data-parallel size.
    """
    saved = len(list(path.glob("reader-*.json")))
    if saved != world_size:
        raise UserError(
            f"{path}: saved with data-parallel size {saved}, this run has {world_size}; the order of samples would "
            "change. Resume with the same data-parallel size, or start from the weights alone with checkpoint.load"
        )
    return json.loads((path / f"reader-{mpu.get_data_parallel_rank()}.json").read_text(encoding="utf-8"))
