"""Steps of models that are composed of a tower by recipe keys alone, at one layout or another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megavlm.parallel.device import prepare_device

prepare_device()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from tiny import IMAGE_TOKEN, SEQUENCE_LENGTH, tiny_recipe  # noqa: E402

from megavlm.checkpoint import distributed as checkpoint  # noqa: E402
from megavlm.config.checks import check_recipe  # noqa: E402
from megavlm.config.schema import Recipe  # noqa: E402
from megavlm.data.batch import IGNORE_INDEX, make_pack  # noqa: E402
from megavlm.data.device_batch import Batch, make_batch  # noqa: E402
from megavlm.data.media import arrange, plan_of  # noqa: E402
from megavlm.data.positions import grids_of, positions_of  # noqa: E402
from megavlm.parallel.device import local_device  # noqa: E402
from megavlm.parallel.state import is_first_stage, process_groups  # noqa: E402
from megavlm.training.build import build_training  # noqa: E402
from megavlm.training.step import train_step  # noqa: E402

_STD = {"init_method_std": 0.1}
_SMALL = {"hidden_size": 48, "num_layers": 2, "num_attention_heads": 4, **_STD}
_SQUARE = {**_SMALL, "image_size": 32, "patch_size": 8, "positional_grid": 4}
_NAFLEX = {**_SMALL, "preset": "siglip2_naflex_vit", "patch_size": 8, "positional_grid": 4, "ffn_hidden_size": 96}
_MLP = {"preset": "mlp2x_gelu", **_STD}
MODELS: dict[str, dict[str, Any]] = {
    "dinov2": {
        "vision": {**_SQUARE, "preset": "dinov2_vit", "ffn_hidden_size": 192, "positional_grid": 6}, "connector": _MLP,
    },
    "dinov2-swiglu": {
        "vision": {**_SQUARE, "preset": "dinov2_vit", "ffn_hidden_size": 128, "gated_mlp": True, "activation": "silu"},
        "connector": {"preset": "average_pool"},
        "language": {"preset": "phi"},
    },
    # An MLP that two ranks divide and four do not, as 2730 is.
    "eva02": {"vision": {**_SQUARE, "preset": "eva02_vit", "ffn_hidden_size": 90}, "connector": _MLP},
    "eva02-whole": {
        "vision": {**_SQUARE, "preset": "eva02_vit", "ffn_hidden_size": 91}, "connector": _MLP,
        "language": {"preset": "gemma"},
    },
    "eva01-queries": {
        "vision": {**_SQUARE, "preset": "eva01_vit", "ffn_hidden_size": 96, "class_feature": True},
        "connector": {"preset": "q_former", "num_queries": 3, "num_layers": 3, "hidden_size": 32, **_STD}
        | {"num_attention_heads": 4, "ffn_hidden_size": 64},
    },
    "naflex": {
        "vision": _NAFLEX, "connector": _MLP,
        "image": {"kind": "naflex", "max_num_patches": 12, "resample": "bilinear"},
    },
    "naflex-blocks": {
        "vision": {**_NAFLEX, "spatial_merge_size": 2}, "connector": {"preset": "patch_merger", **_STD},
        "image": {"kind": "naflex", "max_num_patches": 24, "resample": "bilinear"},
        "language": {"rotary_sections": [2, 3, 3]},
    },
    "naflex-queries": {
        "vision": _NAFLEX, "connector": {"preset": "resampler_2d", "num_queries": 4, "head_dim": 16, **_STD},
        "image": {"kind": "naflex", "max_num_patches": 12, "resample": "bilinear"},
        "language": {"preset": "qwen3"},
    },
}  # fmt: skip
_LANGUAGE = {
    "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "num_query_groups": 4, "kv_channels": 16,
    "num_layers": 2, "vocab_size": 512, "max_position_embeddings": 2048, **_STD,
}  # fmt: skip


def recipe_of(name: str, **parallel: Any) -> Recipe:
    """Return the recipe of a model."""
    model = MODELS[name]
    language = {**_LANGUAGE, **model.get("language", {})}
    made = tiny_recipe(model={"preset": "tiny", **model, "language": language}, parallel=parallel)
    check_recipe(made)
    return made


def batch_of(recipe: Recipe, sizes: list[tuple[int, int]], seed: int) -> Batch:
    """Return a pack of one sample: pictures of these widths and heights, random text before and behind."""
    rng, plan = np.random.default_rng(seed), plan_of(recipe.model)
    layouts = [plan.plan(*size, images=len(sizes)) for size in sizes]
    slots = np.full(sum(layout.tokens for layout in layouts), IMAGE_TOKEN)
    words = SEQUENCE_LENGTH - len(slots)
    tokens = np.concatenate([rng.integers(0, IMAGE_TOKEN, 5), slots, rng.integers(0, IMAGE_TOKEN, words - 5)])
    labels = np.where(tokens == IMAGE_TOKEN, IGNORE_INDEX, tokens)
    pack = make_pack(
        [tokens], SEQUENCE_LENGTH, labels=[labels], positions=positions_of(recipe.model, IMAGE_TOKEN),
        grids=[grids_of(plan, layouts)] if recipe.model.language.position_axes > 1 else None,
    )  # fmt: skip
    shapes = [plan.pixels_of(layout) for layout in layouts]
    whole = (sum(shape[0] for shape in shapes), *plan.row)
    pixels = torch.from_numpy(rng.integers(0, 256, whole, dtype=np.uint8))
    return make_batch(
        pack, pixels if is_first_stage() else None, local_device(), arrange(plan, layouts) if sizes else None
    )


def train(folder: str, parallel: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """Return losses and gradient norms of three steps of each model; the first caller's weights are everyone's."""
    found = {}
    for name in MODELS:
        recipe, root = recipe_of(name, **parallel), Path(folder) / name
        with process_groups(recipe.parallel, recipe.training.seed):
            training = build_training(recipe, IMAGE_TOKEN)
            if not root.exists():
                checkpoint.save_weights(root, training.modules)
            checkpoint.load(root / "step-00000000", modules=training.modules)
            training.optimizer.reload_model_params()
            steps = []
            for step, own in enumerate(([[(40, 24), (9, 50)], []], [[(31, 31)], [(64, 16)]], [[(20, 44)], []])):
                batches = [batch_of(recipe, sizes, 10 * step + i) for i, sizes in enumerate(own)]
                training.scheduler.step(1)
                result = train_step(training.chunks, training.optimizer, batches, num_sources=1)
                steps.append((result.loss, result.grad_norm or 0.0))
            found[name] = steps
    return found
