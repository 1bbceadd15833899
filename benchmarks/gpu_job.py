"""One job of ``gpu_check`` in a process of its own: trains some steps or decodes some images, and writes what it saw.

Arguments: a JSON object with ``kind`` ("train" or "dali") and its settings, and the file to write the result to.
"""

from __future__ import annotations

import io
import json
import sys
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from megavlm.config.schema import Recipe
    from megavlm.training.build import TrainingModel

# The shape of each size: the recipe's model branch, pack length, packs of a step.
SIZES: dict[str, dict[str, Any]] = {
    "small": {
        "model": {
            "preset": "tiny",
            "vision": {"hidden_size": 128, "ffn_hidden_size": 256, "num_layers": 2},
            "connector": {"num_queries": 16, "head_dim": 32},
        },
        "sequence_length": 256,
        "packs": 2,
        "text": (20, 80),
    },
    # ViT-L's width and depth in front of a language model of 16 layers: 0.6 billion parameters.
    "mid": {
        "model": {
            "vision": {
                "preset": "openclip_vit_bigg",
                "hidden_size": 1024,
                "num_layers": 24,
                "ffn_hidden_size": 4096,
                "num_attention_heads": 16,
            },
            "connector": {"preset": "resampler"},
            "language": {
                "preset": "qwen_7b",
                "num_layers": 16,
                "hidden_size": 1024,
                "ffn_hidden_size": 2816,
                "num_attention_heads": 8,
                "num_query_groups": 8,
                "kv_channels": 128,
                "vocab_size": 32000,
            },
        },
        "sequence_length": 2048,
        "packs": 4,
        "text": (60, 300),
    },
}
# On a checkpoint's layout these names are Transformer Engine's, which fuses a norm with the linear after it.
_FUSED_NAMES = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def make_recipe(job: dict[str, Any]) -> Recipe:
    """Return the recipe of a training job."""
    from pydantic import TypeAdapter

    from megavlm.config.schema import Recipe
    from megavlm.models.registry import expand_presets

    size = SIZES[job["size"]]
    tree = {
        "output_dir": "unused",
        "model": size["model"],
        "parallel": {"transformer_impl": job["impl"]},
        "data": {"train": [{"path": "unused"}], "tokenizer": "unused", "sequence_length": size["sequence_length"]},
        "optimizer": {"lr": 1e-4, "weight_decay": 0.1, "schedule": "constant"},
        "training": {"train_steps": 1000, "global_batch_size": size["packs"], "precision": job["precision"]},
    }
    return TypeAdapter(Recipe).validate_python(expand_presets(tree))


def fill_weights(training: TrainingModel) -> int:
    """Give every weight a value that its name alone decides, whatever device and layers; return their number."""
    import torch

    count = 0
    with torch.no_grad():
        for name, parameter in training.modules[0].named_parameters():
            for ours, fused in _FUSED_NAMES.items():
                name = name.replace(ours, fused)
            generator = torch.Generator("cpu").manual_seed(zlib.crc32(name.encode()))
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                values /= parameter[0].numel() ** 0.5  # large enough that the loss depends on every layer
            else:
                values = 0.02 * values + (1.0 if name.endswith("weight") else 0.0)  # a norm, or a bias
            parameter.copy_(values)
            count += parameter.numel()
    training.optimizer.reload_model_params()
    return count


def make_batches(recipe: Recipe, job: dict[str, Any], image_token: int) -> list[list[Any]]:
    """Return the micro-batches of four different steps, on the device: samples of one image and some text."""
    import torch

    from megavlm.data.batch import IGNORE_INDEX
    from megavlm.data.chat import EncodedSample
    from megavlm.data.feed import micro_batch
    from megavlm.data.packing import PackableSample, build_pack
    from megavlm.parallel.device import local_device

    rng = np.random.default_rng(7)
    size, slots = SIZES[job["size"]], recipe.model.tokens_per_image
    side = recipe.model.vision.image_size

    def pack() -> Any:
        samples: list[PackableSample] = []
        room = size["sequence_length"]
        while room > slots + 8:
            text = min(int(rng.integers(*size["text"])), room - slots)
            tokens = np.concatenate([np.full(slots, image_token), rng.integers(0, image_token, text)])
            labels = np.where(np.arange(len(tokens)) < slots + text // 3, IGNORE_INDEX, tokens)
            samples.append(PackableSample(EncodedSample(tokens, labels, 1), (b"",), str(len(samples)), 0))
            room -= len(tokens)
        pixels = rng.integers(0, 256, (len(samples), 3, side, side), dtype=np.uint8)
        return micro_batch(build_pack(samples, size["sequence_length"], 0), torch.from_numpy(pixels), local_device())

    return [[pack() for _ in range(size["packs"])] for _ in range(4)]


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Train ``job["steps"]`` steps; the first ``job["warmup"]`` are not timed."""
    from megavlm.parallel.device import has_cuda, max_memory_gib, prepare_device, synchronize

    prepare_device()
    import torch

    from megavlm.parallel.state import process_groups
    from megavlm.training.build import build_training
    from megavlm.training.step import train_step

    # Plain fp32 on the GPU as well, so that it can be held against the CPU.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    recipe = make_recipe(job)
    image_token = recipe.model.language.vocab_size - 1
    with process_groups(recipe.parallel, recipe.training.seed):
        training = build_training(recipe, image_token)
        parameters = fill_weights(training)
        steps = make_batches(recipe, job, image_token)
        losses, norms, seconds = [], [], []
        for number in range(job["steps"]):
            synchronize()
            start = time.perf_counter()
            training.scheduler.step(1)
            result = train_step(training.chunks, training.optimizer, steps[number % len(steps)], num_sources=1)
            synchronize()
            seconds.append(time.perf_counter() - start)
            losses.append(result.loss)
            norms.append(result.grad_norm)
    timed = seconds[job["warmup"] :]
    step = float(np.median(timed))
    return {
        "device": "cuda" if has_cuda() else "cpu",
        "parameters": parameters,
        "losses": losses,
        "grad_norms": norms,
        "step_ms": 1e3 * step,
        "tokens_per_s": SIZES[job["size"]]["packs"] * SIZES[job["size"]]["sequence_length"] / step,
        "images_per_step": float(np.mean([sum(b.num_images for b in step_batches) for step_batches in steps])),
        "peak_gib": max_memory_gib(),
    }


def dali(job: dict[str, Any]) -> dict[str, Any]:
    """Decode JPEGs with DALI and with PIL; compare pixels and speed."""
    import torch
    from PIL import Image

    from megavlm.data.decode import make_decoder

    rng = np.random.default_rng(0)
    files = []
    for _ in range(job["images"]):
        small = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(small).resize((640, 480), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    decoder = make_decoder("dali")
    expected = make_decoder("pil").decode(files, job["size"])
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        decoded = decoder.decode(files, job["size"])
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    difference = (decoded.pixels.cpu().float() - expected.pixels.float()).abs()
    return {
        "device": decoder.device.type,
        "failed": len(decoded.failed) + sum(decoder.failures.values()) + decoder.rebuilds,  # type: ignore[attr-defined]
        "mean_difference": difference.mean().item(),
        "max_difference": difference.max().item(),
        "images_per_s": len(files) / min(seconds),
    }


def main() -> None:
    """Run the job."""
    job = json.loads(sys.argv[1])
    result = {"train": train, "dali": dali}[job["kind"]](job)
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
