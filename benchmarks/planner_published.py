"""The planner's model of time against published training runs: tokens/s predicted beside tokens/s published.

``python benchmarks/planner_published.py`` prints the tables of docs/planning.md. A row is a model on a TP x PP
layout, or on one GPU, whose layout, batch and lengths its source names; with CP, or with experts on EP. Of the dense
rows on H100s every second one was fitted on, in the order of ``DENSE_ROWS``, and then of those with experts; the rest
of them, all rows with CP and all rows on other GPUs are what the error is reported on. ``--fit`` fits the
efficiencies of ``FITTED`` and ``FITTED_EXPERTS`` again, on those halves alone. No constant belongs to a row: what
differs between rows is model, layout, batch, number format and GPU.

The models are language models, or trained as such: the recipe has a small frozen tower to which no picture comes.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from megavlm.config.schema import Recipe
from megavlm.families.presets import expand_presets
from megavlm.planning.gpus import Gpu, find_gpu
from megavlm.planning.layout import Layout, layout_of
from megavlm.planning.seconds import StepTime
from megavlm.planning.timing import Timer
from megavlm.planning.workload import Workload

Bounds = dict[str, tuple[float, float, float]]
FITTED: Bounds = {"fp8_gemm": (0.45, 0.75, 0.01), "attention": (0.3, 0.7, 0.01)}
"""Efficiencies of Hopper that are fitted on dense models, between what, and to what step."""
FITTED_EXPERTS: Bounds = {"expert_layer": (0.0, 3e-3, 1e-4)}
"""What is then fitted on models with experts."""
FITTED_GPU = "h100-80g"
HOPPERS = (FITTED_GPU, "h800-80g")
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
    experts: int | None = None
    """Experts of each layer; ``ffn`` is then the width of one."""
    topk: int = 0
    """Experts that a token is sent to."""
    window: int | None = None
    """Sliding window of every other layer."""


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
    "Llama 3.1 405B": Shape(126, 16384, 53248, 128, 8, 128256),
    "Qwen3 30B-A3B": Shape(48, 2048, 768, 32, 4, 151936, 128, experts=128, topk=8),
    "Qwen3 235B-A22B": Shape(94, 4096, 1536, 64, 4, 151936, 128, experts=128, topk=8),
    "GPT-OSS 120B": Shape(36, 2880, 2880, 64, 8, 201088, 64, experts=128, topk=4, window=128),
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
    cp: int = 1
    ep: int = 1
    dispatch: str = ""
    """How tokens are sent to experts and what hides it, where that is nothing that megavlm has; such rows are not
    fitted on."""
    ends: bool = False
    """The embedding and the output layer stand for a layer each where stages get theirs (126 layers as 128)."""

    @property
    def layout(self) -> str:
        """TP x PP x VPP x DP, and what else there is."""
        own = f"{self.tp} x {self.pp} x {self.vpp or '-'} x {self.data}"
        return own + f", CP {self.cp}" * (self.cp > 1) + f", EP {self.ep}" * (self.ep > 1)

    @property
    def data(self) -> int:
        """Replicas."""
        return self.gpus // (self.tp * self.pp * self.cp)


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

DENSE_ROWS = (
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
    Row(
        _SWIFT, "Qwen2.5-VL 7B", "LoRA", 2, 4, 1, 2048, 2, 1, None, 4 * 2048 / 3.8 / 2, gpu="a100-80g", fp8=None,
        samples=10, recompute="full", targets=_ALL, rank=8,
    ),
    _pre("Llama 3 8B", 8, 128, 2, 8192, 1, 1, None, 30624, 1576, gpu="b200", **_BRIDGE_KEYS),
    _pre("Llama 3 8B", 8, 128, 2, 8192, 1, 1, None, 31508, 1622, **_GB200),
    _pre("Llama 3 70B", 64, 256, 1, 8192, 2, 4, 5, 3712, 1664, **{**_GB200, "fp8": "mxfp8"}),
    _tuned("Llama 3 70B", "SFT", 32, 1, 8, 10, 3864, 1671, **_GB200),
    _tuned("Llama 3 70B", "LoRA", 8, 1, 2, 20, 6206, 1731, **_GB200),
)  # fmt: skip

_CP: dict[str, Any] = {**_BRIDGE_KEYS, "cp": 2, "ends": True}
_X: dict[str, Any] = {"source": "xtuner", "gpu": "h800-80g", "fp8": None, "ep": 8, "ends": True}
_ZOO: dict[str, Any] = {"source": "MoE ModelZoo", "fp8": None, "ep": 8, "ends": True}
_BRIDGE_MOE: dict[str, Any] = {"source": _BRIDGE}
_OVERLAPPED: dict[str, Any] = {"source": _BRIDGE, "ep": 32, "dispatch": "overlapped"}
_B200: dict[str, Any] = {"gpu": "b200", "fp8": "mxfp8"}


def _xtuner(batch: int, micro: int, tp: int, pp: int, vpp: int | None, published: float, **more: Any) -> Row:
    return _pre("Qwen3 235B-A22B", 256, batch, micro, 4096, tp, pp, vpp, published, None, **{**_X, **more})


CONTEXT_ROWS = (
    _pre("Llama 3 8B", 8, 128, 1, 8192, 1, 1, None, 12036, 697, **{**_NEMO_KEYS, "cp": 2}),
    _pre("Llama 3 70B", 64, 128, 1, 8192, 4, 4, 5, 1533, 738, **{**_NEMO_KEYS, "cp": 2}),
    _pre("Llama 3.1 405B", 1024, 512, 1, 8192, 8, 8, 8, 292, 737, **_CP),
    _pre("Llama 3.1 405B", 1024, 1536, 1, 8192, 8, 8, 8, 326, 822, **_CP),
    _pre("Llama 3.1 405B", 128, 64, 1, 8192, 4, 8, 8, 661, 1667, gpu="b200", **_CP),
)
EXPERT_ROWS = (
    _pre("Qwen3 30B-A3B", 16, 1024, 1, 4096, 1, 1, None, 8826, 203, ep=16, dispatch="HybridEP", **_BRIDGE_MOE),
    _pre("GPT-OSS 120B", 64, 1280, 1, 4096, 1, 4, None, 5824, 158, fp8=None, ep=8, **_BRIDGE_MOE),
    _pre("Qwen3 235B-A22B", 256, 8192, 1, 4096, 2, 8, 4, 1712, 253, ends=True, **_OVERLAPPED),
    _pre("Qwen3 30B-A3B", 16, 1024, 1, 4096, 1, 2, 12, 9058, 208, ep=8, **_BRIDGE_MOE),
    _pre("GPT-OSS 120B", 64, 512, 4, 4096, 1, 4, None, 5630, 153, fp8=None, ep=8, **_BRIDGE_MOE),
    _pre("Qwen3 30B-A3B", 16, 512, 2, 4096, 1, 2, 24, 5275, 121, ep=8, **_BRIDGE_MOE),
    _pre("Qwen3 235B-A22B", 256, 2048, 1, 4096, 2, 8, 4, 1575, 233, ends=True, **_OVERLAPPED),
    _pre("Qwen3 235B-A22B", 64, 1024, 1, 4096, 1, 8, 2, 3269, 484, ep=8, ends=True, **{**_BRIDGE_MOE, **_B200}),
    _pre("Qwen3 235B-A22B", 256, 2048, 1, 4096, 2, 32, 3, 2048 * 4096 / 24.2 / 256, 200, **_ZOO),
    _xtuner(2048, 1, 2, 32, 3, 1461.56),
    _xtuner(2048, 1, 4, 8, 4, 923.53),
    _xtuner(2048, 1, 2, 8, 4, 925.87, ep=32),
    _xtuner(2048, 1, 2, 8, None, 1104.8),
    _xtuner(2048, 1, 2, 8, None, 1119.26, overlap=True),
    _xtuner(4096, 4, 2, 32, 3, 1506.76, recompute="full"),
    _xtuner(8192, 4, 2, 32, None, 1414.68, recompute="full"),
    _xtuner(4096, 4, 1, 32, 3, 1540.68, recompute="full"),
    _xtuner(8192, 8, 1, 32, 3, 1520.8, recompute="full"),
)
"""Experts; in the order of their pages, each layout's newest figure. xtuner's recomputation of norms and activations is
left out, as little work."""
ROWS = DENSE_ROWS + CONTEXT_ROWS + EXPERT_ROWS


def recipe_of(row: Row) -> Recipe:
    """Return the run as a recipe of megavlm."""
    shape = MODELS[row.model]
    frozen = {"freeze": True}
    sequence_parallel, shards = row.tp > 1, row.data * row.cp
    experts = {
        "num_moe_experts": shape.experts, "moe_router_topk": shape.topk, "moe_ffn_hidden_size": shape.ffn,
    } if shape.experts else {}  # fmt: skip
    window = {"sliding_window": shape.window, "sliding_window_pattern": 2} if shape.window else {}
    tree: dict[str, Any] = {
        "output_dir": "unused",
        "model": {
            "vision": {"preset": "tiny_vit", "num_attention_heads": 8},
            "connector": {"preset": "linear"},
            "language": {
                "preset": "llama2_7b", "num_layers": shape.layers, "hidden_size": shape.hidden,
                "ffn_hidden_size": shape.ffn, "num_attention_heads": shape.heads, "num_query_groups": shape.groups,
                "kv_channels": shape.channels or shape.hidden // shape.heads, "vocab_size": shape.vocabulary,
                "max_position_embeddings": row.length, **experts, **window,
            },
        },
        "parallel": {
            "tensor_model_parallel_size": row.tp, "pipeline_model_parallel_size": row.pp,
            "virtual_pipeline_model_parallel_size": row.vpp, "sequence_parallel": sequence_parallel,
            "recompute_granularity": row.recompute, "overlap_grad_reduce": shards > 1,
            "overlap_param_gather": shards > 1,
            "context_parallel_size": row.cp, "expert_model_parallel_size": row.ep,
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


def whole_layout(row: Row, recipe: Recipe) -> Layout:
    """Return where the recipe runs; megavlm's own recipes have no ``ends``."""
    if not row.ends:
        return layout_of(recipe, row.gpus)
    count = row.pp * (row.vpp or 1)
    even = dataclasses.replace(recipe.model.language, num_layers=recipe.model.language.num_layers + 2)
    layout = layout_of(dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, language=even)), row.gpus)
    fewer = {0: 1, count - 1: 1}
    chunks = [dataclasses.replace(one, layers=one.layers - fewer.get(one.index, 0)) for one in layout.chunks]
    begins = [sum(one.layers for one in chunks[:number]) for number in range(count)]
    own = tuple(dataclasses.replace(one, begin=begin) for one, begin in zip(chunks, begins, strict=True))
    return dataclasses.replace(layout, chunks=own)


def gpu_of(row: Row) -> Gpu:
    """Return the GPU: an A800 or H800 is an A100 or H100 whose NVLink was cut to 400 GB/s both ways."""
    if row.gpu in ("a800-80g", "h800-80g"):
        return dataclasses.replace(find_gpu(row.gpu.replace("800", "100")), name=row.gpu, nvlink=200e9)
    return find_gpu(row.gpu)


def predict(row: Row, **efficiencies: float) -> StepTime:
    """Return the predicted step; ``efficiencies`` take the place of Hopper's."""
    recipe, gpu = recipe_of(row), gpu_of(row)
    if efficiencies and gpu.name in HOPPERS:
        gpu = dataclasses.replace(gpu, efficiency=dataclasses.replace(gpu.efficiency, **efficiencies))
    load = Workload(
        tokens=row.micro * row.length, images=0.0, views=0.0, most_views=0, samples=float(row.micro * row.samples)
    )
    return Timer(recipe, whole_layout(row, recipe), gpu, load).step(whole=False)


def tokens_per_second(row: Row, time: StepTime) -> float:
    """Return the predicted tokens per second and GPU."""
    return row.batch * row.length / time.step / row.gpus


@functools.cache
def error(row: Row, **efficiencies: float) -> float:
    """Return predicted over published, less one."""
    return tokens_per_second(row, predict(row, **efficiencies)) / row.published - 1


def on_hopper(rows: Iterable[Row]) -> list[Row]:
    """Return those on the GPUs whose efficiencies are fitted, and of what megavlm can do."""
    return [row for row in rows if row.gpu in HOPPERS and not row.dispatch]


def fitted_half() -> list[Row]:
    """Return the rows that efficiencies were fitted on."""
    return on_hopper(DENSE_ROWS)[::2]


def fitted_experts() -> list[Row]:
    """Return the rows that what experts add was fitted on."""
    return on_hopper(EXPERT_ROWS)[::2]


def held_out(rows: Iterable[Row] = ROWS) -> list[Row]:
    """Return the others."""
    half = [*fitted_half(), *fitted_experts()]
    return [row for row in rows if row not in half]


def loss(rows: Iterable[Row], **efficiencies: float) -> float:
    """Return the sum of the squares of the logarithms of predicted over published."""
    return sum(math.log1p(error(row, **efficiencies)) ** 2 for row in rows)


def fit(rows: Sequence[Row], bounds: Bounds) -> dict[str, float]:
    """Return the efficiencies, to their step, that no change of one of them makes better."""
    best = {name: round(round((low + high) / 2 / size) * size, 4) for name, (low, high, size) in bounds.items()}
    least = loss(rows, **best)
    moved = True
    while moved:
        moved = False
        for name, (low, high, size) in bounds.items():
            for step in (size, -size):
                while low <= (value := round(best[name] + step, 4)) <= high:
                    found = loss(rows, **{**best, name: value})
                    if found >= least:
                        break
                    best, least, moved = {**best, name: value}, found, True
    return best


def median(rows: Iterable[Row], **efficiencies: float) -> float:
    """Return the median of the errors' sizes."""
    return statistics.median(abs(error(row, **efficiencies)) for row in rows)


def table(rows: Sequence[Row], half: Sequence[Row]) -> str:
    """Return a table of docs/planning.md, and what comes of it."""
    lines = [
        "| source | model, task | GPUs | TP x PP x VPP x DP | sequences | published | predicted | error | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        off = error(row)
        name = row.gpu.partition("-")[0].upper()
        form = "BF16" if row.fp8 is None else "MXFP8" if row.fp8 == "mxfp8" else "FP8"
        lines.append(
            f"| {row.source} | {row.model} {row.task} | {row.gpus} {name}, {form} | {row.layout} |"
            f" {row.batch} of {row.length} | {row.published:,.0f} | {row.published * (1 + off):,.0f} |"
            f" {100 * off:+.0f} % | {'fitted' if row in half else row.dispatch} |"
        )
    others = held_out(rows)
    hopper = on_hopper(others)
    worst = max(others, key=lambda row: abs(error(row)))
    lines += [
        "",
        "Median error:"
        + (f" {100 * median(half):.1f} % of the {len(half)} rows that were fitted on," if half else "")
        + f" {100 * median(others):.1f} % of the {len(others)} {'others' if half else 'rows'}"
        f" ({100 * median(hopper):.1f} % of the {len(hopper)} on Hopper that megavlm could run as they did);"
        f" the largest is {100 * error(worst):+.0f} % ({worst.model} {worst.task}, {worst.source}).",
    ]
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> None:
    """Print the tables, or fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true", help="fit the efficiencies again and print them")
    if not parser.parse_args(words).fit:
        print(table(DENSE_ROWS, fitted_half()), table(CONTEXT_ROWS, []), sep="\n\n")
        print(f"\n{table(EXPERT_ROWS, fitted_experts())}")
        return
    own = [row for row in on_hopper(DENSE_ROWS) if row.source == _NEMO]
    for name, rows, among, bounds in (
        ("every second row", fitted_half(), DENSE_ROWS, FITTED),
        (f"the rows of {_NEMO}", own, DENSE_ROWS, FITTED),
        ("every second row of experts", fitted_experts(), EXPERT_ROWS, FITTED_EXPERTS),
    ):
        found = fit(rows, bounds)
        others = [row for row in on_hopper(among) if row not in rows]
        print(
            f"fitted on {name}: {found}; median error {100 * median(rows, **found):.1f} %,"
            f" of the other rows on Hopper {100 * median(others, **found):.1f} %"
        )


if __name__ == "__main__":
    main()
