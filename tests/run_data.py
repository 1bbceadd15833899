"""A small data set, tokenizer and recipe on disk, for tests that run ``megavlm`` itself."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from megavlm.commands import prepare
from megavlm.config.load import load_recipe
from megavlm.config.schema import Recipe
from megavlm.data.tokenizer import train_sentencepiece
from megavlm.families.presets import expand_presets
from megavlm.quickstart.render import render_dataset

RECIPE = """
output_dir: {root}/run
model:
  preset: tiny
  vision: {{image_size: 32, patch_size: 8, hidden_size: 48, num_layers: 2, ffn_hidden_size: 96, positional_grid: 4}}
  connector: {{num_queries: 4, head_dim: 16}}
  language: {{hidden_size: 64, ffn_hidden_size: 96, kv_channels: 16, vocab_size: 512}}
data:
  train:
    - {{path: {root}/train, name: pictures}}
  validation:
    - {{path: {root}/heldout}}
  tokenizer: {root}/tokenizer.model
  sequence_length: 192
  num_workers: 0
  packing_buffer_size: 32
  shuffle_buffer_size: 32
optimizer: {{lr: 2e-3, warmup_steps: 2}}
training:
  train_steps: 6
  global_batch_size: 2
  precision: fp32
  validation_packs: 4
logging: {{log_interval: 1, panel_samples: 3, panel_max_new_tokens: 4}}
"""


@dataclass(frozen=True)
class RunData:
    """Where everything lies."""

    root: Path
    images: Path
    heldout_json: Path

    def words(self, output: Path, *overrides: str) -> list[str]:
        """Return the arguments of ``megavlm train``."""
        return ["train", str(self.root / "recipe.yaml"), f"output_dir={output}", *overrides]

    def recipe(self, output: Path, *overrides: str) -> Recipe:
        """Return the recipe itself."""
        return load_recipe(self.root / "recipe.yaml", [f"output_dir={output}", *overrides], expand_presets)


def make_run_data(root: Path) -> RunData:
    """Render, train a tokenizer, prepare."""
    rendered = render_dataset(root / "raw", train_images=160, heldout_images=24, image_size=32, seed=1)
    records = json.loads(rendered.train_json.read_text())
    texts = [turn["value"] for record in records for turn in record["conversations"]]
    train_sentencepiece(texts, root / "tokenizer.model", 448)
    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    for name, source in (("train", rendered.train_json), ("heldout", rendered.heldout_json)):
        prepare.run(parser.parse_args([str(source), f"--images={rendered.images_dir}", f"--out={root / name}"]))
    (root / "recipe.yaml").write_text(RECIPE.format(root=root))
    return RunData(root, rendered.images_dir, rendered.heldout_json)
