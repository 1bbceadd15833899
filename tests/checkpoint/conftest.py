"""One tiny conversion that many tests copy."""

from __future__ import annotations

import shutil
from pathlib import Path

import hf_makers
import pytest


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with ``hf``, and ``m`` converted from it: to be copied, not changed."""
    root = tmp_path_factory.mktemp("converted")
    hf_makers.megatron(hf_makers.write(root / "hf"), root / "m")
    return root


@pytest.fixture
def checkpoint(converted: Path, tmp_path: Path) -> Path:
    """A Megatron checkpoint that a test may damage."""
    return Path(shutil.copytree(converted / "m", tmp_path / "m"))


@pytest.fixture
def source(converted: Path, tmp_path: Path) -> Path:
    """A Hugging Face directory that a test may damage."""
    return Path(shutil.copytree(converted / "hf", tmp_path / "hf"))
