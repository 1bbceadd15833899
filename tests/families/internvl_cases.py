"""What ranks do with a converted InternVL: logits, features and the gradient of every parameter at a layout."""

from __future__ import annotations

from pathlib import Path

from megavlm.parallel.device import prepare_device

prepare_device()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from megatron.core import parallel_state as mpu  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from megavlm.checkpoint.distributed import load  # noqa: E402
from megavlm.config.load import load_recipe  # noqa: E402
from megavlm.data.media import arrange, plan_of  # noqa: E402
from megavlm.evaluation.parity import _batch, read_reference, verify  # noqa: E402
from megavlm.families.presets import expand_presets  # noqa: E402
from megavlm.models.build import unwrap  # noqa: E402
from megavlm.parallel.state import process_groups  # noqa: E402
from megavlm.training.build import build_training  # noqa: E402
from megavlm.training.step import run_batches, train_step  # noqa: E402
from megavlm.weights.source import Source  # noqa: E402

IMAGE = 119
# Logits, features and losses are of the order of 1; gradients are compared with the largest of their part.
ABSOLUTE, GRADIENTS = 2e-4, 5e-5


def compare(checkpoint: str, reference: str, layout: list[str]) -> tuple[dict[str, float], list[float]]:
    """Compare with what Transformers computed, and train three steps.

    Returns:
        The largest gradient difference by parameter, and the losses of the steps.
    """
    path, plain = (
        Path(checkpoint),
        ["parallel.use_distributed_optimizer=false", "optimizer.lr=1e-3", "optimizer.warmup_steps=0"],
    )
    assert verify(path, Path(reference), layout, ABSOLUTE) == 0
    recipe = load_recipe(path / "recipe.yaml", ["training.precision=fp32", *plain, *layout], expand_presets)
    wanted = Source(Path(reference))
    with process_groups(recipe.parallel, recipe.training.seed):
        training = build_training(recipe, IMAGE)
        load(path, modules=training.modules)
        (sample,) = read_reference(Path(reference), recipe)
        arrangement = arrange(plan_of(recipe.model), sample.layouts)
        batch = _batch(sample, arrangement, recipe, unwrap(training.chunks[0]))
        run_batches(training.chunks, [batch], num_sources=1)
        found = {}
        for module in training.modules:
            first = module.decoder.layers[0].layer_number - 1
            for name, parameter in module.named_parameters():
                key = canonical_name(name, first)
                expected = wanted.get("gradient." + key)
                scale = float(wanted.get("largest." + key.split(".")[0]))
                found[key] = float((parameter.main_grad - shard_of(expected, parameter)).abs().max()) / scale
                assert found[key] <= GRADIENTS, (key, found[key])
        losses = []
        for _ in range(3):
            training.scheduler.step(1)
            losses.append(train_step(training.chunks, training.optimizer, [batch], num_sources=1).loss)
    return found, losses


def canonical_name(name: str, first: int) -> str:
    prefix = "language.decoder.layers."
    if not name.startswith(prefix):
        return name
    number, _, rest = name.removeprefix(prefix).partition(".")
    return f"{prefix}{int(number) + first}.{rest}"


def shard_of(whole: Tensor, parameter: nn.Parameter) -> Tensor:
    """Return this tensor-parallel rank's part; a vocabulary is padded with rows that learn nothing."""
    rank, size = mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size()
    if not getattr(parameter, "tensor_model_parallel", False):
        return whole
    axis = parameter.partition_dim
    missing = parameter.shape[axis] * size - whole.shape[axis]
    whole = F.pad(whole, (*[0, 0] * (whole.dim() - 1), 0, missing)) if missing else whole
    halves = whole.chunk(parameter.partition_stride, axis)  # gate and up: a part of each
    return torch.cat([half.chunk(size, axis)[rank] for half in halves], axis)
