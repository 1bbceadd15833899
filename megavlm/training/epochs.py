"""``training.epochs``: how many steps so many passes over ``data.train`` are.

An epoch is one pass over the data set that takes longest: with weight w and n samples it is n / w long, and while it is
passed once the others are passed as often as their weights say (once as well, where weights are as sizes). It is
counted in packs, through the code that trains: samples that cannot be used are left out, the others fill packs as the
packer fills them.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.energon import WorkerConfig
from megatron.energon.epathlib import EPath

from megavlm.checkpoint.manifest import replace_text
from megavlm.config.checks import check_recipe, source_name
from megavlm.config.schema import DataSource, Recipe
from megavlm.data.cache import located
from megavlm.data.codes import CARD, picture_tokens
from megavlm.data.energon_dataset import PackEncoder, RawSample
from megavlm.data.media import plan_of
from megavlm.data.packing import CarryOverPacker, PackableSample
from megavlm.data.reader import hash_data
from megavlm.data.shard_reader import DEFECT, ShardDataset, ShardReader
from megavlm.data.tokenizer import Tokenizer
from megavlm.parallel.device import local_device
from megavlm.parallel.state import agreed, any_rank, is_reader
from megavlm.planning.weighing import weigher_of

logger = logging.getLogger(__name__)

_SLICE_SECONDS = 5.0
_DONE = object()
RECORD = "epochs.json"
"""In ``output_dir``: what was counted, so that a restart does not count again."""


@dataclass(frozen=True)
class DataLength:
    """One data set."""

    samples: int
    """All of them."""
    packs: float
    """Packs that the usable ones fill."""


def with_steps(recipe: Recipe, tokenizer: Tokenizer) -> Recipe:
    """Return the recipe with ``train_steps`` in place of ``epochs``; a collective over the job.

    Args:
        recipe: of the run, checked.
        tokenizer: its tokenizer.

    Raises:
        RecipeError: the steps do not suit other keys, such as a warm-up that is longer.
        UserError: a data set is damaged.
    """
    epochs = recipe.training.epochs
    if epochs is None:
        return recipe
    path = Path(recipe.output_dir) / RECORD
    with agreed("counting the samples of data.train"):
        sources = [located(source, recipe.data) for source in recipe.data.train]
        key = hash_data(sources, recipe.data, tokenizer, plan_of(recipe.model), picture_tokens(recipe))
    known = _read(path, key, len(sources))
    lengths = known or _count(sources, recipe, tokenizer)
    if known is None:
        with agreed(f"writing {path}"):
            if dist.get_rank() == 0:
                record = {"data": key, "sets": [dataclasses.asdict(one) for one in lengths]}
                replace_text(path, json.dumps(record, indent=2) + "\n")
    steps, passes = steps_of(epochs, lengths, [one.weight for one in recipe.data.train], recipe)
    named = ", ".join(f"{source_name(s)} {n:.3g}" for s, n in zip(recipe.data.train, passes, strict=True))
    logger.info("training.epochs: %g is %d steps; passes over each data set: %s", epochs, steps, named)
    counted = dataclasses.replace(recipe.training, train_steps=steps, epochs=None)
    recipe = dataclasses.replace(recipe, training=counted)
    with agreed("checking the recipe with its steps"):
        check_recipe(recipe, dist.get_world_size())
    return recipe


def steps_of(epochs: float, lengths: list[DataLength], weights: list[float], recipe: Recipe) -> tuple[int, list[float]]:
    """Return the steps, and how often each data set is passed."""
    shares = [weight / sum(weights) for weight in weights]
    drawn = epochs * max(one.samples / share for one, share in zip(lengths, shares, strict=True))
    packs = sum(drawn * share * one.packs / one.samples for one, share in zip(lengths, shares, strict=True))
    passes = [drawn * share / one.samples for one, share in zip(lengths, shares, strict=True)]
    # A hair less: a whole number of steps must not become one more by rounding.
    return max(1, math.ceil(packs / recipe.training.global_batch_size - 1e-6)), passes


def _count(sources: Sequence[DataSource], recipe: Recipe, tokenizer: Tokenizer) -> list[DataLength]:
    """Count every data set, each reader a part of it; a collective."""
    plan, data = plan_of(recipe.model), recipe.data
    found = torch.zeros(len(sources), 2, dtype=torch.float64, device=local_device())
    if dist.get_rank() == 0:
        logger.info("training.epochs: counting data.train, once")
    rank, readers = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()

    def counting() -> Iterator[None]:
        names = [source_name(source) for source in sources]
        carded = [(Path(source.path) / CARD).is_file() for source in sources]
        codes = picture_tokens(recipe)
        encoder = PackEncoder(data, names, tokenizer, plan, weigh=weigher_of(recipe), codes=codes, carded=carded)
        for index, source in enumerate(sources):
            one = yield from _count_packs(Path(source.path), index, encoder, rank, readers)
            found[index, 0], found[index, 1] = one.samples, one.packs

    # In slices: ranks that wait in a collective for all of it would give up after distributed_timeout_minutes.
    slices, done = counting() if is_reader() else iter(()), False
    while any_rank(not done):
        with agreed("counting the samples of data.train"):
            done = next(slices, _DONE) is _DONE
    dist.all_reduce(found)
    return [DataLength(int(samples), packs) for samples, packs in found.tolist()]


def count_packs(path: Path, source: int, encoder: PackEncoder, rank: int = 0, readers: int = 1) -> DataLength:
    """Return the length of one reader's part of a data set.

    Args:
        path: of the data set.
        source: its number in the blend.
        encoder: tokenises and packs as in training.
        rank: of the reader; it takes every ``readers``-th sample.
        readers: how many there are.
    """
    counting = _count_packs(path, source, encoder, rank, readers)
    while True:
        try:
            next(counting)
        except StopIteration as end:
            found: DataLength = end.value
            return found


def _count_packs(
    path: Path, source: int, encoder: PackEncoder, rank: int, readers: int
) -> Generator[None, None, DataLength]:
    """Do what :func:`count_packs` does, and yield every few seconds."""
    config, data = WorkerConfig(rank=0, world_size=1, num_workers=0), encoder.data
    dataset = ShardDataset(EPath(path), split_part="train", training=False, worker_config=config, decoder=None)
    dataset.check_shards()
    reader = ShardReader(dataset.path, dataset.shards)
    balanced = data.packing == "carry_over" and data.balance_images
    packed = data.packing == "carry_over"
    packer = CarryOverPacker[PackableSample](
        data.sequence_length, data.packing_buffer_size if packed else 1, _views if balanced else None
    )
    samples, packs, tokens = 0, 0, 0
    since = time.monotonic()
    for position in range(rank, len(reader), readers):
        if time.monotonic() - since > _SLICE_SECONDS:
            yield
            since = time.monotonic()
        raw = reader[position]
        samples += 1
        files = {key: value for key, value in raw.items() if not key.startswith("__")}
        sample = RawSample(raw["__key__"], raw["__restore_key__"], files, source, raw["__shard__"], raw.get(DEFECT))
        usable = encoder.encode_sample(sample).sample
        if usable is None:
            continue
        # Of pictures, their number and size are asked for; their bytes would pile up in the pool.
        pack = packer.add(dataclasses.replace(usable, images=()))
        if pack:
            packs, tokens = packs + 1, tokens + sum(map(len, pack))
    # What waits fills packs as well as the others did: in training, more samples follow.
    fill = tokens / packs if packs else data.sequence_length
    return DataLength(samples, packs + sum(map(len, packer.pool)) / fill)


def _views(sample: PackableSample) -> int:
    return sample.views


def _read(path: Path, key: str, sets: int) -> list[DataLength] | None:
    """Return what was counted of the same data; None where nothing was, or by no rank alone: all read one file."""
    box: list[list[DataLength] | None] = [None]
    if dist.get_rank() == 0 and path.is_file():
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            lengths = [DataLength(int(one["samples"]), float(one["packs"])) for one in record["sets"]]
            box = [lengths if record["data"] == key and len(lengths) == sets else None]
        except (ValueError, KeyError, TypeError, OSError):
            box = [None]
    dist.broadcast_object_list(box, 0)
    return box[0]
