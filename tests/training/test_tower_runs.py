"""Every tower trains with any connector and language model that take what it gives, by recipe keys alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import ranks
from tower_run_cases import MODELS, recipe_of

from megavlm.config.split import tensor_ranks

WIDE = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True}


def test_three_steps_at_tp_2_and_pp_2_are_those_of_one_process(tmp_path: Path) -> None:
    """Weights go from one to the other by a checkpoint: of towers that are cut, and of one that is whole on a rank."""
    (alone,) = ranks.run("tower_run_cases:train", str(tmp_path), {}, world=1, timeout=600)
    wide = ranks.run("tower_run_cases:train", str(tmp_path), WIDE, world=4, timeout=600)
    assert set(alone) == set(MODELS)
    cut = {name: tensor_ranks(recipe_of(name).model, "vision", 2) for name in MODELS}
    assert {name for name, ranks_of in cut.items() if ranks_of == 1} == {"eva02-whole"}
    for found in wide:
        for name, steps in alone.items():
            for one, other in zip(found[name], steps, strict=True):
                assert one == pytest.approx(other, rel=5e-5), name
    for name, steps in alone.items():
        assert all(norm > 0 for _, norm in steps), name
