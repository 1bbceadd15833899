"""Bunny, Imp, Mipha, LLaVA-Phi, ALLaVA: every combination against its written-out model, templates, S2, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import ranks
from llava_like_models import LLAVA_LIKE, like_answers, sources
from test_llava_original import convert_in, edit, equal, refused, tensors
from test_whole import ABSOLUTE, GRADIENTS
from whole_source import write_reference

from megavlm.config.load import load_recipe
from megavlm.families.presets import expand_presets
from megavlm.weights.source import Source

COMBINATIONS = [pytest.param(name, marks=pytest.mark.family(family)) for name, (family, _) in LLAVA_LIKE.items()]


@pytest.mark.parametrize("name", COMBINATIONS)
def test_a_combination_is_its_written_out_model(name: str, tmp_path: Path) -> None:
    """Features, logits, the gradient of every parameter, packed and alone, steps and answers, at one process."""
    family = LLAVA_LIKE[name][0]
    source = sources(family)[name]
    source.save(tmp_path / "hf")
    ours = convert_in(tmp_path / "m", "--hf", tmp_path / "hf")
    recipe = load_recipe(ours / "recipe.yaml", [], expand_presets)
    reference = tmp_path / "reference.safetensors"
    write_reference(source, family, recipe, reference)
    wanted = Source(reference)
    (found,) = ranks.run("whole_cases:prove", str(ours), str(reference), [], world=1, planned=False)
    assert max(found.largest.values()) <= ABSOLUTE, found.largest
    parameters = {key.removeprefix("gradient.") for key in wanted.tensors if key.startswith("gradient.")}
    assert set(found.packed) == set(found.alone) == parameters
    worst = {key: value for one in (found.packed, found.alone) for key, value in one.items() if value > GRADIENTS}
    assert not worst
    assert found.loss == pytest.approx((float(wanted.get("mean_loss")),) * 2, rel=1e-5)
    assert found.answers == [wanted.get(f"s{number}.answer").tolist() for number in range(3)]
    assert found.steps[0] > found.steps[1] > found.steps[2]
