"""Saving and loading a training run with Megatron-Core's distributed checkpoints.

A checkpoint is a directory ``step-00000123`` with Megatron-Core's tensors, the recipe that made it
(``recipe.yaml``), ``run.json`` (step, counters, version) and one ``reader-N.json`` per data-parallel rank. It is
written as ``step-00000123.partial`` and renamed when all ranks are done; then the file ``latest`` is replaced.
What has the final name is whole.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException

from megavlm import __version__
from megavlm.checkpoint.hf import assets
from megavlm.checkpoint.paths import step_directory
from megavlm.checkpoint.safe import check_files, check_tensors, first_line, read_metadata
from megavlm.checkpoint.slots import METADATA
from megavlm.parallel.state import is_reader

logger = logging.getLogger(__name__)

_EXTRA_STATE = "_extra_state"


def _model_state(modules: Sequence[Any]) -> dict[str, Any]:
    """Return the sharded state of the bare chunks, named as Megatron-Core's optimizer expects."""
    metadata: dict[str, Any] = {**METADATA, "dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True)}
    if len(modules) == 1:
        return {"model": modules[0].sharded_state_dict(metadata=metadata)}
    return {f"model{i}": module.sharded_state_dict(metadata=metadata) for i, module in enumerate(modules)}


def save(
    root: Path,
    *,
    modules: Sequence[Any],
    optimizer: Any,
    scheduler: Any,
    reader_state: Any,
    run: dict[str, Any],
    recipe_yaml: str,
    keep: int,
    parent: Path | None = None,
    tokenizer: Path | None = None,
) -> Path:
    """Write and publish a checkpoint; a collective over all ranks.

    Args:
        root: directory of the run's checkpoints.
        modules: the bare model chunks of this rank.
        optimizer: Megatron-Core's optimizer; None saves weights alone.
        scheduler: Megatron-Core's scheduler, saved with the optimizer.
        reader_state: on reader ranks, the plain structure that the data feed goes on from.
        run: JSON-able facts of the run, with at least ``step``.
        recipe_yaml: the resolved recipe.
        keep: newest checkpoints to leave in ``root``.
        parent: checkpoint that the run started from, whose ``hf`` folder this one inherits.
        tokenizer: tokenizer file to keep there if there is no such folder.

    Returns:
        The published directory.
    """
    final = step_directory(root, run["step"])
    partial = final.with_suffix(".partial")
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    state = _model_state(modules)
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(state, metadata=METADATA)
        state["scheduler"] = scheduler.state_dict()
    dist_checkpointing.save(state, str(partial), content_metadata=METADATA)
    if is_reader():
        _write(partial / f"reader-{mpu.get_data_parallel_rank()}.json", json.dumps(reader_state))
    if dist.get_rank() == 0:
        assets.inherit(parent, tokenizer, partial)
        _write(partial / "recipe.yaml", recipe_yaml)
        _write(partial / "run.json", json.dumps({**run, "megavlm": __version__}, indent=2))
    dist.barrier()
    if dist.get_rank() == 0:
        _publish(partial, final, keep)
    dist.barrier()
    return final


def _publish(partial: Path, final: Path, keep: int) -> None:
    if final.exists():  # the same step again, after going on from an older checkpoint
        shutil.rmtree(final)
    partial.rename(final)
    pointer = final.parent / "latest.new"
    _write(pointer, final.name + "\n")
    pointer.replace(final.parent / "latest")
    published = sorted(p for p in final.parent.glob("step-*") if p.suffix != ".partial")
    for old in published[:-keep]:
        if old != final:
            shutil.rmtree(old)


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def load(path: Path, *, modules: Sequence[Any], optimizer: Any = None, scheduler: Any = None) -> None:
    """Load a checkpoint at this run's layout, whatever layout it was saved at; a collective over all ranks.

    Args:
        path: a published checkpoint.
        modules: the bare model chunks of this rank, filled in place.
        optimizer: also load its state; None loads weights alone.
        scheduler: also load its state.

    Raises:
        ValueError: the checkpoint is of another model, a file is damaged, or is a pickle that would run code.
    """
    metadata = read_metadata(path)
    check_files(path)
    state = {name: _tensors(entries) for name, entries in _model_state(modules).items()}
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=True, metadata=METADATA)
    entries = list(nested_values(state))
    assert not any(isinstance(entry, ShardedObject) for entry in entries)
    check_tensors(path, metadata, {entry.key for entry in entries if hasattr(entry, "key")})
    try:
        loaded = dist_checkpointing.load(state, str(path), strict=StrictHandling.RAISE_UNEXPECTED)
    except CheckpointingException as error:
        raise ValueError(f"{path}: is of another model: {first_line(error)}") from error
    except CheckpointException as error:  # of torch: something failed on some rank
        causes = sorted({first_line(cause) for cause, _ in error.failures.values()})
        raise ValueError(f"{path}: is damaged, or of another model: {'; '.join(causes)}") from error
    for i, module in enumerate(modules):
        result = module.load_state_dict(loaded["model" if len(modules) == 1 else f"model{i}"], strict=False)
        missing = [key for key in result.missing_keys if not key.endswith(_EXTRA_STATE)]
        assert not missing and not result.unexpected_keys, (missing, result.unexpected_keys)
    if optimizer is not None:
        optimizer.load_state_dict(loaded["optimizer"])
    if scheduler is not None:
        scheduler.load_state_dict(loaded["scheduler"])
    logger.info("loaded %s", path)


def _tensors(state: dict[str, Any]) -> dict[str, Any]:
    """Leave out what is no tensor: extra state of layers, such as Transformer Engine's scales for FP8.

    It is stored as pickles, which would be run; a converted checkpoint has none, and a layer without it starts as a
    new one does.
    """
    return {name: entry for name, entry in state.items() if not isinstance(entry, ShardedObject)}


def load_reader_state(path: Path, world_size: int) -> Any:
    """Return what this reader rank's feed goes on from.

    Args:
        path: a published checkpoint.
        world_size: data-parallel size of this run.

    Raises:
        ValueError: the checkpoint was saved with another data-parallel size.
    """
    saved = len(list(path.glob("reader-*.json")))
    if saved != world_size:
        raise ValueError(
            f"{path}: saved with data-parallel size {saved}, this run has {world_size}; the order of samples would "
            "change. Resume with the same data-parallel size, or start from the weights alone with checkpoint.load"
        )
    return json.loads((path / f"reader-{mpu.get_data_parallel_rank()}.json").read_text(encoding="utf-8"))
