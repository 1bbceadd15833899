"""A small recipe to break, and the real command line to break it with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megavlm import cli
from megavlm.config.load import load_recipe
from megavlm.config.schema import Recipe
from megavlm.families.presets import expand_presets

TINY = """\
output_dir: {root}/run
model:
  preset: tiny
data:
  train:
    - path: {root}/train
  tokenizer: {root}/tokenizer.model
  sequence_length: 256
optimizer:
  lr: 1e-3
training:
  train_steps: 10
  global_batch_size: 8
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    """A recipe whose files exist."""
    (tmp_path / "train" / ".nv-meta").mkdir(parents=True)
    (tmp_path / "tokenizer.model").write_text("tokenizer")
    path = tmp_path / "recipe.yaml"
    path.write_text(TINY.format(root=tmp_path))
    return path


@pytest.fixture
def load(recipe_file: Path) -> Callable[..., Recipe]:
    """Load that recipe with overrides."""
    return lambda *overrides: load_recipe(recipe_file, overrides, expand_presets)


@pytest.fixture
def refused(
    recipe_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[str]]:
    """Run ``megavlm train`` with overrides, which must exit with 2, and return the lines on stderr."""

    def run(*overrides: str, recipe: object = recipe_file, world_size: int = 1) -> list[str]:
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        monkeypatch.delenv("RANK", raising=False)
        monkeypatch.setattr("megavlm.commands.train.train", _unexpected)
        assert cli.main(["train", str(recipe), *overrides]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        lines = captured.err.splitlines()
        assert lines and all(line.startswith("megavlm: error: ") for line in lines)
        return [line.removeprefix("megavlm: error: ") for line in lines]

    return run


def _unexpected(recipe: Recipe) -> None:
    raise AssertionError("a wrong recipe got as far as training")
