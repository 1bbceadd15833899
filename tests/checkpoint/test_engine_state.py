"""What a checkpoint keeps of layers that compute in FP8: their weights, and nothing that would have to be unpickled."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from tiny import IMAGE_TOKEN, random_packs, tiny_recipe
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from megavlm.checkpoint.distributed import load
from megavlm.checkpoint.safe import read_metadata
from megavlm.checkpoint.saver import Saver, State
from megavlm.config.schema import ParallelConfig
from megavlm.data.device_batch import make_batch
from megavlm.parallel.state import process_groups
from megavlm.training.build import TrainingModel, build_training
from megavlm.training.step import train_step


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    with process_groups(ParallelConfig(), seed=1):
        yield


def build(**engine: Any) -> TrainingModel:
    """Build for training; on a machine without Transformer Engine, keys of FP8 are set and compute in bf16."""
    return build_training(tiny_recipe(training={"precision": "bf16"}, engine=engine), IMAGE_TOKEN)


def saved(training: TrainingModel, root: Path) -> Path:
    """Take a step, which gives the optimizer a state, and save."""
    packs = [make_batch(pack, torch.from_numpy(pixels), torch.device("cpu")) for pack, pixels in random_packs(1)]
    training.scheduler.step(1)
    train_step(training.chunks, training.optimizer, packs, num_sources=1)
    path = Saver(root, keep=1).save(State(training.modules, training.optimizer, training.scheduler, run={"step": 1}))
    assert path is not None
    return path


def test_nothing_but_tensors_is_saved_of_the_model(tmp_path: Path) -> None:
    training = build()
    (module,) = training.modules
    metadata = {"dp_cp_group": torch.distributed.group.WORLD}
    offered = module.sharded_state_dict(metadata=metadata).values()
    assert any(isinstance(entry, ShardedObject) for entry in offered), "the layers have no extra state to leave out"
    entries = read_metadata(saved(training, tmp_path)).state_dict_metadata
    objects = [key for key, entry in entries.items() if isinstance(entry, BytesStorageMetadata)]
    assert not [key for key in objects if key.startswith(("language", "vision", "connector"))], objects
    assert any(key.startswith("language.decoder.layers") for key in entries)


@pytest.mark.parametrize(("scaling", "said"), [("delayed", 1), ("tensorwise", 0)])
def test_a_resume_says_that_the_history_of_scales_starts_anew(
    scaling: str, said: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = saved(build(fp8="hybrid", fp8_recipe=scaling), tmp_path)
    training = build(fp8="hybrid", fp8_recipe=scaling)
    with caplog.at_level(logging.INFO, logger="megavlm"):
        load(path, modules=training.modules, optimizer=training.optimizer, scheduler=training.scheduler)
    assert caplog.text.count("history starts anew") == said


def test_masters_come_from_the_checkpoint_and_not_from_rounded_weights(tmp_path: Path) -> None:
    path = saved(build(), tmp_path)
    training = build()
    # Here they are the weights' own memory; of FP8 weights they are not.
    weights = {"model": {k: v.clone() for k, v in load(path, modules=training.modules)["model"].items()}}
    with torch.no_grad():  # what rounding to FP8 does to a weight, and more
        for parameter in training.modules[0].parameters():
            parameter.zero_()
    training.optimizer.reload_model_params(state_dict=weights)
    (optimizer,) = training.optimizer.chained_optimizers
    masters = [shard for group in optimizer.shard_fp32_from_float16_groups for shard in group]
    total = sum(float(shard.double().square().sum()) for shard in masters)
    trained = {name for name, p in training.modules[0].named_parameters() if p.requires_grad}
    expected = sum(float(w.double().square().sum()) for name, w in weights["model"].items() if name in trained)
    assert total == pytest.approx(expected, rel=1e-6)


def test_keys_reach_the_gradient_buffers_and_the_optimizer() -> None:
    training = build(fp8="hybrid", fp8_recipe="blockwise", fp8_param_gather=True)
    assert training.chunks[0].ddp_config.fp8_param_gather
    assert training.modules[0].config.fp8_param
    (optimizer,) = training.optimizer.chained_optimizers
    assert optimizer.config.fp8_recipe == "blockwise"
    assert dataclasses.asdict(build().chunks[0].ddp_config)["fp8_param_gather"] is False
