"""Adapters beside weights for text and for image tokens, against PEFT's on the written-out model, and at layouts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import levels_cases as cases
import pytest
import ranks
import test_visual_expert
import torch
import transformers_cases as theirs
from expert_reference import CogLanguage
from levels_cases import fill
from peft import LoraConfig, get_peft_model
from saved_tensors import saved_tensors
from test_visual_expert import BOTH, COG, FP32, OVERLAP, VIRTUAL, batch_of, canonical
from tiles_cases import picture_samples
from tiny import IMAGE_TOKEN
from torch import Tensor

from megavlm.architectures.adapters import frozen_linears
from megavlm.config.checks import check_recipe
from megavlm.config.errors import RecipeError
from megavlm.config.lora import known_targets
from megavlm.data.media import plan_of
from megavlm.models.build import build_model, unwrap
from megavlm.models.vlm import VisionLanguageModel
from megavlm.planning.activations import held_by
from megavlm.planning.flops import adapter_flops
from megavlm.planning.layout import layout_of
from megavlm.planning.parameters import chunk_parameters

ALL = ("all-linear",)
PUBLISHED = ("language_expert_query_key_value", "language_expert_dense")
SOME = ("vision_expert_dense", "language_mlp.gate_proj", "vision_mlp.up_proj", "down_proj", *PUBLISHED[:1])
"""Here the one kind, there the other, and once both; of gate and up one."""
TARGETS = {"all": ALL, "published": PUBLISHED, "some": SOME}


def lora_of(targets: tuple[str, ...], **more: Any) -> dict[str, Any]:
    return {"rank": 4, "alpha": 6, "targets": targets, **more}


def build(targets: tuple[str, ...]) -> VisionLanguageModel:
    torch.manual_seed(0)
    return unwrap(build_model(cases.recipe(**COG, lora=lora_of(targets)), IMAGE_TOKEN)[0])


OURS = {
    "query_key_value": "self_attention.linear_qkv", "dense": "self_attention.linear_proj",
    "gate_proj": "mlp.linear_fc1", "up_proj": "mlp.linear_fc1", "down_proj": "mlp.linear_fc2",
}  # fmt: skip


def pairs(model: VisionLanguageModel, reference: Any, field: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield name, and A or B (or their gradients) of every adapter, ours as PEFT has it, and PEFT's."""

    def of(parameter: Any) -> Tensor:
        found: Tensor = parameter.grad if field == "grad" else parameter.data
        return found

    layers = {(number, name): linear for number, name, linear in frozen_linears(model.language)}
    for name, module in reference.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        number, kind, last = int(name.split("layers.")[1].split(".")[0]), name.rpartition(".")[0], name.split(".")[-1]
        image = "vision" in (last if "expert" in last else kind)
        linear = layers[number, OURS[last.split("expert_")[-1]] + ".vision" * image]
        a, b = of(linear.lora_a), of(linear.lora_b)
        adapter = linear.adapter
        assert adapter is not None
        if last.endswith("query_key_value"):  # [q, k, v] of each head here, all queries first there
            b = b.unflatten(0, (4, 3, 16)).transpose(0, 1).flatten(0, 2)
        if last in ("gate_proj", "up_proj") and adapter.count == 2:
            part = int(last == "up_proj")
            a, b = a.chunk(2)[part], b.chunk(2)[part]
        yield f"{name}.A", a, of(module.lora_A["default"].weight)
        yield f"{name}.B", b, of(module.lora_B["default"].weight)


@pytest.mark.parametrize("name", TARGETS)
def test_logits_and_gradients_are_those_of_peft(name: str) -> None:
    """A pack, against PEFT's adapters on the written-out model, one sample at a time."""
    model, reference = build(TARGETS[name]), CogLanguage(512, 64, 4, 4, 96)
    theirs.fill(reference)
    load(model, canonical(dict(reference.named_parameters()), test_visual_expert.build()))
    fill(model)
    known = [target.path for target in known_targets(model.settings.language)]
    chosen = known if name == "all" else [one for one in known if any(one.endswith(end) for end in TARGETS[name])]
    pattern = "|".join(rf".*\.{one.replace('.', chr(92) + '.')}" for one in chosen)
    peft: Any = get_peft_model(reference, LoraConfig(r=4, lora_alpha=6, target_modules=pattern))  # type: ignore[arg-type]
    with torch.no_grad():
        for _, mine, its in pairs(model, peft, "data"):
            its.copy_(mine)
    made = [picture_samples(plan_of(model.settings), seed, [(9, 9)] * seed) for seed in (1, 2, 0)]
    batch = batch_of(model, made, sum(len(sample) for sample, _ in made))
    views = model.encode_images(batch.images)
    assert views is not None
    features = model.arranged(views).detach()
    parts, first = [], 0
    for start, end in itertools.pairwise(batch.packed_seq_params.cu_seqlens_q.tolist()):
        ids = batch.tokens[0, start:end]
        count = int((ids == IMAGE_TOKEN).sum())
        parts.append(reference(ids, features[first : first + count], IMAGE_TOKEN))
        first += count
    expected = torch.cat(parts)[None]
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(7))
    (expected * weights).sum().backward()
    logits = model(**{**batch.inputs(), "labels": None})
    theirs.close(logits, expected, "logits")
    (logits * weights).sum().backward()
    found = list(pairs(model, peft, "grad"))
    largest = max(float(its.abs().max()) for _, _, its in found)
    assert len(found) == 2 * 4 * len(chosen)
    for key, mine, its in found:
        assert (mine - its).abs().max() < 1e-5 * largest, key
    assert all(p.grad is None for key, p in model.named_parameters() if "lora_" not in key)


def load(model: VisionLanguageModel, weights: dict[str, Tensor]) -> None:
    """Give the model its weights, all but adapters."""
    left = {name: parameter for name, parameter in model.language.named_parameters() if "lora_" not in name}
    assert left.keys() == weights.keys()
    with torch.no_grad():
        for name, parameter in left.items():
            parameter[: len(weights[name])].copy_(weights[name])


WIDE = {**COG, "language": {**cases.COG, "hidden_size": 256, "ffn_hidden_size": 256, "kv_channels": 64}}
"""Whose shards are whole groups of 4-bit weights."""


@pytest.mark.long
def test_every_layout_trains_like_one_process(tmp_path: Path) -> None:
    """Plain, quantised, recomputed, with dropout's zeros, and resumed at another layout."""

    def job(lora: dict[str, Any], layout: dict[str, Any], model: dict[str, Any] = COG, **more: Any) -> dict[str, Any]:
        weights = tmp_path / ("wide" if model is WIDE else "cog") / "step-00000000"
        return {"parallel": layout, "weights": str(weights), "model": {**model, "lora": lora}, **more}

    for name, model in (("cog", COG), ("wide", WIDE)):
        bare = {"parallel": {}, "weights": str(tmp_path / name / "step-00000000"), "model": model}
        ranks.run("levels_cases:train", [bare], world=1)
    packed, some, every = lora_of(ALL, quantize="nf4"), lora_of(SOME), lora_of(ALL)
    single = [job(every, {}), job(some, {}), job(packed, {}, WIDE), job(lora_of(ALL), {}, WIDE)]
    again = job(some, {"recompute_granularity": "full"})
    ((all_of, some_of, quantised, exact, recomputed),) = ranks.run("levels_cases:train", [*single, again], world=1)
    assert recomputed["loss"] == pytest.approx(some_of["loss"], rel=1e-6)
    assert 1e-6 < abs(quantised["loss"][0] / exact["loss"][0] - 1) < 0.05  # rounded, and no more than that
    assert all_of["loss"][0] != some_of["loss"][0]
    cut = [
        job(every, BOTH), job(some, BOTH), job(packed, BOTH, WIDE), job(some, {**BOTH, **VIRTUAL}),
        job(some, {"tensor_model_parallel_size": 2}), job(some, OVERLAP),
        job(some, BOTH, steps=[0], saved=str(tmp_path / "saved")),
    ]  # fmt: skip
    expected = [all_of, some_of, quantised, some_of, some_of, some_of]
    saved = ""
    for rank in ranks.run("levels_cases:train", cut, world=4):
        for got, wanted in zip(rank, expected, strict=False):
            assert got["loss"] == pytest.approx(wanted["loss"], rel=FP32)
            assert got["norm"] == pytest.approx(wanted["norm"], rel=2 * FP32)
        saved = rank[-1]["saved"]
    ((rest,),) = ranks.run("levels_cases:train", [job(some, {}, resumed=saved, steps=[1])], world=1)
    assert rest["loss"] == pytest.approx(some_of["loss"][1:], rel=FP32)
    assert rest["norm"] == pytest.approx(some_of["norm"][1:], rel=2 * FP32)


@pytest.mark.parametrize("name", TARGETS)
def test_the_planner_counts_their_adapters(name: str) -> None:
    made = cases.recipe(**COG, lora=lora_of(TARGETS[name]))
    model, layout = build(TARGETS[name]), layout_of(made, 1)
    counted = [one for chunk in layout.chunks_of(0) for one in chunk_parameters(made, layout, chunk)]
    assert sum(one.elements for one in counted) == sum(p.numel() for p in model.parameters())
    learn = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(one.elements for one in counted if one.learns) == learn
    own = {key: p.numel() for key, p in model.named_parameters() if "lora_" in key}
    image = sum(number for key, number in own.items() if ".vision." in key)
    assert adapter_flops(made.model.language, made.lora, 7) == 2 * 7 * max(image, learn - image)
    samples = [picture_samples(plan_of(made.model), seed, [(9, 9)] * 2) for seed in (1, 2)]
    batch = batch_of(model, samples, cases.LENGTH)
    with saved_tensors(model.parameters()) as saved:
        model(**batch.inputs(with_labels=True))
    held = held_by(made, layout, layout.chunks[0], cases.LENGTH, batch.num_images)
    assert held.kept == pytest.approx(saved.bytes, rel=0.02)


def test_what_is_not_among_its_layers_is_named() -> None:
    """Attention to features beside text has no adapters, nor norms that learn beside them."""
    made = {**cases.AGENT, "lora": lora_of(("query",))}
    with pytest.raises(RecipeError) as raised:
        check_recipe(cases.recipe(**made), 1)
    assert "lora.targets: 'query' is none of the language model's layers" in str(raised.value)
    with pytest.raises(RecipeError) as raised:
        check_recipe(cases.recipe(**{**made, "lora": lora_of(ALL, train_norms=True)}), 1)
    assert "lora.train_norms: which norms learn" in str(raised.value)
