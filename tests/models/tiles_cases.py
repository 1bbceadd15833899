"""What ranks do with a model whose pictures are tiles: share packs, train, save and load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megavlm.parallel.device import prepare_device

prepare_device()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from megatron.core import parallel_state as mpu  # noqa: E402
from tiny import IMAGE_SIZE, IMAGE_TOKEN, tiny_recipe  # noqa: E402

from megavlm.checkpoint import distributed as checkpoint  # noqa: E402
from megavlm.checkpoint.saver import Saver, State  # noqa: E402
from megavlm.config.help import to_yaml  # noqa: E402
from megavlm.config.schema import Recipe  # noqa: E402
from megavlm.data.batch import IGNORE_INDEX, Pack  # noqa: E402
from megavlm.data.chat import EncodedSample  # noqa: E402
from megavlm.data.device_batch import Batch, share_packs  # noqa: E402
from megavlm.data.media import ImagePlan, arrange, plan_of  # noqa: E402
from megavlm.data.packing import PackableSample, build_pack  # noqa: E402
from megavlm.data.read_pack import ReadPack  # noqa: E402
from megavlm.parallel.state import is_reader, process_groups  # noqa: E402
from megavlm.training.build import build_training  # noqa: E402
from megavlm.training.step import train_step  # noqa: E402

LENGTH = 224
STD = {"init_method_std": 0.1}
PINPOINTS = tuple((rows * IMAGE_SIZE, columns * IMAGE_SIZE) for rows, columns in ((1, 2), (2, 1), (2, 2), (1, 3)))
ANYRES = {"kind": "anyres", "pinpoints": PINPOINTS}
ANYRES_MAX = {"kind": "anyres_max", "pinpoints": PINPOINTS, "max_tiles": 1}
TILES = {"kind": "dynamic_tiles", "max_tiles": 4}
SPLIT_TILES = {"kind": "split_tiles", "longest_edge": 2 * IMAGE_SIZE}


def recipe(image: dict[str, Any], *, split: str = "auto", **branches: Any) -> Recipe:
    """Return a small LLaVA-like model with an image plan; ``split`` is how tower and connector lie on TP ranks."""
    model = {
        "preset": "tiny",
        "vision": {"image_size": IMAGE_SIZE, "hidden_size": 48, "num_layers": 2, "ffn_hidden_size": 96, **STD}
        | {"num_attention_heads": 4, "positional_grid": 2, "tensor_parallel": split},
        "connector": {"preset": "mlp2x_gelu", "tensor_parallel": split, **STD},
        "language": {"hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "num_query_groups": 4}
        | {"kv_channels": 16, **STD},
        "image": image,
    }
    data = {"train": [{"path": "unused"}], "tokenizer": "unused", "sequence_length": LENGTH}
    return tiny_recipe(**{"model": model, "data": data, **branches})


def picture_samples(plan: ImagePlan, seed: int, sizes: Sequence[tuple[int, int]]) -> tuple[PackableSample, np.ndarray]:
    """Return a random sample that shows pictures of these sizes, and the pixels of their views."""
    rng = np.random.default_rng(seed)
    layouts = [plan.plan(*size, len(sizes)) for size in sizes]
    parts = [rng.integers(0, IMAGE_TOKEN, 6)]
    for layout in layouts:
        parts += [np.full(layout.tokens, IMAGE_TOKEN), rng.integers(0, IMAGE_TOKEN, 5)]
    tokens = np.concatenate(parts).astype(np.int64)
    labels = np.where((tokens == IMAGE_TOKEN) | (rng.random(len(tokens)) < 0.3), IGNORE_INDEX, tokens)
    views = sum(plan.pixels_of(layout)[0] for layout in layouts)
    pixels = rng.integers(0, 256, (views, *plan.row), dtype=np.uint8)
    sample = PackableSample(
        EncodedSample(tokens, labels, len(sizes)), (b"",) * len(sizes), f"s/{seed}", 0,
        shapes=tuple(layout.shape for layout in layouts), views=views,
    )  # fmt: skip
    return sample, pixels


def packs(plan: ImagePlan, count: int, seed: int) -> list[tuple[Pack, np.ndarray]]:
    """Return packs of two or three samples, some with pictures, one of two; every third pack has none."""
    found = []
    for index in range(count):
        kinds: list[list[tuple[int, int]]] = [[(90, 40)], [], [(30, 33), (64, 20)]] if index % 3 != 1 else [[], []]
        made = [picture_samples(plan, 100 * seed + 10 * index + k, sizes) for k, sizes in enumerate(kinds)]
        while sum(len(sample) for sample, _ in made) > LENGTH:
            made.pop()
        pixels = np.concatenate([pixels for _, pixels in made])
        found.append((build_pack([sample for sample, _ in made], LENGTH, 3), pixels))
    return found


def shared(plan: ImagePlan, made: Sequence[tuple[Pack, np.ndarray]]) -> list[Batch]:
    """Hand packs to the ranks of this replica as the feed does."""
    read = [ReadPack(pack, torch.from_numpy(pixels), arrange(plan, pack.layouts(plan) or [])) for pack, pixels in made]
    return share_packs(read if is_reader() else None, len(made))


def train(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Train two steps for each of ``jobs``; return losses, norms, and the newline's gradient where it is."""
    return [_train(job) for job in jobs]


def _train(job: dict[str, Any]) -> dict[str, Any]:
    own = recipe(job["image"], split=job["split"], **job["recipe"])
    plan = plan_of(own.model)
    with process_groups(own.parallel, own.training.seed):
        training = build_training(own, IMAGE_TOKEN)
        weights = Path(job["weights"])
        if not weights.exists():
            checkpoint.save_weights(weights.parent, training.modules, recipe_yaml=to_yaml(own))
        checkpoint.load(weights, modules=training.modules)
        training.optimizer.reload_model_params()
        results, newline = [], None
        for step in range(2):
            rank, size = mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()
            batches = shared(plan, packs(plan, 4, step)[rank::size])
            training.scheduler.step(1)
            results.append(train_step(training.chunks, training.optimizer, batches, num_sources=1))
        for module in training.modules:
            for name, parameter in module.named_parameters():
                if name.endswith("image_newline"):
                    newline = parameter.detach().clone()
        if "save" in job:
            with training.settled():
                state = State(training.modules, training.optimizer, training.scheduler, run={"step": 2})
                Saver(Path(job["save"]), keep=1).save(state)
        views = [batch.num_views for batch in batches]
        return {"loss": [one.loss for one in results], "norm": [one.grad_norm for one in results]} | {
            "newline": newline, "views": views, "images": [batch.num_images for batch in batches]
        }  # fmt: skip
