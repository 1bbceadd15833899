"""Language layers with weights for image tokens, whose positions they share, against a written-out reference."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import levels_cases as cases
import numpy as np
import pytest
import ranks
import torch
import transformers_cases as theirs
from expert_reference import CogLanguage, expert_mask, positions, token_types
from saved_tensors import saved_tensors
from tiles_cases import picture_samples
from tiny import IMAGE_TOKEN

from megavlm.architectures.cost import decoder_cost
from megavlm.architectures.decoders.decoder.tables import COGVLM_LANGUAGE
from megavlm.config.checks import check_recipe
from megavlm.config.errors import RecipeError
from megavlm.data.batch import IGNORE_INDEX, make_pack
from megavlm.data.device_batch import Batch, make_batch
from megavlm.data.media import arrange, plan_of
from megavlm.data.packing import build_pack
from megavlm.data.positions import positions_of
from megavlm.data.spans import spans_of
from megavlm.layers.visual_expert import kind_rows
from megavlm.models.build import build_model, unwrap
from megavlm.models.vlm import VisionLanguageModel
from megavlm.planning.activations import held_by
from megavlm.planning.layout import layout_of
from megavlm.planning.parameters import chunk_parameters
from megavlm.weights.rules import Heads

FP32 = 1e-5
COG: dict[str, Any] = {"levels": (), "language": cases.COG}


def build() -> VisionLanguageModel:
    torch.manual_seed(0)
    return unwrap(build_model(cases.recipe(**COG), IMAGE_TOKEN)[0])


def batch_of(model: VisionLanguageModel, made: list[Any], length: int) -> Batch:
    plan, settings = plan_of(model.settings), model.settings
    own, spans = positions_of(settings, IMAGE_TOKEN), spans_of(settings, IMAGE_TOKEN)
    pack = build_pack([sample for sample, _ in made], length, 3, plan, own, spans)
    pixels = torch.from_numpy(np.concatenate([pixels for _, pixels in made]))
    return make_batch(pack, pixels, torch.device("cpu"), arrange(plan, pack.layouts(plan) or []))


def canonical(state: dict[str, torch.Tensor], model: VisionLanguageModel) -> dict[str, torch.Tensor]:
    """Return tensors of published names by those of our parameters, by the table of names."""
    slots = {f"language.{name}": None for name, _ in model.language.named_parameters()}
    heads, found, taken = Heads.of("language", model.settings), dict[str, torch.Tensor](), set[str]()
    for rule in COGVLM_LANGUAGE.rules(slots, 4):
        values = rule.reshape.to_ours([state[one] for one in rule.theirs], heads)
        found |= {one.removeprefix("language."): value for one, value in zip(rule.ours, values, strict=True)}
        back = rule.reshape.to_theirs(values, heads)
        assert all(torch.equal(state[one], value) for one, value in zip(rule.theirs, back, strict=True))
        taken |= set(rule.theirs)
    assert taken == set(state) and len(found) == len(slots)
    return found


def test_logits_and_gradients_are_those_of_the_written_out_model() -> None:
    """A pack, against one sample at a time."""
    model = build()
    made = [picture_samples(plan_of(model.settings), seed, [(9, 9)] * seed) for seed in (1, 2, 0)]
    batch = batch_of(model, made, sum(len(sample) for sample, _ in made))
    reference = CogLanguage(512, 64, 4, 4, 96)
    theirs.fill(reference)
    theirs.load(model.language, canonical(dict(reference.named_parameters()), model))
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
    theirs.same_gradients(model.language, canonical(theirs.gradients_of(reference), model))


def test_without_pictures_the_weights_of_images_have_gradients_of_zero() -> None:
    model = build()
    made = [picture_samples(plan_of(model.settings), seed, []) for seed in (1, 2)]
    batch = batch_of(model, made, 96)
    out = model(**batch.inputs(with_labels=True))
    (out * (batch.labels != IGNORE_INDEX)).sum().backward()
    own = {name: p.grad for name, p in model.named_parameters() if ".vision.weight" in name}
    assert len(own) == 4 * 4 and all(one is not None and not one.any() for one in own.values())


@pytest.mark.parametrize("seed", range(20))
def test_positions_and_kinds_are_those_of_the_written_out_model(seed: int) -> None:
    """Of samples that begin and end with pictures of any length, in a pack with padding."""
    rng, settings = np.random.default_rng(seed), cases.recipe(**COG).model
    samples = [np.where(rng.random(rng.integers(1, 12)) < 0.7, IMAGE_TOKEN, 5) for _ in range(4)]
    own, spans = positions_of(settings, IMAGE_TOKEN), spans_of(settings, IMAGE_TOKEN)
    pack = make_pack(samples, 50, positions=own, spans=spans)
    batch = make_batch(pack, None, torch.device("cpu"))
    types = [token_types(torch.from_numpy(one), IMAGE_TOKEN) for one in samples]
    rest = 50 - sum(map(len, samples))
    expected = torch.cat([*(positions(one) for one in types), torch.arange(rest)])
    assert torch.equal(batch.position_ids[0], expected)
    rows = kind_rows(batch.packed_seq_params, torch.device("cpu"))
    masks = torch.cat([*(expert_mask(one) for one in types), torch.zeros(rest, dtype=torch.bool)])
    assert rows is not None and torch.equal(rows.image, masks.nonzero()[:, 0])
    assert torch.equal(torch.cat([rows.text, rows.image])[rows.back], torch.arange(50))


PP2 = {"pipeline_model_parallel_size": 2}
BOTH = {**PP2, "tensor_model_parallel_size": 2, "sequence_parallel": True}
VIRTUAL = {"virtual_pipeline_model_parallel_size": 2, "recompute_granularity": "full", "sequence_parallel": False}

OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True, "ddp_bucket_size": 9000}
"""Small buckets: weights of a step's second half are on their way while its first layers run."""


def jobs(folder: Path, *parallel: dict[str, Any]) -> list[dict[str, Any]]:
    weights = str(folder / "cog" / "step-00000000")
    return [{"parallel": one, "weights": weights, "model": COG} for one in parallel]


def test_two_stages_of_two_ranks_train_like_one_process(tmp_path: Path) -> None:
    trained_alike(tmp_path, BOTH, OVERLAP)


@pytest.mark.long
def test_chunks_recomputed_train_and_answer_like_one_process(tmp_path: Path) -> None:
    trained_alike(tmp_path, {**BOTH, **VIRTUAL})
    asked = jobs(tmp_path, {})
    ((answers, plain),) = ranks.run("levels_cases:answer", [*asked, {**asked[0], "plain": True}], world=1)
    assert plain == answers and len({tuple(one) for one in answers}) > 2
    for rank in ranks.run("levels_cases:answer", jobs(tmp_path, BOTH), world=4):
        assert rank == [answers]


def trained_alike(folder: Path, *layouts: dict[str, Any]) -> None:
    ((alone, again),) = ranks.run("levels_cases:train", jobs(folder, {}, {"recompute_granularity": "full"}), world=1)
    for key in ("loss", "norm"):
        assert again[key] == pytest.approx(alone[key], rel=1e-6)
    for rank in ranks.run("levels_cases:train", jobs(folder, *layouts), world=4):
        for got in rank:
            assert got["loss"] == pytest.approx(alone["loss"], rel=FP32)
            assert got["norm"] == pytest.approx(alone["norm"], rel=FP32)
            for part, value in got["sums"].items():
                if not part.startswith("language."):  # layers have the numbers of their stage
                    assert value == pytest.approx(alone["sums"][part], rel=1e-4), part


@pytest.mark.parametrize("tensor", [1, 2])
def test_the_planner_counts_both_weights(tensor: int) -> None:
    made = cases.recipe(**COG, tensor_model_parallel_size=tensor)
    layout = layout_of(made, tensor)
    counted = sum(one.elements for chunk in layout.chunks_of(0) for one in chunk_parameters(made, layout, chunk))
    plain = cases.recipe(levels=(), language={**cases.COG, "visual_expert": False}, tensor_model_parallel_size=tensor)
    without = sum(one.elements for chunk in layout.chunks_of(0) for one in chunk_parameters(plain, layout, chunk))
    assert counted - without == 4 * (3 * 64 * 64 + 64 * 64 + 3 * 64 * 96) // tensor
    if tensor == 1:
        assert counted == sum(p.numel() for p in build().parameters())
    cost = decoder_cost(made.model.language)
    assert cost.layer_work(made.model.language, 9, 9) == cost.layer_work(plain.model.language, 9, 9)


@pytest.mark.parametrize(
    ("keys", "more", "line"),
    [
        ({"add_qkv_bias": True}, {}, "visual_expert: linear layers with a bias have one weight"),
        ({"attention_mask": "images"}, {}, "visual_expert: goes with model.language.attention_mask causal"),
        ({"rotary_sections": (3, 3, 2)}, {}, "image_positions: shared goes without model.language.rotary_sections"),
        ({"gated_linear_unit": False, "activation": "gelu"}, {}, "visual_expert: is for an MLP with a gate"),
        (
            {},
            {"context_parallel_size": 2},
            "is not proven with weights of their own for image tokens (model.language.visual_expert)",
        ),
        ({}, {"levels": (0,)}, "deepstack_layers: the language model 'llama' adds nothing behind its layers"),
    ],
)
def test_what_does_not_go_with_it_is_named(keys: dict[str, Any], more: dict[str, Any], line: str) -> None:
    with pytest.raises(RecipeError) as raised:
        check_recipe(
            cases.recipe(**{**COG, "language": {**cases.COG, **keys}, **more}), 2 if "context" in str(more) else 1
        )
    assert line in str(raised.value)


def test_what_is_kept_is_what_autograd_keeps() -> None:
    made = cases.recipe(**COG)
    model = unwrap(build_model(made, IMAGE_TOKEN)[0])
    samples = [picture_samples(plan_of(made.model), seed, [(9, 9)] * 2) for seed in (1, 2)]
    batch = batch_of(model, samples, cases.LENGTH)
    with saved_tensors(model.parameters()) as saved:
        model(**batch.inputs(with_labels=True))
    layout = layout_of(made, 1)
    held = held_by(made, layout, layout.chunks[0], cases.LENGTH, batch.num_images)
    assert held.kept == pytest.approx(saved.bytes, rel=0.02)
