"""Shared pieces: a small tokenizer and prepared data sets."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from megavlm.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece

sys.path.insert(0, str(Path(__file__).parent))

from data_helpers import make_records, prepare, sentence


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


@pytest.fixture(scope="session")
def two_datasets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Data sets ``a`` (200 samples with images) and ``b`` (120 without)."""
    root = tmp_path_factory.mktemp("datasets")
    a = prepare(root, make_records(root / "images", 200), name="a", images=root / "images")
    b = prepare(root, make_records(root / "images-b", 120, seed=1, text_only=1.1), name="b", images=root / "images-b")
    return a, b
