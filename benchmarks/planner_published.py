"""The planner's model of time against published training runs: tokens/s predicted beside tokens/s published.

``python benchmarks/planner_published.py`` prints the tables of docs/planning.md; ``--json`` the same as data.

Each row is a dense model on a TP x PP layout, or on one GPU, that its source names. The rows are taken in the order of
``ROWS``; every second one (1, 3, 5, ...) was fitted on, and the others are what the model of time is reported on.
``--fit`` fits the efficiencies of ``FITTED`` again, on the first half alone. There is no constant that belongs to a row:
what differs between rows is the model, the layout, the batch, the number format and the GPU.

The models are language models without pictures: the recipe is that of a small frozen tower of which no picture comes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from megavlm.config.schema import Recipe
from megavlm.models.registry import expand_presets
from megavlm.planning.flops import count_step
from megavlm.planning.gpus import Efficiency, Gpu, find_gpu
from megavlm.planning.layout import layout_of
from megavlm.planning.timing import StepTime, Timer
from megavlm.planning.workload import Workload

FITTED = {"gemm": (0.5, 0.85), "fp8_gemm": (0.4, 0.75), "attention": (0.3, 0.7)}
"""Efficiencies of Hopper that are fitted, and between what."""
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


# Dimensions: the models' config.json; GPT-3 and Nemotron: NeMo's recipes (the operations per token that follow from the
# published TFLOP/s and tokens/s are theirs within 1 %, which a test holds).
MODELS = {
    "Llama 3 8B": Shape(32, 4096, 14336, 32, 8, 128256),
    "Llama 3 70B": Shape(80, 8192, 28672, 64, 8, 128256),
    "Llama 2 7B": Shape(32, 4096, 11008, 32, 32, 32000),
    "Llama 2 13B": Shape(40, 5120, 13824, 40, 40, 32000),
    "Llama 2 70B": Shape(80, 8192, 28672, 64, 8, 32000),
    "GPT-3 5B": Shape(24, 4096, 4 * 4096 * 2 // 3, 32, 32, 51200),
    "GPT-3 20B": Shape(44, 6144, 4 * 6144 * 2 // 3, 48, 48, 51200),
    "GPT-3 175B": Shape(96, 12288, 4 * 12288 * 2 // 3, 96, 96, 51200),
    "Nemotron 8B": Shape(32, 4096, 4 * 4096 * 2 // 3, 32, 32, 256000),
    "Nemotron 22B": Shape(40, 6144, 4 * 6144 * 2 // 3, 48, 48, 256000),
    "Nemotron 340B": Shape(96, 18432, 4 * 18432 * 2 // 3, 96, 8, 256000),
    "Qwen2.5 7B": Shape(28, 3584, 18944, 28, 4, 152064),
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
    gpu: str = "h100-80g"
    fp8: str | None = "tensorwise"
    samples: int = 1
    """Samples of a sequence."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    rank: int = 16
    recompute: str | None = None
    overlap: bool = False
    """Tensor-parallel collectives under the products (user buffers), as the source's recipe says."""

    @property
    def layout(self) -> str:
        return f"{self.tp} x {self.pp} x {self.vpp or '-'} x {self.gpus // (self.tp * self.pp)}"


_ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_BRIDGE, _NEMO, _AUTOMODEL, _SWIFT = "Megatron Bridge", "NeMo 24.07", "Automodel", "ms-swift"
_NEMO_KEYS: dict[str, Any] = {"source": _NEMO, "fp8": "delayed", "overlap": True}
_BRIDGE_KEYS: dict[str, Any] = {"source": _BRIDGE, "overlap": True}
_TUNED: dict[str, Any] = {"length": 4096, "batch": 32, "micro": 1, "samples": SAMPLES}


def _pre(model: str, gpus: int, batch: int, micro: int, length: int, *rest: Any, **more: Any) -> Row:
    tp, pp, vpp, published, tflops = rest
    return Row(
        model=model, task="pre-training", gpus=gpus, batch=batch, micro=micro, length=length, tp=tp, pp=pp, vpp=vpp,
        published=published, tflops=tflops, **more,
    )  # fmt: skip


ROWS = (
    _pre("Llama 3 70B", 64, 256, 1, 8192, 4, 8, 5, 1664, 731, **_BRIDGE_KEYS),
    _pre("Llama 3 70B", 64, 128, 1, 8192, 4, 8, 5, 1602, 719, **_BRIDGE_KEYS),
    Row(model="Llama 3 70B", task="SFT", gpus=32, tp=4, pp=4, vpp=5, published=1638, tflops=710, **_BRIDGE_KEYS, **_TUNED),
    Row(model="Llama 3 70B", task="LoRA", gpus=8, tp=2, pp=4, vpp=20, published=2643, tflops=735, **_BRIDGE_KEYS, **_TUNED),
    Row(_AUTOMODEL, "Llama 3 8B", "LoRA", 1, 32, 2, 4096, 1, 1, None, 12472.87, 402, fp8=None, targets=_ALL),
    Row(_AUTOMODEL, "Qwen2.5 7B", "LoRA", 1, 32, 2, 4096, 1, 1, None, 14110.05, 423, fp8=None, targets=_ALL),
    Row(
        _SWIFT, "Qwen2.5 14B", "SFT", 8, 16, 1, 8192, 4, 1, None, 16 * 8192 / 9.04 / 8, gpu="a800-80g", fp8=None,
        recompute="selective",
    ),
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
    Row(model="Llama 2 7B", task="SFT", gpus=8, tp=1, pp=1, vpp=None, published=17120, tflops=682, **_NEMO_KEYS, **_TUNED),
    Row(model="Llama 2 7B", task="LoRA", gpus=8, tp=1, pp=1, vpp=None, published=25206, tflops=673, **_NEMO_KEYS, **_TUNED),
    Row(model="Llama 2 13B", task="LoRA", gpus=8, tp=1, pp=1, vpp=None, published=14161, tflops=733, **_NEMO_KEYS, **_TUNED),
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
        tree["lora"] = {"rank": row.rank, "targets": row.targets}
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
        tokens=row.micro * row.length, images=0.0, most_images=0, samples=float(row.micro * row.samples)
    )
    return Timer(recipe, layout_of(recipe, row.gpus), gpu, load).step()


def tokens_per_second(row: Row, time: StepTime) -> float:
    """Return the predicted tokens per second and GPU."""
    return row.batch * row.length / time.step / row.gpus


def error(row: Row, **efficiencies: float) -> float:
    """Return predicted over published, less one."""
    return tokens_per_second(row, predict(row, **efficiencies)) / row.published - 1


if __name__ == "__main__":
    for number, row in enumerate(ROWS):
        t = predict(row)
        p = tokens_per_second(row, t)
        print(f"{number + 1:2} {row.source:16} {row.model:14} {row.task:12} {row.layout:16} {row.published:8.0f} {p:8.0f} {100*(p/row.published-1):+6.1f}% bub {t.bubble:.3f} tp {t.tensor_parallel/t.step:.3f} dpx {t.data_parallel_exposed/t.step:.3f} opt {t.optimizer/t.step:.3f} mfu {t.mfu_conventional:.3f}")
