"""Layers with a visual expert that attend to features of a second tower too, against a written-out reference."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import levels_cases as cases
import pytest
import ranks
import torch
import transformers_cases as theirs
from expert_reference import CogLanguage
from saved_tensors import saved_tensors
from test_visual_expert import BOTH, FP32, VIRTUAL, batch_of
from tiles_cases import picture_samples
from tiny import IMAGE_TOKEN

from megavlm.architectures.cost import decoder_cost
from megavlm.architectures.decoders.decoder.tables import COGAGENT_LANGUAGE
from megavlm.config.checks import check_recipe
from megavlm.config.errors import RecipeError
from megavlm.config.schema import Recipe
from megavlm.data.batch import IGNORE_INDEX
from megavlm.data.media import plan_of
from megavlm.layers.cross import last_sights, sights
from megavlm.layers.cross_beside import tell_samples
from megavlm.models.build import build_model, unwrap
from megavlm.models.streams import PictureStream
from megavlm.models.vlm import VisionLanguageModel
from megavlm.planning.activations import held_by
from megavlm.planning.layout import layout_of
from megavlm.planning.parameters import chunk_parameters
from megavlm.weights.rules import Heads

AGENT = cases.AGENT
FEATURES, WIDTH, SLOTS = 16, 24, 6
"""Of the second tower and a picture; slots of a picture among the tokens."""


def build() -> VisionLanguageModel:
    torch.manual_seed(0)
    return unwrap(build_model(cases.recipe(**AGENT), IMAGE_TOKEN)[0])


def made_samples(model: VisionLanguageModel, counts: tuple[int, ...]) -> list[Any]:
    return [picture_samples(plan_of(model.settings), seed, [(9, 9)] * n) for seed, n in enumerate(counts)]


def canonical(state: dict[str, torch.Tensor], model: VisionLanguageModel) -> dict[str, torch.Tensor]:
    """Return tensors of published names by those of our parameters, by the table of names, there and back."""
    slots = {f"language.{name}": None for name, _ in model.language.named_parameters()}
    heads, found, taken = Heads.of("language", model.settings), dict[str, torch.Tensor](), set[str]()
    for rule in COGAGENT_LANGUAGE.rules(slots, 4):
        values = rule.reshape.to_ours([state[one] for one in rule.theirs], heads)
        found |= {one.removeprefix("language."): value for one, value in zip(rule.ours, values, strict=True)}
        back = rule.reshape.to_theirs(values, heads)
        assert all(torch.equal(state[one], value) for one, value in zip(rule.theirs, back, strict=True))
        taken |= set(rule.theirs)
    assert taken == set(state) and len(found) == len(slots)
    return found


def test_logits_and_gradients_are_those_of_the_written_out_model() -> None:
    """A pack, against one sample at a time: with one picture, two, none, and one again; features' gradients too."""
    model = build()
    made = made_samples(model, (1, 2, 0, 1))
    batch = batch_of(model, made, sum(len(sample) for sample, _ in made))
    reference = CogLanguage(512, 64, 4, 4, 96, (WIDTH, 32))
    theirs.fill(reference)
    theirs.load(model.language, canonical(dict(reference.named_parameters()), model))
    views = model.encode_images(batch.images)
    assert views is not None and views.shape == (SLOTS, 4, 64 + 4 * WIDTH)
    features_TX = model.arranged(views).detach().requires_grad_()
    again_TX = features_TX.detach().clone().requires_grad_()
    parts, first = [], 0
    for start, end in itertools.pairwise(batch.packed_seq_params.cu_seqlens_q.tolist()):
        ids = batch.tokens[0, start:end]
        count = int((ids == IMAGE_TOKEN).sum())
        own_TX = again_TX[first : first + count]
        beside_FC = own_TX[:, 64:].unflatten(0, (-1, SLOTS))[:, :4].reshape(-1, WIDTH)
        parts.append(reference(ids, own_TX[:, :64], IMAGE_TOKEN, beside_FC if count else None))
        first += count
    expected = torch.cat(parts)[None]
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(7))
    (expected * weights).sum().backward()
    inputs = batch.inputs()
    for name in ("images", "image_index", "image_weight"):
        inputs.pop(name, None)
    logits = model(**{**inputs, "labels": None, "image_features": features_TX})
    theirs.close(logits, expected, "logits")
    (logits * weights).sum().backward()
    theirs.same_gradients(model.language, canonical(theirs.gradients_of(reference), model))
    assert features_TX.grad is not None and again_TX.grad is not None
    theirs.close(features_TX.grad, again_TX.grad, "gradients of features")
    assert again_TX.grad[:, 64:].abs().max() > 0


def test_the_second_towers_features_are_in_the_order_of_the_firsts_patches() -> None:
    """What goes past the connector is what the second tower makes, four features beside each patch."""
    model = build()
    batch = batch_of(model, made_samples(model, (1,)), 17)
    assert batch.images is not None
    views = model.encode_images(batch.images)
    assert views is not None
    with torch.no_grad():
        high = model.vision.high(model.vision._renderings(batch.images)[1])[:, 0].view(4, 4, WIDTH)
    blocks = high.unflatten(1, (2, 2)).unflatten(0, (2, 2)).transpose(1, 2).reshape(4, 4 * WIDTH)
    assert torch.equal(views[:4, 0, 64:], blocks) and not views[4:, 0, 64:].any()


def test_pictures_are_seen_by_their_own_sample_alone_and_by_all_of_it() -> None:
    model = build()
    made = made_samples(model, (1, 2, 0))
    length = sum(len(sample) for sample, _ in made)
    batch = batch_of(model, made, length)
    packed = batch.packed_seq_params
    tell_samples(packed, SLOTS, FEATURES)
    first, second = (len(sample) for sample, _ in made[:2])
    assert [tuple(one) for one in sights(packed)] == [(0, first, 0, 1), (first, first + second, 1, 3)]
    assert last_sights(packed) == [(0, 16), (16, 48), None]
    with torch.no_grad():
        whole = model(**{**batch.inputs(), "labels": None})
        other = batch_of(model, [(one, pixels if i else 255 - pixels) for i, (one, pixels) in enumerate(made)], length)
        changed = (model(**{**other.inputs(), "labels": None}) - whole)[0].abs().amax(-1) > 1e-5
    assert changed[:first].all() and not changed[first:].any()  # words in front of a picture see it too
    with pytest.raises(ValueError, match="each picture has 7"):
        tell_samples(packed, 7, FEATURES)


def test_without_pictures_they_have_gradients_of_zero_and_nothing_changes() -> None:
    model = build()
    batch = batch_of(model, made_samples(model, (0, 0)), 96)
    with torch.no_grad():
        quiet = model.eval()(**batch.inputs(with_labels=True))
    out = model.train()(**batch.inputs(with_labels=True))
    torch.testing.assert_close(out, quiet, rtol=0, atol=FP32)
    (out * (batch.labels != IGNORE_INDEX)).sum().backward()
    parts = ("cross_attention", "cross_attn_layernorm", "vision.weight")
    own = {n: p.grad for n, p in model.named_parameters() if n.startswith("vision") or any(one in n for one in parts)}
    assert len(own) > 4 * 8 and all(one is not None and not one.any() for one in own.values())


def test_narrow_features_go_over_boundaries_in_rows_of_the_stream() -> None:
    chunk = PictureStream.of_chunk(range(4), 0, 2, WIDTH)
    hidden, features = torch.ones(4, 1, 64), torch.arange(5.0 * WIDTH).view(5, 1, WIDTH)
    assert [chunk.rows_for(one, 64) for one in (0, 1, 5, 16)] == [0, 1, 2, 6]
    chunk.rows = 6
    sent = chunk.join(hidden, features)
    assert sent.shape == (10, 1, 64)
    back, found = chunk.split(sent, 5)
    assert torch.equal(back, hidden) and found is not None and torch.equal(found, features)


def jobs(folder: Path, *parallel: dict[str, Any]) -> list[dict[str, Any]]:
    weights = str(folder / "agent" / "step-00000000")
    return [{"parallel": one, "weights": weights, "model": AGENT} for one in parallel]


@pytest.mark.long
def test_every_layout_trains_and_answers_like_one_process(tmp_path: Path) -> None:
    ((alone, again),) = ranks.run("levels_cases:train", jobs(tmp_path, {}, {"recompute_granularity": "full"}), world=1)
    for key in ("loss", "norm"):
        assert again[key] == pytest.approx(alone[key], rel=1e-6)
    half = {"pipeline_model_parallel_size": 2, **VIRTUAL}
    for rank in ranks.run("levels_cases:train", jobs(tmp_path, BOTH, {**BOTH, **VIRTUAL}, half), world=4):
        for got in rank:
            assert got["loss"] == pytest.approx(alone["loss"], rel=FP32)
            assert got["norm"] == pytest.approx(alone["norm"], rel=FP32)
            for part, value in got["sums"].items():
                if not part.startswith("language."):  # layers have the numbers of their stage
                    assert value == pytest.approx(alone["sums"][part], rel=1e-4), part
    asked = jobs(tmp_path, {})
    ((answers, plain),) = ranks.run("levels_cases:answer", [*asked, {**asked[0], "plain": True}], world=1)
    assert plain == answers and len({tuple(one) for one in answers}) > 2
    for rank in ranks.run("levels_cases:answer", jobs(tmp_path, BOTH, half), world=4):
        assert rank == [answers, answers]


@pytest.mark.parametrize("tensor", [1, 2])
def test_the_planner_counts_them(tensor: int) -> None:
    made = cases.recipe(**AGENT, tensor_model_parallel_size=tensor)
    layout = layout_of(made, tensor)
    counted = sum(one.elements for chunk in layout.chunks_of(0) for one in chunk_parameters(made, layout, chunk))
    if tensor == 1:
        assert counted == sum(p.numel() for p in build().parameters())
    with_them = decoder_cost(made.model.language).layer_parameters(made.model.language, tensor)
    without = cases.recipe(levels=(), language=cases.COG, tensor_model_parallel_size=tensor).model.language
    more = sum(with_them) - sum(decoder_cost(without).layer_parameters(without, tensor))
    assert more == 64 + (64 * 32 + 2 * WIDTH * 32 + 32 * 64) // tensor
    halves = layout_of(cases.recipe(**AGENT, pipeline_model_parallel_size=2), 2).chunks
    assert [(one.crossed, one.attending, one.features_go_on) for one in halves] == [(0, 2, True)] * 2


def test_the_planner_knows_what_they_keep() -> None:
    """Bytes for the backward pass, of a pack with two pictures, towers and connector among them."""
    made = cases.recipe(**AGENT)
    model = build()
    batch = batch_of(model, made_samples(model, (1, 1)), cases.LENGTH)
    with saved_tensors(model.parameters()) as saved:
        model(**batch.inputs(with_labels=True))
    layout = layout_of(made, 1)
    held = held_by(made, layout, layout.chunks[0], cases.LENGTH, batch.num_images)
    assert held.kept == pytest.approx(saved.bytes, rel=0.02)


@pytest.mark.parametrize(
    ("keys", "front", "line"),
    [
        ({"cross_compute_hidden_size": None}, {}, "cross_compute_hidden_size: goes with model.language.cross_hidden"),
        ({"cross_compute_hidden_size": 30}, {}, "cross_compute_hidden_size: 30 is not divisible by"),
        ({"visual_expert": False, "image_positions": "counted"}, {}, "built into layers with model.language.visual_"),
        ({"cross_hidden_size": 32}, {}, "layers attend to features of 32 numbers, and the tower gives them 24"),
        ({}, {"vision": {"high_to": "connector"}}, "features of 24 numbers, and the tower gives them none"),
        ({}, {"connector": {"preset": "pixel_shuffle"}}, "pixel_shuffle makes no slot of each patch"),
        ({}, {"vision": {"positional_grid": 3}}, "feature_table: has a row for each patch, and pictures have 2 x 2"),
        ({}, {"image": {"kind": "squash"}}, "set it to fit_pair, crop_squash or squash_pair"),
    ],
)
def test_what_is_refused(keys: dict[str, Any], front: dict[str, Any], line: str) -> None:
    with pytest.raises(RecipeError) as raised:
        check_recipe(changed(keys, front), 4)
    assert line in str(raised.value)


def changed(keys: dict[str, Any], front: dict[str, Any]) -> Recipe:
    own = {
        part: {**(tree if "preset" not in front.get(part, {}) else {}), **front.get(part, {})}
        for part, tree in AGENT["front"].items()
    }
    return cases.recipe((), {**AGENT["language"], **keys}, own)
