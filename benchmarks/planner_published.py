"""The planner's model of time against published training runs: tokens/s predicted beside tokens/s published.

``python benchmarks/planner_published.py`` prints the table of docs/planning.md. A row is a dense model on a TP x PP
layout, or on one GPU, whose layout, batch and lengths its source names. Of the rows on H100s every second one was
fitted on, in the order of ``ROWS``; the rest of them, and all rows on other GPUs, are what the error is reported on.
``--fit`` fits the efficiencies of ``FITTED`` again, on that half alone. No constant belongs to a row: what differs
between rows is model, layout, batch, number format and GPU.

The models are language models, or trained as such: the recipe has a small frozen tower to which no picture comes.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from megavlm.config.schema import Recipe
from megavlm.families.presets import expand_presets
from megavlm.planning.gpus import Gpu, find_gpu
from megavlm.planning.layout import layout_of
from megavlm.planning.seconds import StepTime
from megavlm.planning.timing import Timer
from megavlm.planning.workload import Workload

FITTED = {"fp8_gemm": (0.45, 0.75), "attention": (0.3, 0.7)}
"""Efficiencies of Hopper that are fitted, and between what."""
FITTED_GPU = "h100-80g"
SAMPLES = 20
"""Samples of a pack of 4096 tokens of SQuAD: some 200 tokens each."""


@dataclass(frozen=True)
class Shape:
    """A language model."""

    layers: int
    hidden: int
    ffn: int
    """Width of a gated MLP; of one that is not gated two thirds of its width, which are as many weights."""
    heads: int
    groups: int
    vocabulary: int
    channels: int | None = None


def _ungated(width: int) -> int:
    """Return the width of the gated MLP that has the weights of one that is not gated."""
    return round(width * 2 / 3 / 64) * 64


# Dimensions: the models' config.json; GPT-3 and Nemotron: NeMo's recipes (the operations per token that follow from the
# published TFLOP/s and tokens/s are theirs within 1 %, which a test holds).
MODELS = {
    "Llama 3 8B": Shape(32, 4096, 14336, 32, 8, 128256),
    "Llama 3 70B": Shape(80, 8192, 28672, 64, 8, 128256),
    "Llama 2 7B": Shape(32, 4096, 11008, 32, 32, 32000),
    "Llama 2 13B": Shape(40, 5120, 13824, 40, 40, 32000),
    "Llama 2 70B": Shape(80, 8192, 28672, 64, 8, 32000),
    "GPT-3 5B": Shape(24, 4096, _ungated(4 * 4096), 32, 32, 51200),
    "GPT-3 20B": Shape(44, 6144, _ungated(4 * 6144), 48, 48, 51200),
    "GPT-3 175B": Shape(96, 12288, _ungated(4 * 12288), 96, 96, 51200),
    "Nemotron 8B": Shape(32, 4096, _ungated(4 * 4096), 32, 32, 256000),
    "Nemotron 22B": Shape(40, 6144, _ungated(4 * 6144), 48, 48, 256000),
    "Nemotron 340B": Shape(96, 18432, _ungated(4 * 18432), 96, 8, 256000),
    "Qwen2.5 7B": Shape(28, 3584, 18944, 28, 4, 152064),
    "Qwen2.5-VL 7B": Shape(28, 3584, 18944, 28, 4, 152064),
    "Qwen2.5 14B": Shape(48, 5120, 13824, 40, 8, 152064),
}


@dataclass(frozen=True)
class Row:
    """One published run."""

    source: str
    model: str
    task: str
    """pre-training, SFT (all weights learn) or LoRA."""
    gpus: int
    batch: int
    """Sequences of a step."""
    micro: int
    """Sequences of a micro-batch."""
    length: int
    tp: int
    pp: int
    vpp: int | None
    published: float
    """Tokens per second and GPU."""
    tflops: float | None = None
    """Published TFLOP/s of a GPU."""
    fp8: str | None = "tensorwise"
    """How FP8 is scaled; None for BF16."""
    gpu: str = "h100-80g"
    samples: int = 1
    """Samples of a sequence."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    rank: int = 16
    dropout: float = 0.0
    recompute: str | None = None
    overlap: bool = False
    """Tensor-parallel collectives under the products (user buffers), as the source's recipe says."""

    @property
    def layout(self) -> str:
        """TP x PP x VPP x DP."""
        return f"{self.tp} x {self.pp} x {self.vpp or '-'} x {self.gpus // (self.tp * self.pp)}"


_ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_BRIDGE, _NEMO, _AUTOMODEL, _SWIFT = "Megatron Bridge", "NeMo 24.07", "Automodel", "ms-swift"
_NEMO_KEYS: dict[str, Any] = {"source": _NEMO, "fp8": "delayed", "overlap": True}
_BRIDGE_KEYS: dict[str, Any] = {"source": _BRIDGE, "overlap": True}


def _pre(model: str, gpus: int, batch: int, micro: int, length: int, *rest: Any, **more: Any) -> Row:
    tp, pp, vpp, published, tflops = rest
    return Row(
        model=model, task="pre-training", gpus=gpus, batch=batch, micro=micro, length=length, tp=tp, pp=pp, vpp=vpp,
        published=published, tflops=tflops, **more,
    )  # fmt: skip


def _tuned(model: str, task: str, gpus: int, *rest: Any, **more: Any) -> Row:
    """Return a run on packs of SQuAD."""
    tp, pp, vpp, published, tflops = rest
    return Row(
        model=model, task=task, gpus=gpus, batch=32, micro=1, length=4096, samples=SAMPLES, tp=tp, pp=pp, vpp=vpp,
        published=published, tflops=tflops, **more,
    )  # fmt: skip


_GB200: dict[str, Any] = {**_BRIDGE_KEYS, "gpu": "gb200"}

ROWS = (
    _pre("Llama 3 70B", 64, 256, 1, 8192, 4, 8, 5, 1664, 731, **_BRIDGE_KEYS),
    _pre("Llama 3 70B", 64, 128, 1, 8192, 4, 8, 5, 1602, 719, **_BRIDGE_KEYS),
    _tuned("Llama 3 70B", "SFT", 32, 4, 4, 5, 1638, 710, **_BRIDGE_KEYS),
    _tuned("Llama 3 70B", "LoRA", 8, 2, 4, 20, 2643, 735, **_BRIDGE_KEYS),
    Row(_AUTOMODEL, "Llama 3 8B", "LoRA", 1, 32, 2, 4096, 1, 1, None, 12472.87, 402, None, targets=_ALL, dropout=0.1),
    Row(_AUTOMODEL, "Qwen2.5 7B", "LoRA", 1, 32, 2, 4096, 1, 1, None, 14110.05, 423, None, targets=_ALL),
    _pre("GPT-3 5B", 64, 2048, 4, 2048, 1, 1, None, 22521, 736, **_NEMO_KEYS),
    _pre("GPT-3 20B", 64, 256, 2, 2048, 2, 1, None, 5851, 750, **_NEMO_KEYS),
    _pre("GPT-3 175B", 128, 256, 1, 2048, 4, 8, 6, 726, 782, **_NEMO_KEYS),
    _pre("GPT-3 175B", 512, 2048, 2, 2048, 4, 8, 6, 782, 842, **_NEMO_KEYS),
    _pre("Llama 2 7B", 8, 128, 1, 4096, 1, 1, None, 16847, 776, **_NEMO_KEYS),
    _pre("Llama 2 13B", 16, 128, 1, 4096, 1, 4, 10, 8646, 754, **_NEMO_KEYS),
    _pre("Llama 2 70B", 64, 128, 1, 4096, 4, 4, 20, 1707, 759, **_NEMO_KEYS),
    _pre("Nemotron 8B", 64, 256, 4, 4096, 2, 1, None, 12701, 653, **_NEMO_KEYS),
    _pre("Nemotron 22B", 64, 256, 2, 4096, 2, 4, 10, 4256, 554, **_NEMO_KEYS),
    _pre("Nemotron 340B", 128, 32, 1, 4096, 8, 8, 12, 322, 678, **_NEMO_KEYS),
    _tuned("Llama 2 7B", "SFT", 8, 1, 1, None, 17120, 682, **_NEMO_KEYS),
    _tuned("Llama 2 7B", "LoRA", 8, 1, 1, None, 25206, 673, **_NEMO_KEYS),
    _tuned("Llama 2 13B", "LoRA", 8, 1, 1, None, 14161, 733, **_NEMO_KEYS),
    Row(
        _SWIFT, "Qwen2.5 14B", "SFT", 8, 16, 1, 8192, 4, 1, None, 16 * 8192 / 9.04 / 8, gpu="a800-80g", fp8=None,
        recompute="selective",
    ),
    Row(
        _SWIFT, "Qwen2.5-VL 7B", "SFT", 2, 4, 1, 2048, 2, 1, None, 4 * 2048 / 4.1 / 2, gpu="a100-80g", fp8=None,
        samples=10, recompute="full",
    ),
    _pre("Llama 3 8B", 8, 128, 2, 8192, 1, 1, None, 30624, 1576, gpu="b200", **_BRIDGE_KEYS),
    _pre("Llama 3 8B", 8, 128, 2, 8192, 1, 1, None, 31508, 1622, **_GB200),
    _pre("Llama 3 70B", 64, 256, 1, 8192, 2, 4, 5, 3712, 1664, **{**_GB200, "fp8": "mxfp8"}),
    _tuned("Llama 3 70B", "SFT", 32, 1, 8, 10, 3864, 1671, **_GB200),
    _tuned("Llama 3 70B", "LoRA", 8, 1, 2, 20, 6206, 1731, **_GB200),
)  # fmt: skip


def recipe_of(row: Row) -> Recipe:
    """Return the run as a recipe of megavlm."""
    shape = MODELS[row.model]
    frozen = {"freeze": True}
    sequence_parallel, data = row.tp > 1, row.gpus // (row.tp * row.pp)
    tree: dict[str, Any] = {
        "output_dir": "unused",
        "model": {
            "vision": {"preset": "tiny_vit", "num_attention_heads": 8},
            "connector": {"preset": "linear"},
            "language": {
                "preset": "llama2_7b", "num_layers": shape.layers, "hidden_size": shape.hidden,
                "ffn_hidden_size": shape.ffn, "num_attention_heads": shape.heads, "num_query_groups": shape.groups,
                "kv_channels": shape.channels or shape.hidden // shape.heads, "vocab_size": shape.vocabulary,
                "max_position_embeddings": row.length,
            },
        },
        "parallel": {
            "tensor_model_parallel_size": row.tp, "pipeline_model_parallel_size": row.pp,
            "virtual_pipeline_model_parallel_size": row.vpp, "sequence_parallel": sequence_parallel,
            "recompute_granularity": row.recompute, "overlap_grad_reduce": data > 1, "overlap_param_gather": data > 1,
        },
        "engine": {
            "fp8": "hybrid" if row.fp8 else None, "fp8_recipe": row.fp8 or "tensorwise",
            "tp_comm_overlap": row.overlap and row.tp > 1,
        },
        "data": {"train": [{"path": "unused"}], "tokenizer": "unused", "sequence_length": row.length},
        "modules": {"vision": frozen, "connector": frozen},
        "optimizer": {"lr": 1e-4},
        "training": {"train_steps": 1, "global_batch_size": row.batch // row.micro, "precision": "bf16"},
    }  # fmt: skip
    if row.task == "LoRA":
        tree["lora"] = {"rank": row.rank, "targets": row.targets, "dropout": row.dropout}
    return TypeAdapter(Recipe).validate_python(expand_presets(tree))


def gpu_of(row: Row) -> Gpu:
    """Return the GPU: an A800 is an A100 whose NVLink was cut to 400 GB/s both ways."""
    if row.gpu == "a800-80g":
        return dataclasses.replace(find_gpu("a100-80g"), name=row.gpu, nvlink=200e9)
    return find_gpu(row.gpu)


def predict(row: Row, **efficiencies: float) -> StepTime:
    """Return the predicted step; ``efficiencies`` take the place of Hopper's."""
    recipe, gpu = recipe_of(row), gpu_of(row)
    if efficiencies and gpu.name == "h100-80g":
        gpu = dataclasses.replace(gpu, efficiency=dataclasses.replace(gpu.efficiency, **efficiencies))
    load = Workload(
        tokens=row.micro * row.length, images=0.0, views=0.0, most_views=0, samples=float(row.micro * row.samples)
    )
    return Timer(recipe, layout_of(recipe, row.gpus), gpu, load).step()


def tokens_per_second(row: Row, time: StepTime) -> float:
    """Return the predicted tokens per second and GPU."""
    return row.batch * row.length / time.step / row.gpus


def error(row: Row, **efficiencies: float) -> float:
    """Return predicted over published, less one."""
    return tokens_per_second(row, predict(row, **efficiencies)) / row.published - 1


def on_fitted_gpu() -> list[Row]:
    """Return the rows on the GPU whose efficiencies are fitted."""
    return [row for row in ROWS if row.gpu == FITTED_GPU]


def fitted_half() -> list[Row]:
    """Return the rows that efficiencies were fitted on."""
    return on_fitted_gpu()[::2]


def held_out() -> list[Row]:
    """Return the others."""
    half = fitted_half()
    return [row for row in ROWS if row not in half]


def loss(rows: Iterable[Row], **efficiencies: float) -> float:
    """Return the sum of the squares of the logarithms of predicted over published."""
    return sum(math.log1p(error(row, **efficiencies)) ** 2 for row in rows)


def fit(rows: Sequence[Row]) -> dict[str, float]:
    """Return the efficiencies, to the hundredth, that no change of one of them makes better."""
    best = {name: round((low + high) / 2, 2) for name, (low, high) in FITTED.items()}
    least = loss(rows, **best)
    moved = True
    while moved:
        moved = False
        for name, (low, high) in FITTED.items():
            for step in (0.01, -0.01):
                while low <= (value := round(best[name] + step, 2)) <= high:
                    found = loss(rows, **{**best, name: value})
                    if found >= least:
                        break
                    best, least, moved = {**best, name: value}, found, True
    return best


def median(rows: Iterable[Row], **efficiencies: float) -> float:
    """Return the median of the errors' sizes."""
    return statistics.median(abs(error(row, **efficiencies)) for row in rows)


def table() -> str:
    """Return the table of docs/planning.md, and what comes of it."""
    half = fitted_half()
    lines = [
        "| source | model, task | GPUs | TP x PP x VPP x DP | sequences | published | predicted | error | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        predicted = tokens_per_second(row, predict(row))
        name = row.gpu.partition("-")[0].upper()
        form = "BF16" if row.fp8 is None else "MXFP8" if row.fp8 == "mxfp8" else "FP8"
        lines.append(
            f"| {row.source} | {row.model} {row.task} | {row.gpus} {name}, {form} | {row.layout} |"
            f" {row.batch} of {row.length} | {row.published:,.0f} | {predicted:,.0f} |"
            f" {100 * (predicted / row.published - 1):+.0f} % | {'fitted' if row in half else ''} |"
        )
    others = held_out()
    worst = max(others, key=lambda row: abs(error(row)))
    lines += [
        "",
        f"Median error: {100 * median(half):.1f} % of the {len(half)} rows that were fitted on,"
        f" {100 * median(others):.1f} % of the {len(others)} others"
        f" ({100 * median(row for row in others if row.gpu == FITTED_GPU):.1f} % on H100s,"
        f" {100 * median(row for row in others if row.gpu != FITTED_GPU):.1f} % on other GPUs);"
        f" the largest is {100 * error(worst):+.0f} % ({worst.model} {worst.task}, {worst.source}).",
    ]
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> None:
    """Print the table, or fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true", help="fit the efficiencies again and print them")
    if not parser.parse_args(words).fit:
        print(table())
        return
    own = [row for row in on_fitted_gpu() if row.source == _NEMO]
    for name, rows in (("every second row", fitted_half()), (f"the rows of {_NEMO}", own)):
        found = fit(rows)
        others = [row for row in on_fitted_gpu() if row not in rows]
        print(
            f"fitted on {name}: {found}; median error {100 * median(rows, **found):.1f} %,"
            f" of the other rows on H100s {100 * median(others, **found):.1f} %"
        )


if __name__ == "__main__":
    main()
