"""Features of several tower layers, added behind the first language layers (deepstack), with own positions."""

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
from tiny import IMAGE_TOKEN
from transformers import Qwen3VLTextConfig, Qwen3VLTextModel

from megavlm.config.checks import check_recipe
from megavlm.config.errors import RecipeError
from megavlm.data.batch import IGNORE_INDEX
from megavlm.data.device_batch import Batch, make_batch
from megavlm.data.media import arrange, plan_of
from megavlm.data.packing import build_pack
from megavlm.data.positions import positions_of
from megavlm.models.build import build_model, unwrap
from megavlm.models.streams import Streams
from megavlm.models.vlm import VisionLanguageModel
from megavlm.planning.activations import carried_streams
from megavlm.planning.layout import layout_of
from megavlm.planning.parameters import chunk_parameters

FP32 = 1e-5


def build(**more: Any) -> VisionLanguageModel:
    torch.manual_seed(0)
    return unwrap(build_model(cases.recipe(**more), IMAGE_TOKEN)[0])


def batch_of(model: VisionLanguageModel, made: list[Any], length: int) -> Batch:
    plan = plan_of(model.settings)
    pack = build_pack([sample for sample, _ in made], length, 3, plan, positions_of(model.settings, IMAGE_TOKEN))
    pixels = torch.from_numpy(np.concatenate([pixels for _, pixels in made]))
    return make_batch(pack, pixels, torch.device("cpu"), arrange(plan, pack.layouts(plan) or []))


def losses(model: VisionLanguageModel, batch: Batch) -> torch.Tensor:
    out = model(**batch.inputs(with_labels=True))
    return (out * (batch.labels != IGNORE_INDEX)).view(-1)


def test_logits_and_gradients_are_qwen3_vls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Transformers' text model, which gets our features, one sample at a time."""
    monkeypatch.setattr(theirs, "LAYERS", 4)
    model = build()
    made = [cases.picture_samples(plan_of(model.settings), seed, [(9, 9)] * seed) for seed in (1, 2)]
    batch = batch_of(model, made, sum(len(sample) for sample, _ in made))
    config = Qwen3VLTextConfig(
        vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-6, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]},
    )  # fmt: skip
    reference = theirs.WithHead(Qwen3VLTextModel(config))
    theirs.fill(reference)
    theirs.load(model.language, theirs.decoder_map(dict(reference.named_parameters())))
    features = model.arranged(model.encode_images(batch.images))
    assert features.shape[1] == 4 * 64
    parts, first = [], 0
    for start, end in itertools.pairwise(batch.packed_seq_params.cu_seqlens_q.tolist()):
        ids = batch.tokens[:, start:end]
        slots = ids == IMAGE_TOKEN
        own = features[first : first + int(slots.sum())].chunk(4, dim=1)
        first += len(own[0])
        embeddings = reference.model.embed_tokens(ids).masked_scatter(slots[..., None], own[0])
        hidden = reference.model(
            inputs_embeds=embeddings, position_ids=batch.position_ids[:, :, start:end].transpose(0, 1),
            visual_pos_masks=slots, deepstack_visual_embeds=own[1:],
        )  # fmt: skip
        parts.append(reference.lm_head(hidden.last_hidden_state))
    expected = torch.cat(parts, dim=1)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(7))
    (expected * weights).sum().backward()
    front = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert sum("deepstack" in name for name in front) == 3 * 4 and all(g.abs().max() > 0 for g in front.values())
    model.zero_grad(set_to_none=True)
    logits = model(**{**batch.inputs(), "labels": None})
    theirs.close(logits, expected, "logits")
    (logits * weights).sum().backward()
    for name, gradient in front.items():
        theirs.close(dict(model.named_parameters())[name].grad, gradient, name)
    theirs.same_gradients(model.language, theirs.decoder_map(theirs.gradients_of(reference)))


def test_a_pack_equals_its_samples_one_by_one() -> None:
    model = build()
    plan = plan_of(model.settings)
    made = [cases.picture_samples(plan, seed, [(9, 9)] * (seed % 3)) for seed in (1, 3, 5, 4)]
    whole = losses(model, batch_of(model, made, 112))
    whole.sum().backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    start = 0
    for one in made:
        alone = losses(model, batch_of(model, [one], len(one[0])))
        torch.testing.assert_close(whole[start : start + len(one[0])], alone, rtol=0, atol=FP32)
        alone.sum().backward()
        start += len(one[0])
    for name, parameter in model.named_parameters():
        theirs.close(parameter.grad, packed[name], name)


def test_every_layout_trains_and_answers_like_one_process(tmp_path: Path) -> None:
    pp2 = {"pipeline_model_parallel_size": 2}
    virtual = {**pp2, "virtual_pipeline_model_parallel_size": 2}
    both = {**pp2, "tensor_model_parallel_size": 2, "sequence_parallel": True}
    layouts = {
        "tp2-pp2-sp": (both, 1),
        "pp4": ({"pipeline_model_parallel_size": 4}, 2),
        "tp2-pp2-sp-vpp2-recompute": (
            {**both, "virtual_pipeline_model_parallel_size": 2, "recompute_granularity": "full"}, 2
        ),
    }  # fmt: skip
    glm = {"levels": (), "language": cases.GLM}

    def jobs(*parallel: dict[str, Any], model: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        weights = str(tmp_path / ("qwen" if model is None else "glm") / "step-00000000")
        return [{"parallel": one, "weights": weights, "model": model or {}} for one in parallel]

    first = [*jobs({}, {"recompute_granularity": "full"}), *jobs({}, model=glm)]
    ((alone, again, other),) = ranks.run("levels_cases:train", first, world=1)
    assert again["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    assert again["norm"] == pytest.approx(alone["norm"], rel=1e-6)
    assert alone["carried"] == 0
    cut = [*jobs(*(one for one, _ in layouts.values())), *jobs(both, model=glm)]
    for rank in ranks.run("levels_cases:train", cut, world=4):
        assert rank[-1]["loss"] == pytest.approx(other["loss"], rel=FP32)
        assert rank[-1]["norm"] == pytest.approx(other["norm"], rel=FP32)
        for got, (name, (_, carried)) in zip(rank, layouts.items(), strict=False):
            assert got["loss"] == pytest.approx(alone["loss"], rel=FP32), name
            assert got["norm"] == pytest.approx(alone["norm"], rel=FP32), name
            assert got["carried"] == carried, name
            for part, value in got["sums"].items():
                assert value == pytest.approx(alone["sums"][part], rel=1e-4), (name, part)
    asked = [*jobs({}), *jobs({}, model=glm)]
    plain = [{**job, "plain": True} for job in asked]
    ((answers, glms, *theirs_too),) = ranks.run("levels_cases:answer", [*asked, *plain], world=1)
    assert theirs_too == [answers, glms]
    for made in (answers, glms):
        assert len({tuple(one) for one in made}) > 2 and max(map(len, made)) == cases.NEW
    for rank in ranks.run("levels_cases:answer", [*jobs(both), *jobs(both, model=glm)], world=4):
        assert rank == [answers, glms]
    for rank in ranks.run("levels_cases:answer", jobs(virtual), world=2):
        assert rank == [answers]


def test_streams_of_all_chunks() -> None:
    """Eight layers in chunks of two, five levels: three travel from the first chunk on."""
    found = [Streams.of_chunk(5, first, 2, 2) for first in (0, 2, 4, 6)]
    assert [(one.enter, one.used, one.carried) for one in found] == [(5, 2, 3), (3, 2, 3), (1, 1, 3), (0, 0, 3)]
    beside = torch.arange(5.0).repeat_interleave(4).view(20, 1, 1)
    hidden = torch.full((4, 1, 1), 9.0)
    sent = found[0].join(hidden, beside)
    assert sent.flatten().tolist() == [9.0] * 4 + [2.0] * 4 + [3.0] * 4 + [4.0] * 4
    hidden, beside = found[1].split(sent, 4)
    sent = found[1].join(hidden, beside)
    assert sent.flatten().tolist() == [9.0] * 4 + [4.0] * 4 + [0.0] * 8
    hidden, beside = found[2].split(sent, 4)
    assert beside.flatten().tolist() == [4.0] * 4
    assert found[2].join(hidden, beside).flatten().tolist() == [9.0] * 4 + [0.0] * 12
    assert found[3].split(sent, 4)[1] is None
    assert found[0].join(hidden, None).flatten().tolist() == [9.0] * 4 + [0.0] * 12  # no pictures


def test_the_planner_counts_the_levels_connectors() -> None:
    own, model = cases.recipe(), build()
    layout = layout_of(own, 1)
    counted = sum(one.elements for chunk in layout.chunks_of(0) for one in chunk_parameters(own, layout, chunk))
    assert counted == sum(p.numel() for p in model.parameters())
    for stages, carried in ((1, 0), (2, 1), (4, 2)):
        deep = cases.recipe(pipeline_model_parallel_size=stages)
        assert carried_streams(deep, layout_of(deep, stages)) == carried


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        ((3,), "model.vision.deepstack_layers: [3] are not all layers from 0 to 2; correct it"),
        ((0,) * 5, "model.vision.deepstack_layers: 5 layers, each for one of model.language.num_layers (4); name"),
    ],
)
def test_levels_that_are_refused(levels: tuple[int, ...], expected: str) -> None:
    with pytest.raises(RecipeError) as raised:
        check_recipe(cases.recipe(levels), 1)
    assert expected in str(raised.value)
