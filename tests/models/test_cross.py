"""Language layers that attend to features of pictures (Llama 3.2 Vision), at every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cross_cases as cases
import numpy as np
import pytest
import ranks
import torch
from saved_tensors import saved_tensors
from tiny import IMAGE_TOKEN
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

from megavlm.architectures.adapters import frozen_linears
from megavlm.config.checks import check_recipe
from megavlm.config.errors import RecipeError
from megavlm.data.batch import IGNORE_INDEX
from megavlm.data.device_batch import Batch, make_batch
from megavlm.data.media import arrange, plan_of
from megavlm.data.packing import build_pack
from megavlm.data.spans import spans_of
from megavlm.layers.cross import last_sights, picture_rows, sights, tell_pictures
from megavlm.layers.segments import packed_segments
from megavlm.models.build import build_model, unwrap
from megavlm.models.streams import PictureStream
from megavlm.models.vlm import VisionLanguageModel
from megavlm.planning.activations import held_by
from megavlm.planning.flops import adapter_flops
from megavlm.planning.layout import layout_of
from megavlm.planning.parameters import chunk_parameters

FP32 = 1e-5


def build() -> VisionLanguageModel:
    torch.manual_seed(0)
    model = unwrap(build_model(cases.recipe(), IMAGE_TOKEN)[0])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate"):
                parameter.fill_(0.7)
    return model


def batch_of(model: VisionLanguageModel, made: list[Any], length: int) -> Batch:
    plan = plan_of(model.settings)
    pack = build_pack([one for one, _ in made], length, 3, plan, spans=model.two_way_spans)
    pixels = torch.from_numpy(np.concatenate([pixels for _, pixels in made]))
    return make_batch(pack, pixels, torch.device("cpu"), arrange(plan, pack.layouts(plan) or []))


def losses(model: VisionLanguageModel, batch: Batch) -> torch.Tensor:
    out = model(**batch.inputs(with_labels=True))
    return (out * (batch.labels != IGNORE_INDEX)).view(-1)


def test_who_sees_which_pictures_is_as_transformers_has_it() -> None:
    """One sample of random words and pictures after the other, and all in one pack."""
    rng, model = np.random.default_rng(5), cases.recipe().model
    spans, samples, tiles = spans_of(model, IMAGE_TOKEN), [], []
    assert spans is not None
    for number in range(12):
        ids = np.where(rng.random(14) < (0.0, 0.2, 0.5)[number % 3], IMAGE_TOKEN, 3)
        samples.append(ids)
        tiles.append(rng.integers(1, 5, int((ids == IMAGE_TOKEN).sum())).tolist())
    packed = packed_segments(
        np.arange(len(samples) + 1, dtype=np.int32) * 14, torch.device("cpu"), None, spans.pack(samples, [0] * 12)
    )
    tell_pictures(packed, [rows for one in tiles for rows in one])
    whole = np.zeros((12 * 14, sum(picture_rows(packed))), np.int64)
    borders = np.cumsum([0, *picture_rows(packed)])
    for one in sights(packed):
        whole[one.start : one.stop, borders[one.first] : borders[one.last]] = 1
    row, ends = 0, last_sights(packed)
    for number, (ids, own) in enumerate(zip(samples, tiles, strict=True)):
        mine = whole[14 * number : 14 * number + 14]
        wanted = np.zeros((14, 0), np.int64)
        if own:
            found = get_cross_attention_token_mask(ids.tolist(), IMAGE_TOKEN)
            dense = convert_sparse_cross_attention_mask_to_dense([found], [own], 4, 14)[0]
            wanted = np.concatenate([dense[:, i, :count] for i, count in enumerate(own)], axis=1)
        assert np.array_equal(mine[:, row : row + sum(own)], wanted), (ids, own)
        assert mine.sum() == wanted.sum()  # nothing of other samples
        seen = np.flatnonzero(mine[-1])
        assert ends[number] == ((int(seen[0]), int(seen[-1]) + 1) if len(seen) else None)
        row += sum(own)


def test_a_pack_equals_its_samples_one_by_one_and_pictures_matter() -> None:
    model = build()
    plan = plan_of(model.settings)
    shown = [[(9, 9)], [], [(30, 9), (60, 60)], [(9, 40), (9, 9), (5, 5)]]
    made = [cases.sample(plan, seed, sizes, beside=seed == 3) for seed, sizes in enumerate(shown)]
    whole = losses(model, batch_of(model, made, 96))
    whole.sum().backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert all(value.abs().max() > 0 for value in packed.values())
    model.zero_grad(set_to_none=True)
    start = 0
    for one in made:
        alone = losses(model, batch_of(model, [one], len(one[0])))
        torch.testing.assert_close(whole[start : start + len(one[0])], alone, rtol=0, atol=FP32)
        alone.sum().backward()
        start += len(one[0])
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, packed[name], rtol=1e-4, atol=3e-5, msg=name)
    # Words in front of a picture see none; those behind it do, those of other samples do not.
    other = [(one, pixels if index else 255 - pixels) for index, (one, pixels) in enumerate(made)]
    changed = (losses(model, batch_of(model, other, 96)) - whole).abs() > 1e-4
    first = len(made[0][0])
    assert not changed[:5].any() and changed[6:first].any() and not changed[first:].any()


def test_without_pictures_the_layers_do_nothing_and_have_gradients_of_zero() -> None:
    model = build()
    made = [cases.sample(plan_of(model.settings), 7, [])]
    batch = batch_of(model, made, 24)
    with torch.no_grad():
        quiet = losses(model.eval(), batch)
    trained = losses(model.train(), batch)
    torch.testing.assert_close(trained, quiet, rtol=0, atol=FP32)
    trained.sum().backward()
    cross = {
        n: p.grad for n, p in model.named_parameters() if ".layers.3." in n or n.startswith(("vision", "connector"))
    }
    assert len(cross) > 40 and all(grad is not None and not grad.any() for grad in cross.values())
    # As if they were not there.
    for number in (6, 3, 1):
        del model.language.decoder.layers[number]
    with torch.no_grad():
        torch.testing.assert_close(losses(model.eval(), batch), quiet, rtol=0, atol=FP32)


def test_every_layout_trains_and_answers_like_one_process(tmp_path: Path) -> None:
    pp2 = {"pipeline_model_parallel_size": 2}
    both = {**pp2, "tensor_model_parallel_size": 2, "sequence_parallel": True}
    vpp = {"virtual_pipeline_model_parallel_size": 2, "recompute_granularity": "full"}

    def jobs(*parallel: dict[str, Any], **more: Any) -> list[dict[str, Any]]:
        return [{"parallel": one, "weights": str(tmp_path / "w" / "step-00000000"), **more} for one in parallel]

    frozen = ("vision", "connector")
    first = [*jobs({}, {"recompute_granularity": "full"}), *jobs({}, freeze=frozen)]
    # Of keys, and not values: one of the two parts of that layer has none.
    pictures = {"rank": 4, "targets": ("cross_attn.q_proj", "k_proj", "cross_attn.o_proj", "gate_proj")}
    adapted = [{"freeze": frozen, "lora": lora} for lora in ({"rank": 4, "targets": ("all-linear",)}, pictures)]
    first += [job for more in adapted for job in jobs({}, **more)]
    first += jobs({}, freeze=frozen, lora={**adapted[0]["lora"], "quantize": "nf4"})
    ((alone, again, still, *beside, packed),) = ranks.run("cross_cases:train", first, world=1)
    assert len({one["loss"][0] for one in (alone, *beside)}) == 3  # the adapters matter
    assert 1e-6 < abs(packed["loss"][0] / beside[0]["loss"][0] - 1) < 0.05  # rounded, and no more than that
    assert again == {key: pytest.approx(value, rel=1e-6) for key, value in alone.items() if key != "gates"} | {
        "gates": again["gates"]
    }
    cut = [
        *jobs(both, {"tensor_model_parallel_size": 2}, {**pp2, **vpp}, {**both, **vpp}),
        *jobs(both, freeze=frozen),
        *(job for more in adapted for job in jobs(both, **more)),
    ]
    for rank in ranks.run("cross_cases:train", cut, world=4):
        for got, wanted in zip(rank, [*[alone] * 4, still, *beside], strict=True):
            assert got["loss"] == pytest.approx(wanted["loss"], rel=FP32)
            assert got["norm"] == pytest.approx(wanted["norm"], rel=FP32)
            for name, values in got["gates"].items():
                if "linear" not in name:  # which ranks have a part of
                    assert values == pytest.approx(wanted["gates"][name], abs=FP32), name
    (((answers, options), plain),) = ranks.run("cross_cases:answer", [*jobs({}), *jobs({}, plain=True)], world=1)
    assert plain == answers
    assert len({tuple(one) for one in answers}) > 2 and max(map(len, answers)) == cases.NEW
    for rank in ranks.run(
        "cross_cases:answer", jobs(both, {**pp2, "virtual_pipeline_model_parallel_size": 2}), world=4
    ):
        for told, found in rank:
            assert told == answers
            assert [value for one in found for value in one] == pytest.approx(
                [value for one in options for value in one], rel=1e-4
            )


def test_streams_of_chunks() -> None:
    """Eight layers in chunks of two; a micro-batch with three rows, and one with none, where the largest has five."""
    found = [PictureStream.of_chunk((1, 3, 4), first, 2) for first in (0, 2, 4, 6)]
    assert [one.taken for one in found] == [True, True, True, False]
    hidden, features = torch.ones(4, 1, 2), torch.full((3, 1, 2), 2.0)
    assert found[0].join(hidden, None) is hidden
    found[0].rows = found[1].rows = 5
    sent = found[0].join(hidden, features)
    assert sent[:, 0, 0].tolist() == [1.0] * 4 + [2.0] * 3 + [0.0] * 2
    back = found[1].split(sent, 3)
    assert torch.equal(back[0], hidden) and back[1] is not None and torch.equal(back[1], features)
    sent = found[1].join(hidden, None)
    assert sent[:, 0, 0].tolist() == [1.0] * 4 + [0.0] * 5
    assert found[1].split(sent, 0)[1] is None


def test_the_planner_counts_their_parameters() -> None:
    own, model = cases.recipe(), build()
    layout = layout_of(own, 1)
    counted = sum(one.elements for chunk in layout.chunks_of(0) for one in chunk_parameters(own, layout, chunk))
    # Rows of the output layer that pad it are counted as the embedding's.
    assert counted == sum(p.numel() for p in model.parameters())
    halves = layout_of(cases.recipe(pipeline_model_parallel_size=2), 2).chunks
    assert [(chunk.crossed, chunk.features_go_on) for chunk in halves] == [(2, True), (1, True)]


@pytest.mark.parametrize("targets", [("all-linear",), ("k_proj", "cross_attn.o_proj")])
def test_the_planner_counts_their_adapters(targets: tuple[str, ...]) -> None:
    """Parameters, operations, and what is kept for the backward pass."""
    lora: dict[str, Any] = {"rank": 4, "targets": targets}
    own = cases.recipe(("vision", "connector"), lora=lora)
    model = unwrap(build_model(own, IMAGE_TOKEN)[0])
    layout = layout_of(own, 1)
    counted = chunk_parameters(own, layout, layout.chunks[0])
    found = dict(model.named_parameters())
    assert sum(one.elements for one in counted) == sum(p.numel() for p in found.values())
    assert sum(one.elements for one in counted if one.learns) == sum(
        p.numel() for p in found.values() if p.requires_grad
    )
    quantised = chunk_parameters(cases.recipe(lora={**lora, "quantize": "nf4"}), layout, layout.chunks[0])
    shapes = [linear.weight.numel() for *_, linear in frozen_linears(model.language)]
    assert sorted(one.elements for one in quantised if one.quantised) == sorted(shapes)
    adapters = {name: p.numel() for name, p in found.items() if name.endswith((".lora_a", ".lora_b"))}
    expected = sum(number * (1000 if "linear_kv" in name else 7) for name, number in adapters.items())
    assert adapter_flops(own.model.language, own.lora, 7, 1000) == 2 * expected > 0
    plan = plan_of(own.model)
    made = [cases.sample(plan, seed, [(60, 60)]) for seed in range(6)]
    batch = batch_of(model, made, sum(len(one) for one, _ in made))
    with saved_tensors(model.parameters()) as saved:
        losses(model, batch)
    seen = [grid for one, _ in made for grid in plan.of(one.shapes[0]).grids]
    assert held_by(own, layout, layout.chunks[0], batch.length, seen).kept == pytest.approx(saved.bytes, rel=0.02)


@pytest.mark.parametrize(
    ("language", "parallel", "expected"),
    [
        ({"cross_attention_layers": (3, 1)}, {}, "model.language.cross_attention_layers: [3, 1] do not rise"),
        ({"cross_attention_layers": (8,)}, {}, "model.language.cross_attention_layers: [8] do not rise from 0 to 7"),
        ({"cross_attention_layers": ()}, {}, "model.image.kind: canvas_tiles makes one token of a picture"),
        ({"output_vocab_size": 600}, {}, "model.language.output_vocab_size: 600 is more than"),
        ({}, {"tensor_model_parallel_size": 4}, "model.language.num_query_groups: 2 is not divisible by"),
        ({"add_bias_linear": True}, {}, "model.language.cross_attention_layers: go with Llama's layers alone"),
        ({"visual_expert": True}, {}, "model.language.visual_expert: is for features among the tokens"),
        ({"image_positions": "shared"}, {}, "shared goes without model.language.cross_attention_layers"),
    ],
)
def test_what_is_refused(language: dict[str, Any], parallel: dict[str, Any], expected: str) -> None:
    with pytest.raises(RecipeError) as raised:
        check_recipe(cases.recipe(language=language, **parallel), 4)
    assert expected in str(raised.value)
