"""Every kind of decoder computes what its reference does: loss, logits, all gradients and answers, at two layouts."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from text_cases import ELSEWHERE, EXPERTS, LENGTHS, OTHERS, ROWS, branches_of, compare_all, kinds, recipe_of
from transformers import AutoConfig, AutoModelForCausalLM

from megavlm.config.errors import UserError
from megavlm.families.known import FAMILIES
from megavlm.families.mamba import mamba_language
from megavlm.families.text import TEXT_KINDS, no_half
from megavlm.families.text_kinds import chosen
from megavlm.weights.source import Source

OF_FAMILIES = {row.family: [name for name, one in ROWS.items() if one.family == row.family] for row in ROWS.values()}
MIXED = tuple(dict.fromkeys(ROWS[name].family for name in EXPERTS))
TP2_PP2 = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("text")
    return folder, branches_of(folder, list(ROWS))


def test_every_kind_has_a_row() -> None:
    assert kinds() == {row.preset for row in ROWS.values()} | ELSEWHERE
    assert TEXT_KINDS.keys() == kinds() - ELSEWHERE - OTHERS


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.preset not in OTHERS])
def test_a_configuration_that_is_written_anew_says_the_same(
    name: str, written: tuple[Path, dict[str, dict[str, Any]]]
) -> None:
    """Also to Transformers, which computes the same of it."""
    folder, branches = written
    kind, language = TEXT_KINDS[ROWS[name].preset], recipe_of(branches[name], {}).model.language
    assert chosen(list(TEXT_KINDS.values()), language) is kind
    tree = kind.write(language)
    assert kind.branch(tree, "config.json") == branches[name]
    if not kind.in_transformers:
        return
    config = AutoConfig.for_model(**{key: value for key, value in tree.items() if key != "architectures"})
    again = AutoModelForCausalLM.from_pretrained(folder / name, config=config, attn_implementation="eager")
    assert type(again).__name__ == tree["architectures"][0]
    found = Source(folder / f"{name}.safetensors")
    with torch.no_grad():
        logits = torch.cat([again(input_ids=one[None]).logits[0] for one in found.get("ids").split(LENGTHS)])
    torch.testing.assert_close(logits, found.get("logits"), rtol=0, atol=1e-5)


def test_mambas_configuration_that_is_written_anew_says_the_same(
    written: tuple[Path, dict[str, dict[str, Any]]],
) -> None:
    """Also to Transformers; what it cannot say is refused."""
    folder, branches = written
    model = recipe_of(branches["mamba"], {}).model
    tree = FAMILIES["mamba"].config(model, {})
    assert mamba_language(tree, "config.json") == branches["mamba"] and FAMILIES["mamba"].refusal(model) is None
    config = AutoConfig.for_model(**{key: value for key, value in tree.items() if key != "architectures"})
    assert (config.intermediate_size, config.time_step_rank) == (128, 5)
    again = AutoModelForCausalLM.from_pretrained(folder / "mamba", config=config)
    found = Source(folder / "mamba.safetensors")
    with torch.no_grad():
        logits = torch.cat([again(input_ids=one[None]).logits[0] for one in found.get("ids").split(LENGTHS)])
    torch.testing.assert_close(logits, found.get("logits"), rtol=0, atol=1e-5)
    for change in ({"use_bias": True}, {"residual_in_fp32": False}, {"hidden_size": None}):
        with pytest.raises(UserError, match=next(iter(change))):
            mamba_language({**tree, **change}, "config.json")
    # Of new weights alone: any, and what is written over a file leaves its own there.
    drawn = {"time_step_floor": 1e-3, "time_step_min": 0.01, "time_step_max": 0.2, "time_step_scale": 2.0}
    drawn |= {"time_step_init_scheme": "constant", "rescale_prenorm_residual": True}
    assert mamba_language({**tree, **drawn}, "config.json") == branches["mamba"] and not drawn.keys() & tree.keys()
    wide = dataclasses.replace(model, language=dataclasses.replace(model.language, intermediate_size=96))
    assert "no multiple of hidden_size" in str(FAMILIES["mamba"].refusal(wide))
    assert "architecture mamba" in str(FAMILIES["llama"].refusal(model))


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("phi", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("phi", {"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ("phi3", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope_type is 'longrope'"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ("gemma3_text", {"layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 2}, "layer_types has"),
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm is True"),
        ("stablelm", {"layer_norm_eps": None}, "has no 'layer_norm_eps'"),
        ("minicpm", {"scale_emb": "12"}, "scale_emb is '12', which is not a number"),
        ("internlm2", {"bias": True}, "bias is True"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise is 0.1"),
        ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok is 5; choose 1 to 4, the experts of a layer"),
        ("qwen3_moe", {"mlp_only_layers": [0, 4]}, "mlp_only_layers is [0, 4]; it lists numbers of layers, 0 to 3"),
        ("qwen3_moe", {"decoder_sparse_step": 5}, "leave none of 4 layers with experts"),
        ("glm4_moe", {"norm_topk_prob": False}, "norm_topk_prob is False"),
        ("glm4_moe", {"num_experts_per_tok": 1}, "num_experts_per_tok is 1, whose score is 1 in GLM-4.5"),
        ("glm4_moe", {"first_k_dense_replace": 4}, "first_k_dense_replace is 4; it is 0 to 3"),
        ("glm4_moe", {"topk_group": 2}, "2 experts of 2 groups (num_experts_per_tok, topk_group)"),
        ("glm4_moe", {"n_shared_experts": 0}, "n_shared_experts is 0; it is 1 to any number above"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob is True"),
        ("deepseek_v2", {"rope_scaling": {"type": "yarn", "factor": 40}}, "rope_scaling is {'type': 'yarn'"),
        ("deepseek_v2", {"num_key_value_heads": 2}, "num_key_value_heads is 2; only 4"),
        ("deepseek_v2", {"use_mla": False}, "use_mla is False"),
        ("deepseek_v2", {"qk_rope_head_dim": 0}, "qk_rope_head_dim is 0; it is 1 to any number above"),
        ("deepseek_v2", {"first_k_dense_replace": 4}, "first_k_dense_replace is 4; it is 0 to 3"),
        ("deepseek_v2_grouped", {"topk_group": 1}, "2 experts of 1 groups (num_experts_per_tok, topk_group)"),
        ("qwen3_moe", {"num_experts": 8}, "num_experts is 8 and num_local_experts 4"),
    ],
)
def test_what_is_not_known_is_refused(
    name: str, change: dict[str, Any], words: str, written: tuple[Path, dict[str, dict[str, Any]]]
) -> None:
    config = json.loads((written[0] / name / "config.json").read_text())
    with pytest.raises(UserError, match=re.escape(words)):
        TEXT_KINDS[ROWS[name].preset].branch({**config, **change}, "config.json")


@pytest.mark.parametrize("name", [name for name, kind in TEXT_KINDS.items() if kind.in_transformers])
def test_what_a_text_config_may_leave_out_is_as_its_class_has_it(name: str) -> None:
    defaults, own = TEXT_KINDS[name].defaults, AutoConfig.for_model(name)
    assert defaults and {key: getattr(own, key) for key in defaults} == defaults


@pytest.mark.parametrize("name", [name for name in EXPERTS if ROWS[name].family not in ("glm4_moe", "deepseek_v2")])
def test_experts_of_a_text_config(name: str, written: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    """Their number under either name; what it leaves out is as its class in Transformers has it."""
    folder, branches = written
    kind, config = TEXT_KINDS[ROWS[name].preset], json.loads((folder / name / "config.json").read_text())
    count, own = config.pop("num_local_experts"), AutoConfig.for_model(kind.model_type)
    for key in ("num_experts", "num_local_experts"):
        assert kind.branch({**kind.defaults, **config, key: count}, "config.json") == branches[name]
    del config["rope_parameters"]
    found = kind.branch({**kind.defaults, **config}, "config.json")
    assert (found["num_moe_experts"], found["rotary_base"]) == (own.num_experts, own.rope_parameters["rope_theta"])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("phi", "output layer has a bias"),
        ("minicpm", "embedding_multiplier is 12.0, that of Llama is 1.0"),
    ],
)
def test_what_transformers_composes_no_model_of_is_refused(
    name: str, reason: str, written: tuple[Path, dict[str, dict[str, Any]]]
) -> None:
    assert reason in str(no_half(recipe_of(written[1][name], {}).model.language))


@pytest.mark.proves("tp2_pp2_sp", of=OF_FAMILIES)
def test_all_kinds_at_one_process(written: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    folder, branches = written
    assert {name: branch["preset"] for name, branch in branches.items()} == {n: row.preset for n, row in ROWS.items()}
    found = compare_all(branches, str(folder), {})
    assert found.keys() == ROWS.keys()


def test_layers_that_are_recomputed(written: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    """Of those that are more than Megatron-Core's own: side by side, norms behind branches, multiplied branches."""
    folder, branches = written
    own = {name: branches[name] for name in ("phi", "gemma3_text", "minicpm", "mamba", "deepseek_v2_grouped")}
    assert compare_all(own, str(folder), {"recompute_granularity": "full"}).keys() == own.keys()
    del own["mamba"]  # which has no attention to make again
    assert compare_all(own, str(folder), {"recompute_granularity": "selective"}).keys() == own.keys()


def test_layers_of_two_kinds_in_four_chunks(written: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    """Each chunk of a virtual pipeline has its own layers of the pattern."""
    folder, branches = written
    layout = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
    own = {"gemma3_text": branches["gemma3_text"]}
    results = ranks.run("text_cases:compare_all", own, str(folder), layout, world=2)
    assert [sum("layers." in key for key in found["gemma3_text"]) > 0 for found in results] == [True, True]


@pytest.mark.proves("tp2_pp2_sp", of={name: rows for name, rows in OF_FAMILIES.items() if name not in MIXED})
def test_all_kinds_at_tp2_pp2_with_sequence_parallelism(written: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    """In one start of ranks; together they compare every parameter."""
    folder, branches = written
    own = {name: branch for name, branch in branches.items() if name not in EXPERTS}
    results = ranks.run("text_cases:compare_all", own, str(folder), TP2_PP2, world=4, timeout=600)
    for name in own:
        there = {key for found in results for key in found[name]}
        assert sum("layers." in key for key in there) == 4 * sum("layers.0." in key for key in there) > 0


@pytest.mark.proves("tp2_pp2_sp", of={name: [row for row in EXPERTS if ROWS[row].family == name] for name in MIXED})
def test_experts_at_tp2_pp2_with_sequence_and_expert_parallelism(
    written: tuple[Path, dict[str, dict[str, Any]]],
) -> None:
    """Each tensor-parallel rank has half of the experts, whole; each stage layers of both sorts."""
    folder, branches = written
    layout = {**TP2_PP2, "expert_model_parallel_size": 2}
    own = {name: branches[name] for name in EXPERTS}
    results = ranks.run("text_cases:compare_all", own, str(folder), layout, world=4, timeout=600)
    for name in EXPERTS:
        there = [set(found[name]) for found in results]
        kept = Source(folder / f"{name}.safetensors").tensors
        wanted = {key.removeprefix("weight.") for key in kept if key.startswith("weight.")}
        assert set.union(*there) == wanted
        experts = {key for key in wanted if ".local_experts." in key}
        assert sum(len(keys & experts) for keys in there) == len(experts) > 0, "no expert lies on two ranks"
