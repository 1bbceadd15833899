"""What a save costs a run: seconds of training stalled, asynchronous against synchronous, and what its proof costs.

``python benchmarks/checkpoint.py``: a model of some 100 M parameters with its optimizer state, in one process; each
kind saves in turns while steps are taken, proven and not, one right after the other and in changing order. Prints a
Markdown table. The disk decides the figures; ratios are to ``cp`` of the same checkpoint, flushed, in the same run.
What a proof costs is the median over the pairs of the ratio of a proven save to its unproven neighbour, in seconds and
in processor time: of all threads in a synchronous save, of the training's own while an asynchronous one stalls it. On a
machine with other work the latter says more; without the waits for the disk, it makes the proof look dearer than it is.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from megavlm.parallel.device import prepare_device  # noqa: E402

prepare_device()

import torch  # noqa: E402
from tiny import IMAGE_TOKEN, random_packs, tiny_recipe  # noqa: E402

from megavlm.checkpoint.saver import Saver, State  # noqa: E402
from megavlm.data.device_batch import make_batch  # noqa: E402
from megavlm.parallel.device import local_device  # noqa: E402
from megavlm.parallel.state import process_groups  # noqa: E402
from megavlm.training.build import TrainingModel, build_training  # noqa: E402
from megavlm.training.step import train_step  # noqa: E402


def steps(training: TrainingModel, saver: Saver, count: int, *, until_saved: bool = False) -> list[float]:
    """Take steps and return their seconds; polls the saver as the loop does."""
    (pack, pixels), *_ = random_packs(1)
    batch = make_batch(pack, torch.from_numpy(pixels), local_device())
    seconds = []
    while len(seconds) < count or (until_saved and saver.busy):
        start = time.perf_counter()
        train_step(training.chunks, training.optimizer, [batch], num_sources=1)
        saver.poll()
        seconds.append(time.perf_counter() - start)
    return seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024, help="width of the language model (default 1024)")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    heads = 8
    language = {"hidden_size": args.hidden, "ffn_hidden_size": 3 * args.hidden, "num_layers": args.layers}
    language |= {"num_attention_heads": heads, "num_query_groups": heads, "kv_channels": args.hidden // heads}
    recipe = tiny_recipe(model={"preset": "tiny", "vision": {"image_size": 32, "positional_grid": 4},
                                "connector": {"num_queries": 4, "head_dim": 64}, "language": language})  # fmt: skip
    kinds = {f"{name}{rest}": (name == "asynchronous", not rest)
             for name in ("synchronous", "asynchronous") for rest in ("", " unproven")}  # fmt: skip
    rows: dict[str, list[float]] = {name: [] for name in (*kinds, "cp", "alone", "beside", "beside unproven")}
    worked: dict[str, list[float]] = {name: [] for name in kinds}
    with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=".") as folder, process_groups(recipe.parallel, 1):
        root = Path(folder)
        training = build_training(recipe, IMAGE_TOKEN)
        savers = {
            name: Saver(root / name, 1, asynchronous=asynchronous, proven=proven)
            for name, (asynchronous, proven) in kinds.items()
        }
        steps(training, savers["synchronous"], 2)
        for i in range(args.rounds):
            rows["alone"] += steps(training, savers["synchronous"], 3)
            order = list(savers.items())
            for name, saver in order if i % 2 else reversed(order):
                clock = time.thread_time if saver.asynchronous else time.process_time
                start = clock()
                saver.save(State(training.modules, training.optimizer, training.scheduler, run={"step": i}))
                worked[name].append(clock() - start)
                rows[name].append(saver.stalled_seconds)
                if saver.busy:
                    beside = "beside unproven" if name.endswith("unproven") else "beside"
                    rows[beside] += steps(training, saver, 1, until_saved=True)
            source = next((root / "synchronous").glob("step-*"))
            start = time.perf_counter()
            subprocess.run(["cp", "-r", str(source), str(root / "copy")], check=True)
            os.sync()
            rows["cp"].append(time.perf_counter() - start)
            shutil.rmtree(root / "copy")
        size = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    median = {name: statistics.median(values) for name, values in rows.items()}
    count = sum(p.numel() for module in training.modules for p in module.parameters())
    print(f"{count / 1e6:.0f} M parameters, checkpoint of {size / 2**30:.2f} GiB; Python {platform.python_version()}, "
          f"torch {torch.__version__}; load {os.getloadavg()[0]:.1f}; {args.rounds} rounds, medians\n")  # fmt: skip
    print("| what | seconds | MiB/s | of cp |\n|---|---|---|---|")
    for name in ("cp", *kinds):
        what = "`cp -r` + flush" if name == "cp" else f"{name} save: training stalled"
        rate = f"{size / 2**20 / median[name]:.0f}" if "asynchronous" not in name else ""
        print(f"| {what} | {median[name]:.2f} | {rate} | {median[name] / median['cp']:.2f}x |")
    print(f"| a step alone | {median['alone']:.2f} | | |")
    for name in ("beside", "beside unproven"):
        print(f"| a step while a thread writes{name.removeprefix('beside')} | {median[name]:.2f} | | |")
    print("\n| proof | median of pairs | each pair, % |\n|---|---|---|")
    for name in ("synchronous", "asynchronous"):
        for what, values in (("seconds", rows), ("processor time", worked)):
            ratios = [100 * (a / b - 1) for a, b in zip(values[name], values[f"{name} unproven"], strict=True)]
            each = ", ".join(f"{ratio:+.0f}" for ratio in ratios)
            print(f"| {name}, {what} | {statistics.median(ratios):+.1f} % | {each} |")


if __name__ == "__main__":
    main()
