"""The data path on this machine: the reader's speed, the decoders' speed, and the padding that packers leave.

Reader and packers work on the quickstart's pictures and questions; the decoders on JPEGs made on the spot. Times are
the best of some rounds: on a shared machine the others say more about the neighbours.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image

from megavlm.commands import prepare
from megavlm.config.schema import DataConfig, DataSource
from megavlm.data.chat import encode_conversation
from megavlm.data.decode import ImageDecoder
from megavlm.data.decoders import make_decoder
from megavlm.data.images import lay_out
from megavlm.data.media import ImagePlan
from megavlm.data.packing import CarryOverPacker
from megavlm.data.plans_single import SquashPlan
from megavlm.data.plans_tiles import AnyresPlan
from megavlm.data.reader import PackReader
from megavlm.data.schema import parse_conversation
from megavlm.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from megavlm.quickstart.render import render_dataset

SEQUENCE_LENGTH = 512
TOKENS_PER_IMAGE = 16
BUFFER = 256
VOCABULARY = 640
PICTURES = 1000
ROUNDS = 3
PACKAGES = ("torch", "megatron-energon", "nvidia-dali-cuda120", "simplejpeg", "pillow", "numpy")


SQUARES = SquashPlan(16, TOKENS_PER_IMAGE)
SMALL_TILES = AnyresPlan(32, TOKENS_PER_IMAGE // 4, pinpoints=((32, 64), (64, 32), (64, 64)))
"""For the quickstart's pictures of 64 pixels: about as many tokens as SQUARES gives them."""
TILES = AnyresPlan(336, 576, pinpoints=((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)))
"""LLaVA-1.6's."""


@dataclass(frozen=True)
class Mix:
    """The quickstart's data, prepared."""

    path: Path
    tokenizer: Tokenizer
    lengths: list[int]
    """Tokens of each sample."""


def make_mix(folder: Path, pictures: int) -> Mix:
    """Render ``pictures`` pictures with their questions and prepare them."""
    rendered = render_dataset(folder / "raw", train_images=pictures, heldout_images=2, seed=1)
    records = json.loads(rendered.train_json.read_text(encoding="utf-8"))
    texts = [turn["value"] for record in records for turn in record["conversations"]]
    train_sentencepiece(texts, folder / "tokenizer.model", VOCABULARY)
    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    words = [str(rendered.train_json), f"--images={rendered.images_dir}", f"--out={folder / 'train'}"]
    prepare.run(parser.parse_args(words))
    tokenizer = load_tokenizer(folder / "tokenizer.model")
    parsed = [parse_conversation(record) for record in records]
    encoded = [encode_conversation(c, tokenizer, [(TOKENS_PER_IMAGE,)] * len(c.images), "") for c in parsed]
    return Mix(folder / "train", tokenizer, [len(sample.tokens) for sample in encoded])


def measure_reader(mix: Mix, num_workers: int, packs: int, plan: ImagePlan = SQUARES) -> dict[str, float]:
    """Read ``packs`` packs in each round, from a reader that runs already; images stay encoded."""
    source = DataSource(path=str(mix.path))
    data = DataConfig(
        train=(source,),
        tokenizer="",
        sequence_length=SEQUENCE_LENGTH,
        packing_buffer_size=BUFFER,
        shuffle_buffer_size=BUFFER,
        num_workers=num_workers,
        system_message="",
    )
    with contextlib.closing(
        PackReader([source], data, mix.tokenizer, plan, rank=0, world_size=1, seed=1, training=True)
    ) as reader:
        start = time.perf_counter()
        next(reader)
        first = time.perf_counter() - start
        seconds, padding = [], []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            padding += [pack.padding_tokens for pack in islice(reader, packs)]
            seconds.append(time.perf_counter() - start)
    rate = packs / min(seconds)
    return {
        "packs_per_s": rate,
        "tokens_per_s": rate * SEQUENCE_LENGTH,
        "first_pack_s": first,
        "padding": sum(padding) / (len(padding) * SEQUENCE_LENGTH),
    }


def make_pictures(count: int) -> list[bytes]:
    """About 640 x 480 JPEGs as smooth and as noisy as photographs: waves, a rectangle and some grain."""
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(count):
        width, height = int(rng.integers(560, 720)), int(rng.integers(420, 540))
        y, x = np.mgrid[0:height, 0:width]
        waves = [np.sin(x * rng.uniform(0.01, 0.1) + y * rng.uniform(0.01, 0.1)) for _ in range(3)]
        pixels = 128 + 90 * np.stack(waves, -1) + rng.normal(0, 6, (height, width, 3))
        pixels[height // 4 : height // 2, width // 4 : width // 2] = rng.integers(0, 255, 3)
        buffer = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
        pictures.append(buffer.getvalue())
    return pictures


def measure_decoder(decoder: ImageDecoder, pictures: Sequence[bytes], size: int) -> dict[str, float]:
    """Decode all pictures in each round, after one that is not counted."""
    seconds = []
    for _ in range(1 + ROUNDS):
        start = time.perf_counter()
        decoded = decoder.decode(pictures, size)
        if decoder.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        assert not decoded.failed
    return {"images_per_s": len(pictures) / min(seconds[1:])}


def measure_tiles(decoder: ImageDecoder, pictures: Sequence[bytes]) -> dict[str, float]:
    """Decode all pictures to tiles, and as many squares of the same side, in turns; the best round of each."""
    layouts = [lay_out([data], TILES)[0] for data in pictures]
    views = sum(len(layout.views) for layout in layouts)
    squares = [pictures[index % len(pictures)] for index in range(views)]
    tiled, squashed = [], []
    for _ in range(1 + ROUNDS):
        for seconds, work in (
            (tiled, lambda: decoder.decode(pictures, TILES, layouts)),
            (squashed, lambda: decoder.decode(squares, TILES.side)),
        ):
            start = time.perf_counter()
            work()
            if decoder.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    tiles, plain = min(tiled[1:]), min(squashed[1:])
    return {"images_per_s": len(pictures) / tiles, "views_per_s": views / tiles, "squares_per_s": views / plain}


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> int:
    """Return the number of packs that first-fit decreasing makes of one full buffer."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        for index, room in enumerate(rooms):
            if length <= room:
                rooms[index] -= length
                break
        else:
            rooms.append(capacity - length)
    return len(rooms)


def measure_padding(lengths: Sequence[int], samples: int) -> dict[str, float]:
    """Share of padding that each packer leaves on the same stream of at least ``samples`` samples."""
    rng = random.Random(1)
    stream: list[int] = []
    while len(stream) < samples:
        stream += rng.sample(lengths, len(lengths))
    stream = stream[: len(stream) // BUFFER * BUFFER]
    packer: CarryOverPacker[range] = CarryOverPacker(SEQUENCE_LENGTH, BUFFER)
    packs = [pack for length in stream if (pack := packer.add(range(length)))]
    carried = sum(len(sample) for pack in packs for sample in pack) / (len(packs) * SEQUENCE_LENGTH)
    buffers = [stream[i : i + BUFFER] for i in range(0, len(stream), BUFFER)]
    bins = sum(first_fit_decreasing(buffer, SEQUENCE_LENGTH) for buffer in buffers)
    return {
        "carry_over": 1 - carried,
        "first_fit_decreasing": 1 - sum(stream) / (bins * SEQUENCE_LENGTH),
        "none": 1 - sum(stream) / (len(stream) * SEQUENCE_LENGTH),
    }


def machine() -> dict[str, Any]:
    """Return what the numbers were taken on."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return {
        "cpu": names[0] if names else "unknown",
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "load_average_before": os.getloadavg()[0],
        "python": sys.version.split()[0],
        "packages": dict(_versions()),
    }


def _versions() -> Iterator[tuple[str, str]]:
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            yield name, version(name)


def measure(pictures: int) -> dict[str, Any]:
    """Run everything; ``pictures`` scales all of it."""
    result: dict[str, Any] = {"machine": machine(), "reader": {}, "decoders": {}}
    with tempfile.TemporaryDirectory() as folder:
        mix = make_mix(Path(folder), pictures)
        for num_workers in (0, 1):
            result["reader"][str(num_workers)] = measure_reader(mix, num_workers, max(20, pictures // 5))
        result["reader_of_tiles"] = measure_reader(mix, 0, max(20, pictures // 5), SMALL_TILES)
    result["padding"] = measure_padding(mix.lengths, samples=20 * pictures)
    result["samples"] = {"count": len(mix.lengths), "mean_tokens": sum(mix.lengths) / len(mix.lengths)}
    jpegs = make_pictures(max(4, pictures // 16))
    for name in ("dali", "simplejpeg", "pil"):
        try:
            decoder = make_decoder(name)
        except ImportError as error:
            result["decoders"][name] = {"left_out": str(error)}
            continue
        sizes = {str(size): measure_decoder(decoder, jpegs, size) for size in (64, 448)}
        tiles = measure_tiles(decoder, jpegs[: max(2, len(jpegs) // 4)])
        result["decoders"][name] = {"device": decoder.device.type, "tiles": tiles} | sizes
    return result


def table(result: dict[str, Any]) -> str:
    """Return the Markdown of a result."""
    where, samples = result["machine"], result["samples"]
    packages = ", ".join(f"{name} {number}" for name, number in where["packages"].items())
    gpu = f", {where['gpu']}" if where["gpu"] else ""
    lines = [
        f"Machine: {where['cpu']}, {where['cores']} cores{gpu}, {where['threads']} torch thread(s), load "
        f"{where['load_average_before']:.1f} before the start. Python {where['python']}, {packages}.",
        f"Command: `{result['command']}` ({result['seconds']:.0f} s)",
        f"Quickstart mix: {samples['count']} samples of {samples['mean_tokens']:.0f} tokens on average, packs of "
        f"{SEQUENCE_LENGTH}, buffers of {BUFFER}. Decoders: JPEGs of about 640 x 480. Best of {ROUNDS} rounds.",
        "",
        "| what | how | result |",
        "|---|---|---|",
    ]
    for workers, r in result["reader"].items():
        where_read = "in the calling process" if workers == "0" else f"{workers} worker process"
        lines.append(
            f"| reader | {where_read} | {r['packs_per_s']:.0f} packs/s, {r['tokens_per_s']:,.0f} tokens/s, first pack "
            f"after {r['first_pack_s']:.1f} s, padding {r['padding']:.2%} |"
        )
    r = result["reader_of_tiles"]
    lines.append(
        f"| reader | tiles (anyres), in the calling process | {r['packs_per_s']:.0f} packs/s, "
        f"{r['tokens_per_s']:,.0f} tokens/s, padding {r['padding']:.2%} |"
    )
    for name, d in result["decoders"].items():
        if "left_out" in d:
            lines.append(f"| decoder | {name} | left out: {d['left_out']} |")
            continue
        rates = ", ".join(f"{d[size]['images_per_s']:.0f} images/s at {size} px" for size in ("64", "448"))
        lines.append(f"| decoder | {name} ({d['device']}) | {rates} |")
        t = d["tiles"]
        lines.append(
            f"| tiles | {name} ({d['device']}), LLaVA-1.6's anyres at 336 px | {t['images_per_s']:.1f} images/s, "
            f"{t['views_per_s']:.0f} views/s against {t['squares_per_s']:.0f} squares/s: "
            f"{t['views_per_s'] / t['squares_per_s']:.2f} |"
        )
    names = {
        "carry_over": "carry-over, exact subset sum",
        "first_fit_decreasing": "greedy first-fit decreasing within a buffer",
        "none": "none: one sample in a pack",
    }
    lines += [f"| padding | {names[name]} | {share:.2%} |" for name, share in result["padding"].items()]
    return "\n".join(lines)


def main() -> int:
    """Measure, print the table, and write the JSON."""
    parser = argparse.ArgumentParser(description="Speed of the data path and padding of the packers.")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result as JSON as well")
    parser.add_argument("--pictures", type=int, default=PICTURES, help=f"size of everything (default {PICTURES})")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    start = time.perf_counter()
    result = measure(arguments.pictures)
    result["seconds"] = time.perf_counter() - start
    script = Path(sys.argv[0])
    result["command"] = shlex.join(["python", str(Path(script.parent.name) / script.name), *sys.argv[1:]])
    print(table(result))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
