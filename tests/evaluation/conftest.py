"""A checkpoint of a tiny model with large random weights: its answers depend on pictures and words."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_data import RunData

WIDE = ("model.language.init_method_std=0.15", "model.connector.init_method_std=0.15", "data.sequence_length=256")


@pytest.fixture(scope="session")
def random_checkpoint(run_data: RunData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from megavlm.checkpoint.distributed import save_weights
    from megavlm.config.help import to_yaml
    from megavlm.data.tokenizer import load_tokenizer
    from megavlm.models.build import build_model, unwrap
    from megavlm.parallel.state import process_groups

    root = tmp_path_factory.mktemp("random")
    recipe = run_data.recipe(root, *WIDE)
    tokenizer = load_tokenizer(recipe.data.tokenizer)
    with process_groups(recipe.parallel, 5):
        chunks = build_model(recipe, tokenizer.imgpad_id)
        return save_weights(root, [unwrap(chunk) for chunk in chunks], recipe_yaml=to_yaml(recipe))
