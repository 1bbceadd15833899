"""Films and pictures of real sizes through the data path: how many cores keep a GPU fed with them.

Three things, each with the processor time of this process and its threads, so that a loaded machine says the same:

- films: H.264 of 640 x 360, sampled by the rules of Qwen2.5-VL; frames that the tower sees, and frames that FFmpeg has
  to go through for these, per second of one core;
- pictures: JPEGs of real sizes to patches at their own resolution, against squares of 448 pixels of the same files;
- feeding: packs of ``--sequence-length`` tokens read and decoded from prepared data (one third of the samples with a
  film, one third with a picture, the rest text), in seconds of a core per pack, against those that a GPU takes for
  one by the planner's prediction (or ``--tokens-per-second``). Packing runs in ``data.num_workers`` processes or in the
  training process, decoding in a thread of the training process.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import av  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from data_path import machine, make_pictures  # noqa: E402
from native_speed import sizes  # noqa: E402
from PIL import Image  # noqa: E402
from pydantic import TypeAdapter  # noqa: E402

from megavlm.config.load import load_recipe  # noqa: E402
from megavlm.config.schema import DataConfig, DataSource, ModelConfig  # noqa: E402
from megavlm.data.decode import ImageDecoder  # noqa: E402
from megavlm.data.decoders import make_decoder  # noqa: E402
from megavlm.data.films.film import Film  # noqa: E402
from megavlm.data.films.plan import FilmLayout  # noqa: E402
from megavlm.data.images import lay_out  # noqa: E402
from megavlm.data.media import ImagePlan, plan_of  # noqa: E402
from megavlm.data.plans_single import SquashPlan  # noqa: E402
from megavlm.data.positions import positions_of  # noqa: E402
from megavlm.data.preparing import Preparation, finish, write_samples  # noqa: E402
from megavlm.data.read_pack import decode_pack  # noqa: E402
from megavlm.data.reader import PackReader  # noqa: E402
from megavlm.data.tokenizer import load_tokenizer, train_sentencepiece  # noqa: E402
from megavlm.families.presets import expand_presets  # noqa: E402
from megavlm.planning.gpus import GPUS, choose_gpu  # noqa: E402
from megavlm.planning.search import search  # noqa: E402
from megavlm.planning.workload import assume_workload  # noqa: E402

PRESET = "qwen2_5_vl_7b"
FILM = (640, 360)
RATE = 25
SECONDS = (4, 8, 16, 30)
"""Of the films."""
KEY_FRAMES = 60
"""Frames from one key frame to the next, at most."""


def make_films(lengths: Sequence[int]) -> list[bytes]:
    """H.264 films of ``lengths`` seconds: waves that move, with some grain."""
    width, height = FILM
    y, x = np.mgrid[0:height, 0:width]
    grain = np.random.default_rng(0).normal(0, 4, (height, width, 3))
    found = []
    for seconds in lengths:
        file = io.BytesIO()
        with av.open(file, "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=RATE, options={"g": str(KEY_FRAMES), "preset": "veryfast"})
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for index in range(seconds * RATE):
                waves = [np.sin(x * 0.02 * c + y * 0.013 + index * 0.09 * c) for c in (1, 2, 3)]
                pixels = (128 + 90 * np.stack(waves, -1) + np.roll(grain, 7 * index, 1)).clip(0, 255).astype(np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode(None))
        found.append(file.getvalue())
    return found


def per_core(work: Callable[[], Any], units: float, seconds: float) -> dict[str, float]:
    """Do it, after once that is not counted, until so many seconds are over; return units in a second, best of all."""
    work()
    cpu, wall, end = [], [], time.perf_counter() + seconds
    while not wall or time.perf_counter() < end:
        start, before = time.perf_counter(), time.process_time()
        work()
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - before)
    return {"per_core": units / min(cpu), "per_second": units / min(wall)}


def measure_films(decoder: ImageDecoder, films: Sequence[bytes], plan: ImagePlan, seconds: float) -> dict[str, Any]:
    """Frames that are shown, and those that stand before them from a key frame on, in a second of one core."""
    whole = [Film(data) for data in films]
    whole = [Film(one.data, one.index().to_bytes()) for one in whole]
    layouts = lay_out(whole, plan)
    shown = [layout.indices for layout in layouts if isinstance(layout, FilmLayout)]
    frames = sum(len(set(one)) for one in shown)
    found = per_core(lambda: decoder.decode(whole, plan, layouts), frames, seconds)
    length = sum(one.shape().frames for one in whole)
    return {"frames_shown": frames, "frames_of_the_films": length, "shown": found,
            "through": {key: rate * length / frames for key, rate in found.items()}}  # fmt: skip


def measure_pictures(decoder: ImageDecoder, plan: ImagePlan, count: int, seconds: float) -> dict[str, Any]:
    """Pictures of real sizes at their own resolution, against squares of the same files."""
    source = make_pictures(4)
    files = []
    for number, (width, height) in enumerate(sizes(count)):
        file = io.BytesIO()
        Image.open(io.BytesIO(source[number % 4])).resize((width, height)).save(file, "JPEG", quality=85)
        files.append(file.getvalue())
    layouts = lay_out(files, plan)
    native = per_core(lambda: decoder.decode(files, plan, layouts), count, seconds)
    squares = per_core(lambda: decoder.decode(files, SquashPlan(448, 256)), count, seconds)
    patches = sum(int(np.prod(layout.patches)) for layout in layouts if layout.patches is not None)
    return {"native": native, "squares": squares, "patches_a_picture": patches / count,
            "ratio": native["per_core"] / squares["per_core"]}  # fmt: skip


def write_data(folder: Path, films: Sequence[bytes], samples: int) -> Path:
    """Write and prepare samples with films, with pictures, and of text alone."""
    draw, records = random.Random(0), []
    (folder / "media").mkdir()
    for number, data in enumerate(films):
        (folder / "media" / f"{number}.mp4").write_bytes(data)
    source = make_pictures(4)
    for number, (width, height) in enumerate(sizes(16)):
        picture = Image.open(io.BytesIO(source[number % 4])).resize((width, height))
        picture.save(folder / "media" / f"{number}.jpg", quality=85)
    words = ["the", "a", "red", "blue", "cat", "sat", "on", "mat", "and", "two", "men", "with", "apples", "go", "home"]
    for number in range(samples):
        text = " ".join(draw.choice(words) for _ in range(draw.randint(20, 120)))
        record: dict[str, Any] = {"id": str(number)}
        mark = ""
        if number % 3 == 0:
            record["video"], mark = f"{draw.randrange(len(films))}.mp4", "<video>\n"
        elif number % 3 == 1:
            record["image"], mark = f"{draw.randrange(16)}.jpg", "<image>\n"
        turns = [{"from": "human", "value": f"{mark}What is it?"}, {"from": "gpt", "value": text}]
        records.append(record | {"conversations": turns})
    (folder / "records.json").write_text(json.dumps(records))
    train_sentencepiece([turn["value"] for one in records for turn in one["conversations"]], folder / "t.model", 400)
    (folder / "data").mkdir()
    finish(write_samples(Preparation(folder / "records.json", folder / "media"), folder / "data"))
    return folder / "data"


def measure_feeding(
    folder: Path, data: Path, model: ModelConfig, length: int, packs: int, decoder: ImageDecoder
) -> dict[str, float]:
    """Seconds of a core for each pack: laying it out, and decoding what it shows."""
    tokenizer = load_tokenizer(folder / "t.model")
    sources = (DataSource(path=str(data)),)
    config = DataConfig(
        train=sources, tokenizer="", sequence_length=length, packing_buffer_size=64, shuffle_buffer_size=64,
        num_workers=0, system_message="",
    )  # fmt: skip
    plan, laid, decoded, films, pictures = plan_of(model), [], [], 0, 0
    with contextlib.closing(
        PackReader(
            sources,
            config,
            tokenizer,
            plan,
            positions_of(model, tokenizer.imgpad_id),
            rank=0,
            world_size=1,
            seed=1,
            training=True,
        )
    ) as reader:
        next(reader)
        for _ in range(packs):
            start = time.process_time()
            pack = next(reader)
            laid.append(time.process_time() - start)
            films += sum(not isinstance(one, bytes) for one in pack.images)
            pictures += sum(isinstance(one, bytes) for one in pack.images)
            start = time.process_time()
            decode_pack(pack, decoder, plan, tokenizer.imgpad_id)
            decoded.append(time.process_time() - start)
    return {"reading": sum(laid) / packs, "decoding": sum(decoded) / packs, "films": films / packs,
            "pictures": pictures / packs}  # fmt: skip


def predicted(length: int, gpus: int, gpu: str) -> tuple[float, str]:
    """Return tokens in a second of one GPU, by the plan of all of the preset's weights, and the plan's layout."""
    keys = [f"data.sequence_length={length}", "data.train=[{path: none}]", "output_dir=none", "data.tokenizer=none"]
    recipe = load_recipe(f"{PRESET}/sft", keys, expand_presets)
    (plan, *_) = search(recipe, gpus, choose_gpu(gpu), assume_workload(recipe)).plans
    tokens = recipe.training.global_batch_size * length / plan.time.step / gpus
    return tokens, f"{gpus} x {gpu}, TP {plan.layout.tensor} x PP {plan.layout.pipeline}"


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run everything."""
    tree = {"model": {"preset": PRESET, "video": {"max_frames": arguments.max_frames}}}
    model = TypeAdapter(ModelConfig).validate_python(expand_presets(tree)["model"])
    plan, decoder = plan_of(model), make_decoder("auto")
    result: dict[str, Any] = {"machine": machine(), "decoder": type(decoder).__name__}
    films = make_films(SECONDS[: arguments.films])
    result["films"] = measure_films(decoder, films, plan, arguments.seconds)
    result["pictures"] = measure_pictures(decoder, plan, arguments.pictures, arguments.seconds)
    length = arguments.sequence_length
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder), films, arguments.samples)
        feeding = measure_feeding(Path(folder), data, model, length, arguments.packs, decoder)
    rate, layout = arguments.tokens_per_second, "as given"
    if rate is None:
        rate, layout = predicted(length, arguments.gpus, arguments.gpu)
    seconds = length / rate
    result["feeding"] = {
        **feeding, "gpu_seconds_a_pack": seconds, "gpu": layout,
        "cores_reading": feeding["reading"] / seconds, "cores_decoding": feeding["decoding"] / seconds,
    }  # fmt: skip
    return result


def table(result: dict[str, Any]) -> str:
    """Return the Markdown of a result."""
    where, films, pictures, feeding = (result[key] for key in ("machine", "films", "pictures", "feeding"))
    width, height = FILM
    shown, through, native, squares = films["shown"], films["through"], pictures["native"], pictures["squares"]
    packages = ", ".join(f"{name} {number}" for name, number in where["packages"].items())
    lines = [
        f"Machine: {where['cpu']}, {where['cores']} cores, {where['threads']} torch thread(s), load "
        f"{where['load_average_before']:.1f} before the start. Python {where['python']}, {packages}, PyAV "
        f"{av.__version__}; {result['decoder']}.",
        "",
        "| what | per second of one core | on this machine |",
        "|---|---|---|",
        f"| films, H.264 {width} x {height} at {RATE}: frames shown ({films['frames_shown']} of "
        f"{films['frames_of_the_films']}) | {shown['per_core']:.0f} | {shown['per_second']:.0f} |",
        f"| the same, frames gone through | {through['per_core']:.0f} | {through['per_second']:.0f} |",
        f"| pictures at their own size ({pictures['patches_a_picture']:.0f} patches) | {native['per_core']:.1f} | "
        f"{native['per_second']:.1f} |",
        f"| the same as squares of 448 | {squares['per_core']:.1f} | {squares['per_second']:.1f} |",
        "",
        f"A pack ({feeding['films']:.1f} films, {feeding['pictures']:.1f} pictures) takes {feeding['reading']:.3f} s "
        f"of a core to lay out and {feeding['decoding']:.3f} s to decode; a GPU takes "
        f"{feeding['gpu_seconds_a_pack']:.2f} s for it ({feeding['gpu']}). To feed one: "
        f"**{feeding['cores_reading']:.2f}** cores that lay out (`data.num_workers`), "
        f"**{feeding['cores_decoding']:.2f}** that decode.",
    ]
    return "\n".join(lines)


def main() -> int:
    """Measure, print the table, and write the JSON."""
    parser = argparse.ArgumentParser(description="Films and pictures of real sizes through the data path.")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result as JSON as well")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each rate (default 3)")
    parser.add_argument("--films", type=int, default=len(SECONDS), help=f"films, of {SECONDS} seconds (default: all)")
    parser.add_argument("--max-frames", type=int, default=64, help="model.video.max_frames (default 64)")
    parser.add_argument("--pictures", type=int, default=32, help="pictures (default 32)")
    parser.add_argument("--samples", type=int, default=180, help="samples that packs are made of (default 180)")
    parser.add_argument("--packs", type=int, default=4, help="packs (default 4)")
    parser.add_argument("--sequence-length", type=int, default=16384, help="tokens of a pack (default 16384)")
    parser.add_argument("--tokens-per-second", type=float, help="of one GPU (default: as megavlm plan predicts)")
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h100", help="of the prediction (default h100)")
    parser.add_argument("--gpus", type=int, default=8, help="of the prediction (default 8)")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    start = time.perf_counter()
    result = measure(arguments)
    result["seconds"] = time.perf_counter() - start
    print(table(result))
    print(f"\nCommand: `python benchmarks/native_reader.py {' '.join(sys.argv[1:])}` ({result['seconds']:.0f} s)")
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
