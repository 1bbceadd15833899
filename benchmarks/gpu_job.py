"""One job of ``gpu_check`` in a process of its own: trains some steps or decodes some images, and writes what it saw.

Arguments: a JSON object with ``kind`` ("train", "attention", "decoders", "rates", "save", "scan") and its settings, and
the file to write the result to. A result of ``missing`` says what this machine lacks for the job. A job of kind
"several" has a list ``jobs``, which it does one after the other: the file is a folder then, and gets the result of each
when it is done (``0.json``, ..), or its ``error`` and ``log``.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gpu_families import family_batches, size_of
from gpu_scan import scan

from megavlm.config.errors import RecipeError, UserError

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
        "mixes": {"picture-heavy": (5, 20), "text-heavy": (120, 200)},
    },
    # The 14B: its tower and layers at their full width, and as many layers as fit (job["layers"]). A smaller
    # vocabulary leaves them the room: a stage in the middle of the pipeline has none.
    "slice": {
        "model": {"preset": "codefuse_vl_14b", "language": {"vocab_size": 32768}},
        "sequence_length": 2048,
        "packs": 4,
        "text": (60, 300),
        "mixes": {"picture-heavy": (10, 50), "text-heavy": (900, 1700)},
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
    from megavlm.families.presets import expand_presets

    size = size_of(job) if "slice" in job else SIZES[job["size"]]
    model = dict(size["model"])
    if "layers" in job and "slice" not in job:
        model["language"] = {**model.get("language", {}), "num_layers": job["layers"]}
    tree = {
        "output_dir": "unused",
        "model": model,
        "parallel": {"transformer_impl": job["impl"], **job.get("parallel", {})},
        "engine": job.get("engine", {}),
        "modules": {"vision": {"freeze": job.get("freeze_vision", False)}},
        "data": {"train": [{"path": "unused"}], "tokenizer": "unused", "sequence_length": size["sequence_length"]}
        | {"balance_images": False},  # no feed orders these packs
        "optimizer": {"lr": 1e-4, "weight_decay": 0.1, "schedule": "constant"},
        "training": {"train_steps": 1000, "global_batch_size": size["packs"], "precision": job["precision"]},
    }
    return TypeAdapter(Recipe).validate_python(expand_presets(tree))


def fill_weights(training: TrainingModel) -> int:
    """Give every weight a value that its name alone decides, whatever device and layers; return their number."""
    import torch

    count = 0
    with torch.no_grad():
        names = ((n, p) for module in training.modules for n, p in module.named_parameters())
        for name, parameter in names:
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


def make_batches(
    recipe: Recipe,
    job: dict[str, Any],
    image_token: int,
    *,
    steps: int = 4,
    seed: int = 7,
    text: tuple[int, int] | None = None,
) -> list[list[Any]]:
    """Return the micro-batches of different steps, on the device: samples of one image and some text.

    Args:
        recipe: of the job.
        job: see the module.
        image_token: the token of image slots.
        steps: how many.
        seed: another one gives packs never seen before.
        text: least and most tokens of text in a sample; None for the size's own.
    """
    if "slice" in job:
        return family_batches(recipe, job, image_token, steps=steps, seed=seed)
    import torch

    from megavlm.data.batch import IGNORE_INDEX
    from megavlm.data.chat import EncodedSample
    from megavlm.data.device_batch import context_length, make_batch
    from megavlm.data.packing import PackableSample, build_pack
    from megavlm.parallel.device import local_device

    rng = np.random.default_rng(seed)
    size, slots = SIZES[job["size"]], recipe.model.tokens_per_view
    side = recipe.model.vision.image_size

    def pack() -> tuple[Any, Any]:
        samples: list[PackableSample] = []
        room = size["sequence_length"]
        while room > slots + 8:
            words = min(int(rng.integers(*(text or size["text"]))), room - slots)
            tokens = np.concatenate([np.full(slots, image_token), rng.integers(0, image_token, words)])
            labels = np.where(np.arange(len(tokens)) < slots + words // 3, IGNORE_INDEX, tokens)
            samples.append(PackableSample(EncodedSample(tokens, labels, 1), (b"",), str(len(samples)), 0))
            room -= len(tokens)
        pixels = rng.integers(0, 256, (len(samples), 3, side, side), dtype=np.uint8)
        return build_pack(samples, size["sequence_length"], 0), torch.from_numpy(pixels)

    found = []
    for _ in range(steps):
        made = [pack() for _ in range(size["packs"])]
        length = context_length(one.cu_seqlens for one, _ in made)
        found.append([make_batch(one, pixels, local_device(), length=length) for one, pixels in made])
    return found


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Train ``job["steps"]`` steps; the first ``job["warmup"]`` are not timed."""
    from megavlm.parallel.device import has_cuda, max_memory_gib, prepare_device, synchronize

    prepare_device()
    import torch
    from megatron.core import parallel_state as mpu

    from megavlm.checkpoint import distributed as checkpoint
    from megavlm.config.checks import check_recipe
    from megavlm.parallel.engine import check_machine, this_machine
    from megavlm.parallel.state import process_groups
    from megavlm.training.build import build_training
    from megavlm.training.step import run_batches, train_step

    # Plain fp32 on the GPU as well, so that it can be held against the CPU.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    recipe = make_recipe(job)
    check_recipe(recipe, job.get("ranks", 1))
    check_machine(recipe, this_machine())
    image_token = recipe.model.language.vocab_size - 1
    before = _left_over_gib()
    with process_groups(recipe.parallel, recipe.training.seed):
        training = build_training(recipe, image_token)
        if job.get("own_weights"):
            parameters = sum(p.numel() for p in training.modules[0].parameters())
        else:
            parameters = fill_weights(training)
        if "weights" in job:  # layouts cut the parameters in other ways: they begin with the same checkpoint
            base = Path(job["weights"])
            if not base.exists():
                checkpoint.save_weights(base.parent, training.modules)
            checkpoint.load(base, modules=training.modules)
            training.optimizer.reload_model_params()
        steps = make_batches(recipe, job, image_token)
        replica = slice(mpu.get_data_parallel_rank(), None, mpu.get_data_parallel_world_size())
        losses, norms, seconds = [], [], []

        def take(batches: list[Any]) -> float:
            synchronize()
            start = time.perf_counter()
            training.scheduler.step(1)
            result = train_step(training.chunks, training.optimizer, batches[replica], num_sources=1)
            synchronize()
            losses.append(result.loss)
            norms.append(result.grad_norm)
            return time.perf_counter() - start

        for number in range(job["steps"]):
            seconds.append(take(steps[number % len(steps)]))
        step = float(np.median(seconds[job["warmup"] :]))
        counts, peak = _counts(steps), max_memory_gib()
        more: dict[str, Any] = {}
        if job.get("more"):
            more = {
                "unseen_ms": 1e3 * _unseen(recipe, job, image_token, take),
                "kernels": _kernels(lambda: take(steps[0])),
                "waits": _waits(partial(run_batches, training.chunks, steps[0], 1)),
                "mixes": {}
                if "slice" in job
                else {name: _mix(recipe, job, image_token, take, name) for name in SIZES[job["size"]]["mixes"]},
            }
        _release(training)
    return {
        "device": "cuda" if has_cuda() else "cpu",
        "parameters": parameters,
        "layers": recipe.model.language.num_layers,
        "losses": losses,
        "grad_norms": norms,
        "step_ms": 1e3 * step,
        "tokens_per_s": counts["tokens"] / step,
        "images_per_s": counts["images"] / step,
        "images_per_step": counts["images"],
        **_use(recipe, counts, step),
        "peak_gib": None if peak is None else peak - before,
        **more,
        **(predicted(recipe, counts) if job.get("ranks", 1) == 1 else {}),
    }


def _left_over_gib() -> float:
    """Return what an earlier job of this process left on the device; count the peak anew."""
    import torch

    if not torch.cuda.is_available():
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated() / 2**30


def _release(training: TrainingModel) -> None:
    """Give the memory of weights, gradients and optimizer back: Megatron-Core's hooks would hold it until the end."""
    import torch

    held = [one for group in training.optimizer.param_groups for one in group["params"]]
    for chunk in training.chunks:
        for buffer in [*getattr(chunk, "buffers", []), *getattr(chunk, "expert_parallel_buffers", [])]:
            held += [one for one in (buffer.param_data, buffer.grad_data) if one is not None]
    for module in training.modules:
        held += [*module.parameters()]
    for inner in getattr(training.optimizer, "chained_optimizers", [training.optimizer]):
        state = getattr(getattr(inner, "optimizer", None), "state", {})
        held += [one for values in state.values() for one in values.values() if isinstance(one, torch.Tensor)]
    for tensor in held:
        storage = tensor.detach().untyped_storage()
        if storage.resizable():  # what a checkpoint's pages lie behind is not
            storage.resize_(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _unseen(recipe: Recipe, job: dict[str, Any], image_token: int, take: Callable[[list[Any]], float]) -> float:
    """Return the median seconds of steps on packs that come once."""
    fresh = make_batches(recipe, job, image_token, steps=2 if job["size"] == "small" else 6, seed=1000)
    return float(np.median([take(batches) for batches in fresh]))


def _mix(
    recipe: Recipe, job: dict[str, Any], image_token: int, take: Callable[[list[Any]], float], name: str
) -> dict[str, float | None]:
    """Time steps of another share of pictures."""
    text = SIZES[job["size"]]["mixes"][name]
    steps = make_batches(recipe, job, image_token, steps=2, seed=2000, text=text)
    seconds = [take(steps[i % 2]) for i in range(2 if job["size"] == "small" else 6)]
    step, counts = float(np.median(seconds[len(seconds) // 3 :])), _counts(steps)
    return {
        "step_ms": 1e3 * step,
        "tokens_per_s": counts["tokens"] / step,
        "images_per_pack": counts["images"] / recipe.training.global_batch_size,
        **_use(recipe, counts, step),
    }


def _kernels(work: Callable[[], Any]) -> list[list[Any]] | None:
    """Return [name, calls, milliseconds] of the kernels that took most of a step."""
    import torch

    if not torch.cuda.is_available():
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        work()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)[:40]
    return [[event.key[:120], event.count, round(event.self_device_time_total / 1e3, 3)] for event in events]


def _waits(work: Callable[[], Any]) -> dict[str, int] | None:
    """Return where the host waited for the device during the forward and backward passes of a step, and how often."""
    import torch

    if not torch.cuda.is_available():
        return None
    places: Counter[str] = Counter()

    def note(message: Any, *_: Any, **__: Any) -> None:
        if "synchroniz" in str(message):
            own = [f for f in traceback.extract_stack() if "site-packages/torch" not in f.filename][-3:-1]
            places[" < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(own))] += 1

    plain, warnings.showwarning = warnings.showwarning, note
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = note
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        warnings.showwarning = plain
    return dict(places)


def _counts(steps: list[list[Any]]) -> dict[str, Any]:
    """Return tokens, squared segment lengths and images of a step on average, and images of the fullest pack."""
    packs = [batch for step in steps for batch in step]
    lengths = [batch.packed_seq_params.cu_seqlens_q.diff().double() for batch in packs]
    real = [part[batch.segment_sources >= 0] for part, batch in zip(lengths, packs, strict=True)]
    return {
        "tokens": float(sum(part.sum() for part in real)) / len(steps),
        "squares": float(sum(part.square().sum() for part in real)) / len(steps),
        "images": sum(batch.num_images for batch in packs) / len(steps),
        "samples_per_pack": sum(part.numel() for part in real) / len(packs),
        "most_images": max(batch.num_images for batch in packs),
        **_own_sizes(packs, len(steps)),
    }


def _own_sizes(packs: list[Any], steps: int) -> dict[str, Any]:
    """Return what a step's pictures are on average, where each has a size of its own."""
    from megavlm.architectures.cost import Pictures

    if all(batch.image_grid is None for batch in packs):
        return {}
    return {"pictures": Pictures.shown([grid for one in packs for grid in one.image_grid.tolist()]).times(1 / steps)}


def _use(recipe: Recipe, counts: dict[str, Any], step: float) -> dict[str, float | None]:
    """Return FLOP/s of the model, as a share of the device's peaks where these are known; None without figures."""
    from megavlm.parallel.device import peak_flops
    from megavlm.planning.flops import step_flops

    pictures = counts.get("pictures", round(counts["images"]))
    try:
        rate = step_flops(recipe, round(counts["tokens"]), round(counts["squares"]), pictures) / step
    except UserError:  # of an architecture without
        return {"model_tflops": None, "mfu": None, "mfu_fp8_peak": None}
    bf16, fp8 = peak_flops("bf16"), peak_flops("fp8")
    return {
        "model_tflops": rate / 1e12,
        "mfu": rate / bf16 if bf16 else None,
        "mfu_fp8_peak": rate / fp8 if fp8 and recipe.engine.fp8 else None,
    }


# Names of torch, and what the planner calls the GPU.
_PLANNED = {"NVIDIA A100-SXM4-80GB": "a100-80g", "NVIDIA H100 80GB HBM3": "h100-80g", "NVIDIA H200": "h200-141g"}


def predicted(recipe: Recipe, counts: dict[str, Any]) -> dict[str, Any]:
    """Return what the planner says of this job: the bytes of its tensors, and its step where it knows the GPU."""
    import torch

    from megavlm.planning.gpus import GPUS
    from megavlm.planning.memory import predict
    from megavlm.planning.search import evaluate
    from megavlm.planning.workload import assume_workload

    packs = recipe.training.global_batch_size
    load = {
        "images_per_pack": counts["images"] / packs,
        "samples_per_pack": counts["samples_per_pack"],
        "most_images": int(counts["most_images"]),
    }
    result: dict[str, Any] = {"predicted_gib": None, "predicted_step_ms": None}
    try:
        (memory,) = predict(recipe, 1, **load)  # type: ignore[arg-type]
    except UserError as error:  # what was measured is told all the same
        return {**result, "unpredicted": str(error).splitlines()[0]}
    result["predicted_gib"] = memory.tensors / 2**30
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    known = next((own for start, own in _PLANNED.items() if name.startswith(start)), None)
    if known is not None:
        plan = evaluate(recipe, 1, GPUS[known], assume_workload(recipe, **load))  # type: ignore[arg-type]
        result["predicted_step_ms"] = 1e3 * plan.time.step
    return result


def decoders(job: dict[str, Any]) -> dict[str, Any]:
    """Decode JPEGs with every decoder that is here; compare pixels with PIL's, and speed."""
    import torch
    from PIL import Image

    from megavlm.data.decoders import make_decoder

    rng = np.random.default_rng(0)
    files = []
    for _ in range(job["images"]):
        small = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(small).resize((640, 480), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    expected = make_decoder("pil").decode(files, job["size"])
    found = {}
    for name in job["names"]:
        decoder = make_decoder(name)
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            decoded = decoder.decode(files, job["size"])
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        difference = (decoded.pixels.cpu().float() - expected.pixels.float()).abs()
        own = sum(getattr(decoder, "failures", {}).values()) + getattr(decoder, "rebuilds", 0)
        found[name] = {
            "device": str(getattr(decoder, "device", "cpu")),
            "failed": len(decoded.failed) + own,
            "mean_difference": difference.mean().item(),
            "max_difference": difference.max().item(),
            "images_per_s": len(files) / min(seconds),
        }
    return found


def do(job: dict[str, Any]) -> dict[str, Any]:
    """Do one job."""
    from gpu_attention import attention
    from gpu_rates import rates
    from gpu_save import save

    kinds = {
        "train": train, "attention": attention, "decoders": decoders, "rates": rates, "save": save, "scan": scan
    }  # fmt: skip
    try:
        return kinds[job["kind"]](job)
    except RecipeError as error:  # the machine or the model cannot do what the job asks
        return {"missing": str(error).splitlines()[0]}


def do_several(jobs: list[dict[str, Any]], folder: Path) -> None:
    """Do one after the other; what each gives is there when it is done, whole or not at all."""
    import gc

    for number, job in enumerate(jobs):
        try:
            result = do(job)
        except Exception as error:  # one must not hide the others
            log = traceback.format_exc()
            result = {
                "error": f"{type(error).__name__}: {(str(error) or '?').splitlines()[0][:200]}",
                "log": log[-4000:],
            }
        written = folder / f"{number}.part"
        written.write_text(json.dumps(result))
        written.rename(folder / f"{number}.json")
        gc.collect()


def main() -> None:
    """Run the job, or several."""
    job, out = json.loads(sys.argv[1]), Path(sys.argv[2])
    if job["kind"] == "several":
        do_several(job["jobs"], out)
        return
    result = do(job)
    if os.environ.get("RANK", "0") == "0":
        out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
