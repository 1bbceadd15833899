"""MoE-LLaVA on Phi-2, whose experts have biases; its template; configurations that are refused.

On StableLM-2 it has a row of ``whole_rows``, at one process and at TP 2 x PP 2 with sequence parallelism.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import ranks
from moe_llava_models import MOE_LLAVA, SOURCES, moe_llava_answers
from test_llava_original import convert_in
from test_whole import ABSOLUTE, GRADIENTS
from whole_source import write_reference

from megavlm.config.errors import UserError
from megavlm.config.load import load_recipe
from megavlm.families.known import FAMILIES
from megavlm.families.presets import expand_presets
from megavlm.weights.source import Source

pytestmark = pytest.mark.family("moe_llava")


@pytest.mark.long
def test_on_phi_it_is_its_written_out_model(tmp_path: Path) -> None:
    """Features, logits, the gradient of every parameter, steps and answers, at one process and in two stages."""
    source = SOURCES["phi"]
    source.save(tmp_path / "hf")
    ours = convert_in(tmp_path / "m", "--hf", tmp_path / "hf")
    recipe = load_recipe(ours / "recipe.yaml", [], expand_presets)
    assert recipe.model.language.expert_layers == (True, False) * 2
    reference = tmp_path / "reference.safetensors"
    write_reference(source, "moe_llava", recipe, reference)
    wanted = Source(reference)
    parameters = {key.removeprefix("gradient.") for key in wanted.tensors if key.startswith("gradient.")}
    assert sum(key.endswith(".bias") and ".local_experts." in key for key in parameters) == 2 * 4 * 2
    (one,) = ranks.run("whole_cases:prove", str(ours), str(reference), [], world=1, planned=False)
    layout = ["parallel.pipeline_model_parallel_size=2"]
    two = ranks.run("whole_cases:prove", str(ours), str(reference), layout, world=2, planned=False)
    assert set(one.packed) == set().union(*(rank.packed for rank in two)) == parameters
    for rank in (one, *two):
        assert max(rank.largest.values()) <= ABSOLUTE, rank.largest
        assert max(rank.packed.values()) <= GRADIENTS and max(rank.alone.values()) <= GRADIENTS
        assert rank.answers == [wanted.get(f"s{number}.answer").tolist() for number in range(3)]
        assert rank.steps == pytest.approx(one.steps, rel=5e-4)


def test_the_template_is_that_of_its_authors(tmp_path: Path) -> None:
    ours = convert_in(tmp_path / "m", "--hf", moe_llava_answers(tmp_path / "hf"))
    recipe = load_recipe(ours / "recipe.yaml", [], expand_presets)
    assert (recipe.model.template, recipe.model.image.kind) == ("vicuna_v1_endoftext", "pad")
    # As published, every second layer is a number and no list; weights of losses are a training's own.
    assert (recipe.model.language.moe_layer_freq, recipe.model.language.moe_aux_loss_coeff) == (2, 0.0)


@pytest.mark.parametrize(
    ("moe", "said"),
    [
        ({"top_k_experts": 1}, "top_k_experts is 1"),
        ({"use_residual": True}, "use_residual is True"),
        ({"moe_layers_idx": [2, 0]}, "moe_layers_idx is [2, 0]; it lists numbers of layers, 0 to 3, rising"),
        ({"moe_layers_idx": [0, 4]}, "moe_layers_idx is [0, 4]"),
        ({"num_experts": [4, 8]}, "num_experts is [4, 8]; one number"),
        ({"num_experts": [4]}, "num_experts is [4]; one number is known, once for each"),
        ({"num_experts": [1, 1]}, "a mixture has at least 2"),
    ],
)
def test_what_is_not_known_is_refused(moe: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = MOE_LLAVA["moe_llava_stablelm"][1](tmp_path / "hf") / "config.json"
    tree = json.loads(path.read_text())
    tree["moe"] |= moe
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError) as raised:
        FAMILIES["moe_llava"].branches(Source(tmp_path / "hf"))
    assert said in str(raised.value)


def test_families_know_their_own(tmp_path: Path) -> None:
    ours = convert_in(tmp_path / "m", "--hf", MOE_LLAVA["moe_llava_stablelm"][1](tmp_path / "hf"))
    model, family = load_recipe(ours / "recipe.yaml", [], expand_presets).model, FAMILIES["moe_llava"]
    assert family.refusal(model) is None and family.config(model, {})["moe"]["moe_layers_idx"] == [0, 2]
    for keys, said in (
        ({"num_moe_experts": None}, "has no experts"),
        ({"moe_router_topk": 1, "moe_router_pre_softmax": True}, "not a softmax over two experts"),
        ({"moe_ffn_hidden_size": 8}, "MoE-LLaVA has one width"),
        ({"moe_router_score_function": "sigmoid"}, "moe_router_score_function is 'sigmoid'"),
    ):
        other = dataclasses.replace(model, language=dataclasses.replace(model.language, **keys))
        assert said in str(family.refusal(other)), keys
    for name in ("bunny", "allava", "llava_original", "llava"):
        assert FAMILIES[name].refusal(model) is not None, name
