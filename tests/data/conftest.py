"""Shared pieces: a small tokenizer, synthetic images, and prepared data sets."""

from __future__ import annotations

import argparse
import io
import json
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megavlm.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece

WORDS = "red green blue circle square triangle large small left right above below how many shapes".split()


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words)) + "."


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    texts = [f"Picture {i}: \n{sentence(rng, 8)} You are a helpful assistant. user system" for i in range(300)]
    train_sentencepiece(texts, path, 400)
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_path)


def smooth_image(seed: int, width: int, height: int) -> Image.Image:
    """An RGB image with gradients and a rectangle, as photographs are smooth in most places."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    planes = [128 + 100 * np.sin(x * rng.uniform(0.005, 0.05) + y * rng.uniform(0.005, 0.05) + c) for c in range(3)]
    pixels = np.stack(planes, -1)
    pixels[height // 4 : height // 2, width // 4 : width // 2] = rng.integers(0, 255, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encode_image(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
