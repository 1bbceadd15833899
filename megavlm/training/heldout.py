"""Held-out packs: read once, kept by the reader ranks, and run forward at every validation."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu

from megavlm.config.checks import source_name
from megavlm.config.schema import Recipe
from megavlm.data.batch import Pack, make_pack
from megavlm.data.codes import PictureTokens
from megavlm.data.decode import ImageDecoder
from megavlm.data.device_batch import Spread, share_packs
from megavlm.data.media import ImagePlan, plan_of
from megavlm.data.positions import positions_of
from megavlm.data.read_pack import ReadPack, decode_pack, no_pixels
from megavlm.data.reader import PackReader
from megavlm.data.spans import spans_of
from megavlm.data.tokenizer import Tokenizer
from megavlm.parallel import pipeline
from megavlm.parallel.device import local_device
from megavlm.parallel.state import agreed, is_reader
from megavlm.training.step import run_batches
from megavlm.training.vision import VisionPhases

logger = logging.getLogger(__name__)


@dataclass
class HeldOut:
    """The packs of one held-out data set."""

    name: str
    packs: list[ReadPack] | None
    """On the reader rank, this replica's share; None on the others."""
    count: int
    """Packs of each replica, the same on all ranks."""


def read_held_out(
    recipe: Recipe, tokenizer: Tokenizer, decoder: ImageDecoder | None, codes: PictureTokens | None = None
) -> list[HeldOut]:
    """Read the first ``validation_packs`` packs of each held-out data set; a collective over the job.

    Replicas that have fewer than others fill up with empty packs, so that all take part equally often.

    Args:
        recipe: the run.
        tokenizer: its tokenizer.
        decoder: on reader ranks, for the images.
        codes: how codes of pictures are read, where pictures are tokens.
    """
    size = mpu.get_data_parallel_world_size()
    wanted = -(-recipe.training.validation_packs // size)
    held_out, plan, positions = [], plan_of(recipe.model), positions_of(recipe.model, tokenizer.imgpad_id)
    spans = spans_of(recipe.model, tokenizer.imgpad_id)
    for source in recipe.data.validation:
        name = source_name(source)
        packs: list[ReadPack] | None = None
        with agreed(f"reading data.validation {name}"):
            if is_reader():
                assert decoder is not None
                reader = PackReader(
                    [source],
                    recipe.data,
                    tokenizer,
                    plan,
                    positions,
                    spans=spans,
                    codes=codes,
                    rank=mpu.get_data_parallel_rank(),
                    world_size=size,
                    seed=recipe.training.seed,
                    training=False,
                )
                packs = [_decode(pack, decoder, plan, tokenizer) for pack in islice(reader, wanted)]
        most = torch.tensor([0 if packs is None else len(packs)], device=local_device())
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        count = max(int(most), 1)
        if packs is not None:
            empty = make_pack(
                [], recipe.data.sequence_length, pad_token=tokenizer.eos_id, positions=positions, spans=spans
            )
            filler = ReadPack(empty, no_pixels(plan))
            packs += [filler] * (count - len(packs))
        held_out.append(HeldOut(name, packs, count))
    return held_out


def _decode(pack: Pack, decoder: ImageDecoder, plan: ImagePlan, tokenizer: Tokenizer) -> ReadPack:
    read = decode_pack(pack, decoder, plan, tokenizer.imgpad_id)
    for sample in (*pack.skipped, *read.masked):
        logger.warning("held-out sample left out: %s/%s: %s", sample.dataset, sample.key, sample.cause)
    return ReadPack(read.pack, read.pixels.cpu(), read.arrangement)


def validate(
    chunks: Sequence[Any],
    held_out: Sequence[HeldOut],
    vision: VisionPhases | None = None,
    spread: Spread | None = None,
) -> dict[str, float]:
    """Return the loss per supervised token of each data set, and ``validation_loss`` over all; a collective.

    A data set in which no token has a label has no loss, and is left out.

    Args:
        chunks: this rank's.
        held_out: the data sets.
        vision: who encodes, where all ranks do; with ``spread``.
        spread: who encodes which picture.
    """
    sums = torch.zeros(2, dtype=torch.float64)
    losses = {}
    with pipeline.evaluating(chunks):
        for data in held_out:
            batches = share_packs(data.packs, data.count, spread)
            result = run_batches(chunks, batches, num_sources=1, forward_only=True, vision=vision)[0]
            sums += result
            if result[1] > 0:
                losses[f"validation_loss/{data.name}"] = float(result[0] / result[1])
            else:
                logger.warning("data.validation %s: no token has a label, so it has no loss", data.name)
    return {"validation_loss": float(sums[0] / sums[1]), **losses} if sums[1] > 0 else {}
