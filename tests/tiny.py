"""A small recipe and random packs with real pictures, for tests of layouts and of the training step."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import TypeAdapter

from megavlm.config.schema import Recipe
from megavlm.data.batch import IGNORE_INDEX, Pack
from megavlm.families.presets import expand_presets

SEQUENCE_LENGTH = 96
IMAGE_TOKEN = 500
IMAGE_SIZE = 32
TOKENS_PER_IMAGE = 4


def tiny_recipe(**branches: dict[str, Any]) -> Recipe:
    """Return a recipe of a 4-layer model; ``branches`` update its branches."""
    tree: dict[str, Any] = {
        "output_dir": "unused",
        "model": {
            "preset": "tiny",
            "vision": {
                "image_size": IMAGE_SIZE,
                "hidden_size": 48,
                "num_layers": 2,
                "ffn_hidden_size": 96,
                "num_attention_heads": 4,
                "positional_grid": 2,
            },
            "connector": {"num_queries": TOKENS_PER_IMAGE, "head_dim": 16},
            "language": {
                "hidden_size": 64,
                "ffn_hidden_size": 96,
                "num_attention_heads": 4,
                "num_query_groups": 4,
                "kv_channels": 16,
            },
        },
        "data": {"train": [{"path": "unused"}], "tokenizer": "unused", "sequence_length": SEQUENCE_LENGTH},
        "optimizer": {"lr": 1e-3, "clip_grad": 0.5, "weight_decay": 0.1},
        "training": {"train_steps": 3, "global_batch_size": 4, "precision": "fp32"},
    }
    for name, values in branches.items():
        tree[name] = {**tree.get(name, {}), **values}
    return TypeAdapter(Recipe).validate_python(expand_presets(tree))


def random_packs(count: int, seed: int = 0) -> list[tuple[Pack, np.ndarray]]:
    """Return packs with 2 to 4 samples, 0 to 3 images each, and their pixels; every third pack has no image."""
    rng = np.random.default_rng(seed)
    return [_random_pack(rng, with_images=i % 3 != 1) for i in range(count)]


def _random_pack(rng: np.random.Generator, *, with_images: bool) -> tuple[Pack, np.ndarray]:
    lengths = [int(n) for n in rng.integers(18, 34, size=rng.integers(2, 4))]
    padding = SEQUENCE_LENGTH - sum(lengths)
    if padding < 0:
        lengths, padding = [SEQUENCE_LENGTH], 0
    cu_seqlens = np.cumsum([0, *lengths, *([padding] if padding else [])]).astype(np.int32)
    tokens = rng.integers(0, IMAGE_TOKEN, size=SEQUENCE_LENGTH)
    labels = rng.integers(0, IMAGE_TOKEN, size=SEQUENCE_LENGTH)
    labels[rng.random(SEQUENCE_LENGTH) < rng.uniform(0.2, 0.9)] = IGNORE_INDEX  # uneven over packs
    images = 0
    for start, length in zip(cu_seqlens, lengths, strict=False):
        labels[start + length - 1] = IGNORE_INDEX
        for k in range(int(rng.integers(0, 3)) if with_images else 0):
            at = start + 1 + k * (TOKENS_PER_IMAGE + 1)
            tokens[at : at + TOKENS_PER_IMAGE] = IMAGE_TOKEN
            labels[at : at + TOKENS_PER_IMAGE] = IGNORE_INDEX
            images += 1
    if padding:
        labels[-padding:] = IGNORE_INDEX
    sources = [0] * len(lengths) + ([-1] if padding else [])
    positions = np.concatenate([np.arange(n) for n in np.diff(cu_seqlens)])
    pixels = rng.integers(0, 256, size=(images, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
    pack = Pack(
        tokens=tokens.astype(np.int64),
        labels=labels.astype(np.int64),
        position_ids=positions.astype(np.int64),
        cu_seqlens=cu_seqlens,
        segment_sources=np.array(sources, np.int32),
        images=[b""] * images,
        sample_keys=[],
    )
    return pack, pixels
