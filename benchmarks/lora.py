"""Memory and time of full fine-tuning, LoRA and Q-LoRA of one language model, one process each, in turns.

``python benchmarks/lora.py`` prints the table of benchmarks/README.md. A pack is 512 tokens without images; the tower
and the connector are small and frozen. Time is the processor's. Memory is what the process holds at most, less what it
held before the model was built (Linux's VmHWM and VmRSS), and, beside it, weights, gradients and optimizer state
counted tensor by tensor.

``python benchmarks/lora.py --qwen-vl``, on a GPU: LoRA and Q-LoRA of the whole Qwen-VL (9.66 B, random weights) as its
authors measured them on an A100: one sample with an image a micro-batch, 8 micro-batches a step, 384 to 2048 tokens.
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
# The authors' table (facts page G): GB and seconds a step on one A100-80G.
A100 = {
    "LoRA (base)": {384: (37.1, 2.3), 512: (37.3, 2.4), 1024: (38.7, 3.6), 2048: (38.7, 6.1)},
    "LoRA (chat)": {384: (23.3, 2.2), 512: (23.6, 2.3), 1024: (25.1, 3.5), 2048: (27.3, 5.9)},
    "Q-LoRA": {384: (17.0, 4.2), 512: (17.2, 4.5), 1024: (18.2, 5.5), 2048: (19.3, 7.9)},
}
# The shipped recipe and what differs from it; a chat model's embedding and output layer stay as they are.
QWEN_VL: dict[str, tuple[str, list[str]]] = {
    "LoRA (base)": ("qwen_vl_7b/lora", []),
    "LoRA (chat)": ("qwen_vl_7b/lora", ["lora.train_embeddings=false", "lora.train_head=false"]),
    "Q-LoRA": ("qwen_vl_7b/qlora", []),
}
TINY = [
    "model.preset=tiny", "model.vision.image_size=32", "model.connector.num_queries=4", "training.precision=fp32",
]  # fmt: skip
ACCUMULATION = 8
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
    from megavlm.families.presets import expand_presets

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

    from megavlm.architectures.adapters import frozen_linears
    from megavlm.checkpoint import distributed as checkpoint
    from megavlm.data.batch import Pack
    from megavlm.data.device_batch import make_batch
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
            batch = make_batch(pack, torch.zeros(0, 3, side, side, dtype=torch.uint8), torch.device("cpu"))
            start = time.process_time()  # one thread: what others do on the machine counts less
            training.scheduler.step(1)
            train_step(training.chunks, training.optimizer, [batch], num_sources=1)
            seconds.append(time.process_time() - start)
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


def qwen_vl_recipe(kind: str, tokens: int, *, tiny: bool, recompute: str = "selective") -> Any:
    """Return the shipped recipe on one GPU, with the authors' batch."""
    from megavlm.config.load import load_recipe
    from megavlm.families.presets import expand_presets

    name, more = QWEN_VL[kind]
    words = [
        "parallel.tensor_model_parallel_size=1", "parallel.sequence_parallel=false", f"data.sequence_length={tokens}",
        f"training.global_batch_size={ACCUMULATION}", f"parallel.recompute_granularity={recompute}", *more,
        *(TINY if tiny else []),
    ]  # fmt: skip
    return load_recipe(name, words, expand_presets)


def predicted(recipe: Any) -> dict[str, float]:
    """Return what the planner says of a step on an H100: bytes that the GPU must have, and seconds."""
    from megavlm.planning.gpus import GPUS
    from megavlm.planning.layout import layout_of
    from megavlm.planning.memory import predict
    from megavlm.planning.timing import Timer
    from megavlm.planning.workload import assume_workload

    timer = Timer(recipe, layout_of(recipe, 1), GPUS["h100-80g"], assume_workload(recipe, 1, 1, 1))
    stage = predict(recipe, 1, images_per_pack=1, most_images=1)[0]
    return {"predicted": stage.total, "predicted_seconds": timer.step().step}


def sample(recipe: Any, tokens: int, seed: int) -> Any:
    """Return a micro-batch of one sample with one picture on the device."""
    import numpy as np
    import torch

    from megavlm.data.batch import Pack
    from megavlm.data.device_batch import make_batch
    from megavlm.parallel.device import local_device

    rng = np.random.default_rng(seed)
    words = recipe.model.language.vocab_size - 300  # what lies above are Qwen's special tokens
    ids = rng.integers(0, words, size=tokens + 1)
    slots = slice(2, 2 + recipe.model.tokens_per_view)
    labels = ids[1:].copy()
    ids[slots] = words
    labels[: slots.stop] = -100
    side = recipe.model.vision.image_size
    pack = Pack(
        tokens=ids[:-1], labels=labels, position_ids=np.arange(tokens), cu_seqlens=np.array([0, tokens], np.int32),
        segment_sources=np.array([0], np.int32), images=[b""], sample_keys=[],
    )  # fmt: skip
    pixels = rng.integers(0, 256, (1, 3, side, side), dtype=np.uint8)
    return make_batch(pack, torch.from_numpy(pixels).to(local_device()), local_device())


def quantise_random(language: Any) -> None:
    """Give the layers that wait for weights in 4 bits random ones."""
    import torch

    from megavlm.architectures.adapters import frozen_linears
    from megavlm.layers.lora import FrozenColumnParallelLinear
    from megavlm.layers.nf4 import quantise
    from megavlm.parallel.device import local_device

    for _, _, linear in frozen_linears(language):
        if linear.quantize:
            shape, column = (linear.output_size, linear.input_size), isinstance(linear, FrozenColumnParallelLinear)
            weight = torch.randn(shape, dtype=linear.config.params_dtype, device=local_device()) * 0.02
            linear.nf4 = quantise(weight, [(0, shape[0 if column else 1])], transposed=not column)


def measure_qwen_vl(
    kind: str, lengths: list[int], steps: int, *, tiny: bool, recompute: str = "selective"
) -> list[dict[str, Any]]:
    """Train steps of every length in this process; return what was seen and predicted, memory in bytes."""
    from megavlm.parallel.device import prepare_device

    prepare_device()
    import torch

    from megavlm.parallel.device import has_cuda
    from megavlm.parallel.state import process_groups
    from megavlm.training.build import build_training
    from megavlm.training.step import train_step

    cuda = torch.cuda if has_cuda() else None
    rows = []
    recipe = qwen_vl_recipe(kind, lengths[0], tiny=tiny, recompute=recompute)
    with process_groups(recipe.parallel, 1):
        training = build_training(recipe, recipe.model.language.vocab_size - 300)
        for module in training.modules:
            quantise_random(module.language)
        for tokens in lengths:
            row: dict[str, Any] = {"kind": kind, "tokens": tokens}
            row |= predicted(qwen_vl_recipe(kind, tokens, tiny=tiny, recompute=recompute))
            rows.append(row)
            if cuda is not None:
                cuda.empty_cache()
                cuda.reset_peak_memory_stats()
            seconds = []
            try:
                for step in range(steps + 1):  # the first is left out
                    batches = [sample(recipe, tokens, step * ACCUMULATION + i) for i in range(ACCUMULATION)]
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                    training.scheduler.step(1)
                    loss = train_step(training.chunks, training.optimizer, batches, num_sources=1).loss
                    torch.cuda.synchronize()
                    seconds.append(time.perf_counter() - start)
            except torch.OutOfMemoryError:
                row["error"] = "out of memory"
                break
            row |= {"seconds": statistics.median(seconds[1:]), "loss": loss}
            if cuda is not None:
                row |= {"allocated": cuda.max_memory_allocated(), "reserved": cuda.max_memory_reserved()}
    return rows


def qwen_vl_table(rows: list[dict[str, Any]]) -> str:
    """Return the table beside the authors' figures."""

    def gb(row: dict[str, Any], name: str) -> str:
        return f"{row[name] / 1e9:.1f}" if name in row else "-"

    lines = [
        "| | tokens | GB: tensors | reserved | predicted | s/step | predicted | A100's GB | A100's s/step |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        theirs = A100[row["kind"]].get(row["tokens"], ("-", "-"))
        memory = " | ".join(gb(row, name) for name in ("allocated", "reserved", "predicted"))
        seconds = f"{row['seconds']:.2f}" if "seconds" in row else row.get("error", "-")
        seconds += f" | {row['predicted_seconds']:.2f}" if "predicted_seconds" in row else " | -"
        lines.append(f"| {row['kind']} | {row['tokens']} | {memory} | {seconds} | {theirs[0]} | {theirs[1]} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--qwen-vl", action="store_true", help="LoRA and Q-LoRA of Qwen-VL at its full size, on a GPU")
    parser.add_argument("--lengths", type=int, nargs="+", default=[384, 512, 1024, 2048], help="tokens of a sample")
    parser.add_argument("--dry-run-cpu", action="store_true", help="with --qwen-vl: a tiny model, to try the script")
    parser.add_argument("--recompute", choices=("selective", "full"), default="selective", help="with --qwen-vl")
    parser.add_argument("--predict", action="store_true", help="with --qwen-vl: only what the planner says")
    parser.add_argument("--timeout", type=float, default=300, help="with --qwen-vl: seconds that a kind may take")
    parser.add_argument("--kind", choices=tuple(QWEN_VL), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.kind:
        rows = measure_qwen_vl(args.kind, args.lengths, args.steps, tiny=args.dry_run_cpu, recompute=args.recompute)
        print(json.dumps(rows))
        return
    if args.qwen_vl:
        qwen_vl(args)
        return
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
    print("| | learns | weights | gradients | optimizer | peak memory | CPU s/step | time | memory |")
    print("|---|---|---|---|---|---|---|---|---|")
    for mode, one in best.items():
        sizes = " | ".join(f"{one[key] / 2**20:.1f} MiB" for key in ("weights", "gradients", "optimizer", "peak"))
        ratios = " | ".join(f"{one[key] / best['full'][key]:.2f}x" for key in ("seconds", "peak"))
        print(f"| {mode} | {one['learning'] / 1e6:.2f} M | {sizes} | {one['seconds']:.2f} | {ratios} |")


def _rows_of(command: list[str], kind: str, tokens: int, timeout: float) -> list[dict[str, Any]]:
    """Run a kind and return its rows; one that fails, or takes too long, is a row as well."""
    env = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "CUDA_DEVICE_MAX_CONNECTIONS": "1", **os.environ}
    try:
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True, timeout=timeout, env=env)
    except subprocess.TimeoutExpired:
        return [{"kind": kind, "tokens": tokens, "error": f"longer than {timeout:.0f} s"}]
    if done.returncode:
        return [{"kind": kind, "tokens": tokens, "error": f"failed ({done.returncode})"}]
    return list(json.loads(done.stdout.splitlines()[-1]))


def qwen_vl(args: argparse.Namespace) -> None:
    """Measure each kind in a process of its own, and print the table."""
    import torch

    lengths, steps, tiny = args.lengths, args.steps, args.dry_run_cpu
    if args.predict:
        recipes = {
            (kind, tokens): qwen_vl_recipe(kind, tokens, tiny=tiny, recompute=args.recompute)
            for kind in QWEN_VL
            for tokens in lengths
        }
        print(qwen_vl_table([{"kind": k, "tokens": t, **predicted(one)} for (k, t), one in recipes.items()]))
        return
    if not tiny and not torch.cuda.is_available():
        sys.exit("--qwen-vl: needs a GPU with 80 GB; add --dry-run-cpu to try the script with a tiny model")
    rows = []
    for kind in QWEN_VL:
        command = [sys.executable, __file__, f"--kind={kind}", f"--steps={steps}", "--lengths", *map(str, lengths)]
        command.append(f"--recompute={args.recompute}")
        command += ["--dry-run-cpu"] if tiny else []
        own = _rows_of(command, kind, lengths[0], args.timeout)
        rows += own
        print(qwen_vl_table(own), file=sys.stderr, flush=True)  # what follows may be cut off
    name = "a tiny model on this CPU" if tiny else torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}; 1 sample with an image, accumulation {ACCUMULATION}, {steps} steps\n")
    print(qwen_vl_table(rows))


if __name__ == "__main__":
    main()
