"""Synthetic images, records and prepared data sets for the tests of the data path."""

from __future__ import annotations

import argparse
import io
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from megavlm.commands.prepare import add_arguments, run
from megavlm.config.schema import DataConfig, DataSource
from megavlm.data.batch import Pack
from megavlm.data.media import ImagePlan
from megavlm.data.plans_single import SquashPlan
from megavlm.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from megavlm.data.reader import PackReader

TOKENS_PER_IMAGE = 6

WORDS = [
    "red",
    "green",
    "blue",
    "circle",
    "square",
    "triangle",
    "large",
    "small",
    "left",
    "right",
    "above",
    "below",
    "how",
    "many",
    "shapes",
]


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words)) + "."


def smooth_image(seed: int, width: int, height: int) -> Image.Image:
    """An RGB image with gradients and a rectangle, as photographs are smooth in most places."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    planes = [128 + 100 * np.sin(x * rng.uniform(0.005, 0.05) + y * rng.uniform(0.005, 0.05) + c) for c in range(3)]
    pixels = np.stack(planes, -1)
    pixels[height // 4 : height // 2, width // 4 : width // 2] = rng.integers(0, 255, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encode_image(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def make_records(directory: Path, count: int, seed: int = 0, text_only: float = 0.2) -> list[dict]:
    """Write small JPEGs and records of varied length; some have two images, some none."""
    rng = random.Random(seed)
    directory.mkdir(parents=True, exist_ok=True)
    records = []
    for i in range(count):
        draw = rng.random()
        number = 0 if draw < text_only else 2 if draw > 0.9 else 1
        prompt = ""
        for j in range(number):
            name = f"{i}-{j}.jpg"
            image = Image.new("RGB", (24 + i % 7, 20 + j), (rng.randrange(256), i % 256, 0))
            (directory / name).write_bytes(encode_image(image))
            prompt += f"Picture {j + 1}: <img>{name}</img>\n"
        turns = []
        for _ in range(rng.choice([1, 1, 2])):
            turns += [
                {"from": "user", "value": prompt + sentence(rng, rng.randrange(1, 12))},
                {"from": "assistant", "value": sentence(rng, rng.randrange(1, 25))},
            ]
            prompt = ""
        records.append({"id": f"r{i}", "conversations": turns})
    return records


def prepare(
    directory: Path, records: list, *, name: str, images: Path, samples_per_shard: int = 40, **options: object
) -> Path:
    """Run ``megavlm prepare`` on records and return the data set's directory."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    source = directory / f"{name}.json"
    source.write_text(json.dumps(records))
    out = directory / name
    words = [str(source), "--images", str(images), "--out", str(out), "--samples-per-shard", str(samples_per_shard)]
    args = parser.parse_args(words)
    for key, value in options.items():
        setattr(args, key, value)
    assert run(args) == 0
    return out


def open_reader(
    datasets: Sequence[Path | DataSource],
    tokenizer: Tokenizer,
    *,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 1,
    training: bool = True,
    plan: ImagePlan | None = None,
    **options: object,
) -> PackReader:
    """Open a reader of prepared data sets; ``options`` are keys of the recipe's data branch."""
    from megavlm.data.reader import PackReader

    sources = [data if isinstance(data, DataSource) else DataSource(path=str(data)) for data in datasets]
    keys = {"sequence_length": 192, "num_workers": 0, "packing_buffer_size": 24, "shuffle_buffer_size": 16} | options
    data = DataConfig(train=tuple(sources), tokenizer="unused", **keys)
    return PackReader(
        sources,
        data,
        tokenizer,
        plan or SquashPlan(16, TOKENS_PER_IMAGE),
        rank=rank,
        world_size=world_size,
        seed=seed,
        training=training,
    )


def content(pack: Pack) -> tuple[object, ...]:
    """Everything in a pack, to be compared byte for byte."""
    arrays = (pack.tokens, pack.labels, pack.position_ids, pack.cu_seqlens, pack.segment_sources)
    described = [(array.dtype.name, array.shape, array.tobytes()) for array in arrays]
    return (*described, pack.images, pack.sample_keys, pack.restore_key, pack.dropped)


def take(reader: Iterator[Pack], count: int) -> list[tuple[object, ...]]:
    """The contents of the next ``count`` packs."""
    return [content(next(reader)) for _ in range(count)]


def write_raw(directory: Path, samples: Sequence[dict[str, bytes]]) -> Path:
    """A data set of files as they are, which ``megavlm prepare`` would have refused in part."""
    from megavlm.data.shards import ShardWriter, write_metadata

    directory.mkdir(parents=True)
    with ShardWriter(directory, 40) as writer:
        for index, files in enumerate(samples):
            writer.write(f"s-{index:05d}", list(files.items()))
    write_metadata(directory, writer.names)
    return directory
