"""Memory and time of full fine-tuning, LoRA and Q-LoRA of one language model, one process each, in turns.

``python benchmarks/lora.py`` prints the table of benchmarks/README.md. A pack is 512 tokens without images; the tower
and the connector are small and frozen. Memory is what the process holds at most, less what it held before the model
was built (Linux's VmHWM and VmRSS), and, beside it, weights, gradients and optimizer state counted tensor by tensor.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MODES = ("full", "lora", "qlora")
LORA = {"rank": 16, "alpha": 16.0, "targets": ("c_attn", "attn.c_proj", "w1", "w2")}
TOKENS = 512


def memory(field: str) -> int:
    """Return VmRSS or VmHWM of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise ValueError(field)


def make_recipe(mode: str, hidden: int, layers: int) -> Any:
    """Return the recipe of one way to fine-tune."""
    from pydantic import TypeAdapter

    from megavlm.config.schema import Recipe
    from megavlm.models.registry import expand_presets

    freeze = {"freeze": True}
    tree = {
        "output_dir": "unused",
        "model": {
            "preset": "tiny",
            "language": {
                "num_layers": layers, "hidden_size": hidden, "ffn_hidden_size": hidden * 11 // 4 // 64 * 64,
                "num_attention_heads": hidden // 64, "num_query_groups": hidden // 64, "kv_channels": 64,
            },
        },
        "data": {"train": [{"path": "unused"}], "sequence_length": TOKENS},
        "modules": {"vision": freeze, "connector": freeze},
        "optimizer": {"lr": 1e-4},
        "training": {"train_steps": 100, "global_batch_size": 1, "precision": "fp32"},
        "lora": {"full": {}, "lora": LORA, "qlora": {**LORA, "quantize": "nf4"}}[mode],
    }  # fmt: skip
    return TypeAdapter(Recipe).validate_python(expand_presets(tree))


def measure(mode: str, hidden: int, layers: int, steps: int, base: Path) -> dict[str, float]:
    """Build, load, train; return figures of this process."""
    from megavlm.parallel.device import prepare_device

    prepare_device()
    import numpy as np
    import torch

    from megavlm.checkpoint import distributed as checkpoint
    from megavlm.data.batch import Pack
    from megavlm.data.feed import micro_batch
    from megavlm.models.language.adapters import frozen_linears
    from megavlm.parallel.cpu_layer import return_freed_memory
    from megavlm.parallel.state import process_groups
    from megavlm.training.build import build_training
    from megavlm.training.step import train_step

    return_freed_memory()
    recipe = make_recipe(mode, hidden, layers)
    with process_groups(recipe.parallel, 1):
        before = memory("VmRSS")
        training = build_training(recipe, 500)
        if mode == "full" and not base.exists():
            checkpoint.save_weights(base.parent, training.modules)
            return {}
        checkpoint.load(base, modules=training.modules)
        training.optimizer.reload_model_params()
        rng = np.random.default_rng(0)
        seconds = []
        for _ in range(steps + 1):
            tokens = rng.integers(0, 500, size=TOKENS + 1)
            pack = Pack(
                tokens=tokens[:-1], labels=tokens[1:], position_ids=np.arange(TOKENS),
                cu_seqlens=np.array([0, TOKENS], np.int32), segment_sources=np.array([0], np.int32), images=[],
                sample_keys=[],
            )  # fmt: skip
            side = recipe.model.vision.image_size
            batch = micro_batch(pack, torch.zeros(0, 3, side, side, dtype=torch.uint8), torch.device("cpu"))
            start = time.perf_counter()
            training.scheduler.step(1)
            train_step(training.chunks, training.optimizer, [batch], num_sources=1)
            seconds.append(time.perf_counter() - start)
        language = training.modules[0].language
        weights = sum(p.nbytes for p in language.parameters())
        packed = [layer.nf4 for *_, layer in frozen_linears(language) if layer.nf4 is not None]
        learning = sum(p.numel() for p in language.parameters() if p.requires_grad)
        return {
            "seconds": statistics.median(seconds[1:]),
            "peak": memory("VmHWM") - before,
            "weights": weights + sum(one.nbytes for one in packed),
            "gradients": 4 * learning,
            "optimizer": 8 * learning,
            "learning": learning,
        }


def main() -> None:
    """Measure all three and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.mode:
        print(json.dumps(measure(args.mode, args.hidden, args.layers, args.steps, args.base)))
        return
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "step-00000000"

        def child(mode: str) -> dict[str, float]:
            words = [f"--{key}={getattr(args, key)}" for key in ("hidden", "layers", "steps")]
            command = [sys.executable, __file__, *words, f"--mode={mode}", f"--base={base}"]
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            out = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True, timeout=600).stdout
            return dict(json.loads(out.splitlines()[-1]))

        child("full")  # makes the base
        found: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
        for _ in range(args.rounds):
            for mode in MODES:
                found[mode].append(child(mode))
    best = {mode: min(rounds, key=lambda one: one["seconds"]) for mode, rounds in found.items()}
    print("| | learns | weights | gradients | optimizer | peak memory | s/step | time | memory |")
    print("|---|---|---|---|---|---|---|---|---|")
    for mode, one in best.items():
        sizes = " | ".join(f"{one[key] / 2**20:.1f} MiB" for key in ("weights", "gradients", "optimizer", "peak"))
        ratios = " | ".join(f"{one[key] / best['full'][key]:.2f}x" for key in ("seconds", "peak"))
        print(f"| {mode} | {one['learning'] / 1e6:.2f} M | {sizes} | {one['seconds']:.2f} | {ratios} |")


if __name__ == "__main__":
    main()
