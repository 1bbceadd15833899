"""Prompts of several lengths with none, one and two images."""

from __future__ import annotations

import numpy as np
import torch
from tiny import IMAGE_SIZE, IMAGE_TOKEN, TOKENS_PER_IMAGE

from megavlm.inference.prompt import Prompt

VOCABULARY = 480
LONG = 40


def prompts() -> list[Prompt]:
    """Return seven prompts, the same each time; together they need several packs."""
    rng = np.random.default_rng(5)
    made = []
    for length, images in ((12, 1), (30, 2), (9, 0), (LONG, 1), (25, 0), (33, 2), (LONG, 0)):
        tokens = rng.integers(0, VOCABULARY - 1, size=length)
        for k in range(images):
            at = 1 + k * (TOKENS_PER_IMAGE + 1)
            tokens[at : at + TOKENS_PER_IMAGE] = IMAGE_TOKEN
        pixels = rng.integers(0, 256, size=(images, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
        made.append(Prompt(tokens.astype(np.int64), torch.from_numpy(pixels)))
    return made
