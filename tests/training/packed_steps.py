"""Steps of a tiny model on pictures of any size (windows, positions of three axes), at one layout or another."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megavlm.parallel.device import prepare_device

prepare_device()

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from internvl_cases import canonical_name, shard_of  # noqa: E402
from megatron.core import parallel_state as mpu  # noqa: E402
from peak_memory import PeakMemory  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tiny import IMAGE_TOKEN, tiny_recipe  # noqa: E402

from megavlm.checkpoint import distributed as checkpoint  # noqa: E402
from megavlm.config.schema import Recipe  # noqa: E402
from megavlm.data.batch import IGNORE_INDEX, make_pack  # noqa: E402
from megavlm.data.device_batch import Batch, make_batch  # noqa: E402
from megavlm.data.media import arrange, plan_of  # noqa: E402
from megavlm.data.positions import grids_of, positions_of  # noqa: E402
from megavlm.parallel.device import local_device  # noqa: E402
from megavlm.parallel.state import is_first_stage, process_groups  # noqa: E402
from megavlm.planning.layout import layout_of  # noqa: E402
from megavlm.planning.memory import stage_memory  # noqa: E402
from megavlm.planning.workload import Workload  # noqa: E402
from megavlm.training.build import TrainingModel, build_training  # noqa: E402
from megavlm.training.step import run_batches, train_step  # noqa: E402

MODEL: dict[str, Any] = {
    "preset": "tiny",
    "vision": {
        "preset": "qwen2_5_vl_vit", "patch_size": 4, "window_size": 24, "full_attention_layers": [1], "hidden_size": 48,
        "num_layers": 2, "num_attention_heads": 4, "ffn_hidden_size": 64, "image_size": 32, "init_method_std": 0.1,
    },
    "connector": {"preset": "patch_merger", "normalization": "RMSNorm", "init_method_std": 0.1},
    "language": {"rotary_sections": [2, 3, 3], "kv_channels": 16},
    "image": {"kind": "native", "min_pixels": 64, "max_pixels": 65536},
}  # fmt: skip
WIDE = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True}


def recipe_of(length: int, **branches: dict[str, Any]) -> Recipe:
    """Return the recipe; ``language`` updates that part of the model."""
    language = {**MODEL["language"], **branches.pop("language", {})}
    data = {"sequence_length": length}
    return tiny_recipe(model={**MODEL, "language": language}, data=data, **branches)


def batch_of(recipe: Recipe, sizes: list[tuple[int, int]], seed: int) -> Batch:
    """Return a pack of one sample that fills it: pictures of these widths and heights, random text between them."""
    rng, plan, length = np.random.default_rng(seed), plan_of(recipe.model), recipe.data.sequence_length
    layouts = [plan.plan(*size, images=len(sizes)) for size in sizes]
    between = (length - sum(layout.tokens for layout in layouts)) // (len(sizes) + 1)
    parts = [rng.integers(0, IMAGE_TOKEN, between)]
    for layout in layouts:
        parts += [np.full(layout.tokens, IMAGE_TOKEN), rng.integers(0, IMAGE_TOKEN, between)]
    tokens = np.concatenate([*parts, rng.integers(0, IMAGE_TOKEN, length - sum(map(len, parts)))])
    assert len(tokens) == length
    labels = np.where(tokens == IMAGE_TOKEN, IGNORE_INDEX, tokens)
    pack = make_pack(
        [tokens], length, labels=[labels], positions=positions_of(recipe.model, IMAGE_TOKEN),
        grids=[grids_of(plan, layouts)],
    )  # fmt: skip
    shapes = [plan.pixels_of(layout) for layout in layouts]
    patches, width = sum(shape[0] for shape in shapes), recipe.model.vision.patch_values
    pixels = torch.from_numpy(rng.integers(0, 256, (patches, width), dtype=np.uint8))
    return make_batch(
        pack, pixels if is_first_stage() else None, local_device(), arrange(plan, layouts) if sizes else None
    )


def replicas_losses(packs: list[list[list[tuple[int, int]]]], branches: dict[str, Any]) -> list[list[float]]:
    """Return losses and gradient norms of steps; ``packs``: by step and pack, the sizes of its pictures."""
    recipe = recipe_of(96, **branches)
    found = []
    with process_groups(recipe.parallel, recipe.training.seed):
        training = build_training(recipe, IMAGE_TOKEN)
        rank, replicas = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
        for step, own in enumerate(packs):
            batches = [batch_of(recipe, sizes, 10 * step + i) for i, sizes in enumerate(own)][rank::replicas]
            training.scheduler.step(1)
            result = train_step(training.chunks, training.optimizer, batches, num_sources=1)
            found.append([result.loss, result.grad_norm or 0.0])
        digest = torch.stack([p.detach().double().sum() for one in training.chunks for p in one.parameters()]).sum()
        both = [torch.zeros_like(digest) for _ in range(dist.get_world_size())]
        dist.all_gather(both, digest)
        assert len({float(one) for one in both}) == 1, "replicas drifted apart"
    return found


@dataclass
class Long:
    """What one rank found of a long sample."""

    loss: float
    worst: dict[str, float]
    """Differences of gradients from one process, as a share of the largest of the part."""
    planned: int
    """Bytes that come and go in a step, as predicted."""
    peak: int
    """And as they were."""


def long_sample(folder: str, length: int, sizes: list[tuple[int, int]], branches: dict[str, Any]) -> Long:
    """Run one sample; without weights in ``folder`` write these and the gradients there, else compare with them."""
    recipe, root = recipe_of(length, **branches), Path(folder)
    weights, gradients = root / "step-00000000", root / "gradients.safetensors"
    with process_groups(recipe.parallel, recipe.training.seed):
        training = build_training(recipe, IMAGE_TOKEN)
        first = not weights.exists()
        if first:
            checkpoint.save_weights(root, training.modules)
        checkpoint.load(weights, modules=training.modules)
        training.optimizer.reload_model_params()
        batch = batch_of(recipe, sizes, 1)
        known = [p for chunk in training.chunks for p in chunk.parameters()]
        known += [buffer.grad_data for chunk in training.chunks for buffer in chunk.buffers]
        with PeakMemory(known) as memory:
            ((total, count),) = run_batches(training.chunks, [batch], num_sources=1).tolist()
        planned = _planned(recipe, batch, len(sizes))
        found = _gradients(training)
        if first:
            save_file({name: value.contiguous().clone() for name, (value, _) in found.items()}, gradients)
        worst = _differences(found, load_file(gradients))
    return Long(total / count, worst, planned, memory.peak)


def _planned(recipe: Recipe, batch: Batch, images: int) -> int:
    assert batch.image_grid is not None or not is_first_stage()
    vision, stage = recipe.model.vision, mpu.get_pipeline_model_parallel_rank()
    patches = int(batch.image_grid.prod(1).sum()) if batch.image_grid is not None else 0
    views = patches / vision.patches_per_image
    load = Workload(recipe.data.sequence_length, images, views, round(views), 1)
    memory = stage_memory(recipe, layout_of(recipe, dist.get_world_size()), stage, load)
    there = recipe.data.sequence_length * 8 * 4 + round(views) * vision.pixel_bytes * int(is_first_stage())
    return memory.activations + memory.vision + memory.output + memory.buffers - there


def _gradients(training: TrainingModel) -> dict[str, tuple[Any, Any]]:
    found = {}
    for module in training.modules:
        first = module.decoder.layers[0].layer_number - 1
        for name, parameter in module.named_parameters():
            found[canonical_name(name, first)] = (parameter.main_grad, parameter)
    return found


def _differences(found: dict[str, tuple[Any, Any]], wanted: dict[str, torch.Tensor]) -> dict[str, float]:
    largest: dict[str, float] = {}
    for name, value in wanted.items():
        part = name.split(".")[0]
        largest[part] = max(largest.get(part, 0.0), float(value.abs().max()))
    return {
        name: float((gradient - shard_of(wanted[name], parameter)).abs().max()) / largest[name.split(".")[0]]
        for name, (gradient, parameter) in found.items()
    }


def mismatches() -> list[str]:
    """Return what a step says of a pack with a slot too few, one with a grid too many, and one with odd rows."""
    recipe, found = recipe_of(96), []
    with process_groups(recipe.parallel, recipe.training.seed):
        training = build_training(recipe, IMAGE_TOKEN)
        batch = batch_of(recipe, [(40, 24)], 1)
        tokens, grid = batch.tokens.clone(), batch.image_grid
        assert grid is not None
        tokens[tokens == IMAGE_TOKEN] = torch.tensor([5, *[IMAGE_TOKEN] * (int((tokens == IMAGE_TOKEN).sum()) - 1)])
        for wrong in (
            replace(batch, tokens=tokens),
            replace(batch, image_grid=torch.cat([grid, grid])),
            replace(batch, image_grid=torch.tensor([[1, int(grid[0, 1]) * 2 + 1, int(grid[0, 2])]])),
        ):
            try:
                run_batches(training.chunks, [wrong], num_sources=1)
                found.append("nothing")
            except (RuntimeError, ValueError) as error:
                found.append(str(error))
    return found
