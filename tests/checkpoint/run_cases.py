"""Short trainings on several ranks that save and load; started with ``ranks.run``."""

from __future__ import annotations

import filecmp
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state as mpu
from numpy.typing import NDArray
from tiny import IMAGE_TOKEN, TOKENS_PER_IMAGE, random_packs, tiny_recipe

from megavlm.checkpoint.distributed import load as load_checkpoint
from megavlm.checkpoint.distributed import save_weights
from megavlm.checkpoint.safe import read_metadata
from megavlm.checkpoint.saver import Saver, State
from megavlm.checkpoint.slots import Slot
from megavlm.checkpoint.stream import CheckpointReader
from megavlm.config.help import to_yaml
from megavlm.config.schema import ModelConfig
from megavlm.data.batch import Pack
from megavlm.data.device_batch import Batch, make_batch
from megavlm.data.media import Arrangement
from megavlm.data.spans import spans_of
from megavlm.parallel.device import local_device
from megavlm.parallel.state import is_first_stage, process_groups
from megavlm.training.build import build_training
from megavlm.training.optimizer import recipe_settings_kept
from megavlm.training.step import train_step

Job = tuple[dict[str, Any], str, str | None, tuple[int, ...]]
"""Branches of the recipe, where checkpoints go, which one to go on from, after which steps to save."""


def jobs(todo: list[Job]) -> list[list[float]]:
    """Do one :func:`train` after the other; return the losses of each."""
    return [train(*job) for job in todo]


def train(recipe: dict[str, Any], root: str, load: str | None = None, save_at: tuple[int, ...] = (2, 3)) -> list[float]:
    """Train from the start or from a checkpoint, and save after each of the steps ``save_at``; return the losses.

    A checkpoint ``load`` is of the step that its name says; of step 0 weights alone are saved.
    """
    tree = tiny_recipe(**recipe)
    losses = []
    with process_groups(tree.parallel, 1):
        training = build_training(tree, IMAGE_TOKEN)
        base = Path(tree.checkpoint.load) if tree.checkpoint.load else None
        step = 0
        if load is not None:
            step = int(Path(load).name.removeprefix("step-"))
            with recipe_settings_kept(training.optimizer):
                load_checkpoint(
                    Path(load), modules=training.modules, optimizer=training.optimizer, scheduler=training.scheduler,
                    base=base,
                )  # fmt: skip
        elif base is not None:
            load_checkpoint(base, modules=training.modules)
            training.optimizer.reload_model_params()
        if save_at == (0,):
            save_weights(Path(root), training.modules, recipe_yaml=to_yaml(tree))
            return []
        saver = Saver(Path(root), keep=9)
        rank, size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
        for wanted in save_at:
            while step < wanted:
                step += 1
                mine = random_packs(tree.training.global_batch_size, seed=step)[rank::size]
                batches = [_batch(tree.model, pack, pixels) for pack, pixels in mine]
                training.scheduler.step(1)
                losses.append(train_step(training.chunks, training.optimizer, batches, num_sources=1).loss)
            with training.settled():
                state = State(training.modules, training.optimizer, training.scheduler, run={"step": step})
                state.recipe_yaml, state.base = to_yaml(tree), base if tree.lora.rank is not None else None
                saver.save(state)
    return losses


def _batch(model: ModelConfig, pack: Pack, pixels: NDArray[np.uint8]) -> Batch:
    """Put a pack on this rank; for a tower of pictures of any size, or for two, with pixels of the same numbers."""
    arrangement = four_of(model, len(pixels))
    spans = spans_of(model, IMAGE_TOKEN)
    if spans is not None:
        pieces = np.split(pack.tokens, pack.cu_seqlens[1:-1])
        pack = replace(pack, two_way_spans=spans.pack(pieces, [0] * len(pieces)))
    if model.vision.packed:
        vision, count, side = model.vision, len(pixels), 2 * model.vision.spatial_merge_size  # four tokens each
        row = 3 * vision.temporal_patch_size * vision.patch_size**2
        pixels = np.resize(pixels, (count * side**2, row)) if count else np.zeros((0, row), np.uint8)
        grid = np.tile(np.array([[1, side, side]], np.int64), (count, 1))
        arrangement = Arrangement(features=4 * count, index=None, grid=grid)
    elif pixels.shape[1:] != model.vision.pixel_shape:  # several squares of each picture
        shape = (len(pixels), *model.vision.pixel_shape)
        pixels = np.resize(pixels, shape) if len(pixels) else np.zeros(shape, np.uint8)
    shown = torch.from_numpy(pixels) if is_first_stage() else None
    return make_batch(pack, shown, local_device(), arrangement)


def four_of(model: ModelConfig, count: int) -> Arrangement | None:
    """Return four tokens of each of ``count`` pictures, the first and the last of them, where there are others."""
    tokens = model.tokens_per_view
    if model.vision.packed or tokens == TOKENS_PER_IMAGE or not count:
        return None
    index = np.arange(count)[:, None] * tokens + np.array([0, 1, tokens - 2, tokens - 1])
    return Arrangement(tokens * count, index.reshape(-1, 1))


def alike(checkpoint: Path, other: Path, vocabulary: int) -> bool:
    """Whether two checkpoints of one layout hold the same; where their files are the same, these are not read.

    The index is read: to what it says of places and shapes pickle may refer in another way.
    """
    names = [path.name for path in sorted(other.glob("*.distcp"))]
    index, others = read_metadata(checkpoint), read_metadata(other)
    said = [(one.state_dict_metadata, one.storage_data, one.planner_data) for one in (index, others)]
    if said[0] == said[1] and filecmp.cmpfiles(checkpoint, other, names, shallow=False)[0] == names:
        return True
    return tensors(checkpoint, vocabulary) == tensors(other, vocabulary)


def numbers(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint, in fp32."""
    reader = CheckpointReader(checkpoint)
    return {key: reader.read(Slot(key, tuple(entry.size))).float() for key, entry in reader.tensors().items()}


def tensors(checkpoint: Path, vocabulary: int) -> dict[str, str]:
    """Return a digest of every tensor, without the rows that pad a vocabulary; masters by one name."""
    reader, found = CheckpointReader(checkpoint), {}
    for key, entry in reader.tensors().items():
        whole = reader.read(Slot(key, tuple(entry.size)))
        if "word_embeddings" in key or "output_layer" in key:
            whole = whole[:vocabulary]
        numbers = whole.flatten().contiguous().view(torch.uint8).numpy().tobytes()
        found[key.replace(".fp32_param.", ".param.")] = sha256(numbers).hexdigest()
    return found
