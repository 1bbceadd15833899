"""Small samples with images, alone or packed, for tests of the whole model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tiny import IMAGE_SIZE, IMAGE_TOKEN, TOKENS_PER_IMAGE, tiny_recipe
from torch import Tensor

from megavlm.config.schema import Recipe
from megavlm.data.batch import IGNORE_INDEX, Pack
from megavlm.data.device_batch import Batch, make_batch
from megavlm.models.build import build_model, unwrap
from megavlm.models.vlm import VisionLanguageModel

# Large initial weights: attention, positions and image features then matter in every loss.
STD = {"init_method_std": 0.15}


@dataclass
class Sample:
    """One conversation: tokens, shifted labels, and its images."""

    tokens: np.ndarray
    labels: np.ndarray
    pixels: np.ndarray


def sample(seed: int, length: int, images: int = 0) -> Sample:
    """Return a random sample of ``length`` tokens whose ``images`` are spread over it; half is supervised."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, IMAGE_TOKEN, size=length)
    labels = rng.integers(0, IMAGE_TOKEN, size=length)
    labels[rng.random(length) < 0.5] = IGNORE_INDEX
    for k in range(images):
        at = k * (length // images)
        assert at + TOKENS_PER_IMAGE <= length
        tokens[at : at + TOKENS_PER_IMAGE] = IMAGE_TOKEN
    labels[-1] = 7  # at least one
    pixels = rng.integers(0, 256, size=(images, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
    return Sample(tokens, labels, pixels)


def pack(samples: Sequence[Sample], padding: int = 0) -> Batch:
    """Put samples into one micro-batch, with a last segment of padding."""
    lengths = [len(s.tokens) for s in samples] + ([padding] if padding else [])
    tail_tokens, tail_labels = np.full(padding, 3), np.full(padding, IGNORE_INDEX)
    one = Pack(
        tokens=np.concatenate([*(s.tokens for s in samples), tail_tokens]).astype(np.int64),
        labels=np.concatenate([*(s.labels for s in samples), tail_labels]).astype(np.int64),
        position_ids=np.concatenate([np.arange(n) for n in lengths]),
        cu_seqlens=np.cumsum([0, *lengths]).astype(np.int32),
        segment_sources=np.array([0] * len(samples) + ([-1] if padding else []), np.int32),
        images=[],
        sample_keys=[],
    )
    return make_batch(one, torch.from_numpy(np.concatenate([s.pixels for s in samples])), torch.device("cpu"))


def recipe(
    *, vision: dict[str, Any] | None = None, language: dict[str, Any] | None = None, **branches: dict[str, Any]
) -> Recipe:
    """Return the tiny recipe with large initial weights.

    ``branches`` update its branches, ``vision`` and ``language`` those of the model.
    """
    model: dict[str, Any] = {
        "preset": "tiny",
        "vision": {"image_size": IMAGE_SIZE, "hidden_size": 48, "num_layers": 2, "ffn_hidden_size": 96, **STD}
        | {"num_attention_heads": 4, "positional_grid": 2, **(vision or {})},
        "connector": {"num_queries": TOKENS_PER_IMAGE, "head_dim": 16, **STD},
        "language": {"hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "num_query_groups": 4}
        | {"kv_channels": 16, "num_layers": 2, **STD, **(language or {})},
    }
    return tiny_recipe(**{"model": model, **branches})


def build(**branches: dict[str, Any]) -> VisionLanguageModel:
    """Build the whole model with the same random weights each time."""
    torch.manual_seed(0)
    return unwrap(build_model(recipe(**branches), IMAGE_TOKEN)[0])


def losses(model: VisionLanguageModel, batch: Batch) -> Tensor:
    """Return the [S] loss of each position, zero where there is no label."""
    out = model(
        tokens=batch.tokens,
        position_ids=batch.position_ids,
        packed_seq_params=batch.packed_seq_params,
        labels=batch.labels.clamp(min=0),
        images=batch.images,
    )
    return (out * (batch.labels != IGNORE_INDEX)).view(-1)


def gradients(model: VisionLanguageModel, batch: Batch) -> dict[str, Tensor | None]:
    """Return the gradient of the summed loss for each parameter, None where there is none."""
    model.zero_grad(set_to_none=True)
    losses(model, batch).sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}
