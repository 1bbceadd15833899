"""A model whose pictures are tiles: newline vectors, packs, and every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import torch
from samples import gradients
from tiles_cases import ANYRES, ANYRES_MAX, LENGTH, SPLIT_TILES, TILES, packs, picture_samples, recipe
from tiny import IMAGE_TOKEN
from torch import Tensor

from megavlm.checkpoint.distributed import load, save_weights
from megavlm.config.errors import UserError
from megavlm.config.help import to_yaml
from megavlm.data.batch import IGNORE_INDEX
from megavlm.data.device_batch import Batch, make_batch
from megavlm.data.media import ImagePlan, arrange, plan_kinds, plan_of
from megavlm.data.packing import PackableSample, build_pack
from megavlm.models.build import build_model, freeze, unwrap
from megavlm.models.fusion import arrange_features
from megavlm.models.vlm import VisionLanguageModel
from megavlm.planning.layout import layout_of
from megavlm.planning.parameters import chunk_parameters
from megavlm.training.loop import _check_same_model

FP32 = 1e-5


def build(image: dict[str, Any], **branches: Any) -> tuple[VisionLanguageModel, ImagePlan]:
    own = recipe(image, **branches)
    torch.manual_seed(0)
    model = unwrap(build_model(own, IMAGE_TOKEN)[0])
    freeze(model, own.modules)
    return model, plan_of(own.model)


def batch_of(plan: ImagePlan, made: list[tuple[PackableSample, np.ndarray]], length: int) -> Batch:
    pack = build_pack([sample for sample, _ in made], length, 3)
    layouts = [plan.plan(*shape) for shape in pack.image_shapes]
    pixels = torch.from_numpy(np.concatenate([pixels for _, pixels in made]))
    return make_batch(pack, pixels, torch.device("cpu"), arrange(plan, layouts))


def losses(model: VisionLanguageModel, batch: Batch) -> Tensor:
    out = model(**batch.inputs(with_labels=True))
    return (out * (batch.labels != IGNORE_INDEX)).view(-1)


@pytest.mark.parametrize("image", [ANYRES, ANYRES_MAX, TILES], ids=lambda image: image["kind"])
def test_a_pack_of_tiles_equals_its_samples_one_by_one(image: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("samples.losses", losses)
    model, plan = build(image)
    made = [picture_samples(plan, 1, [(90, 40)]), picture_samples(plan, 2, []), picture_samples(plan, 3, [(30, 64)])]
    whole = batch_of(plan, made, LENGTH)
    assert (whole.image_weight is not None) == (image is ANYRES_MAX)
    ours, start = losses(model, whole), 0
    packed = gradients(model, whole)
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for one in made:
        alone = batch_of(plan, [one], len(one[0]))
        torch.testing.assert_close(ours[start : start + len(one[0])], losses(model, alone), rtol=0, atol=FP32)
        start += len(one[0])
        for name, gradient in gradients(model, alone).items():
            assert gradient is not None, name  # also of the sample without a picture
            sums[name] += gradient
            if name == "connector.image_newline" and not one[1].size:
                assert gradient.abs().max() == 0
    for name, expected in sums.items():
        found = packed[name]
        assert found is not None and expected.abs().max() > 0, name
        torch.testing.assert_close(found, expected, rtol=0, atol=FP32 * max(1.0, float(expected.abs().max())))
    assert ("connector.image_newline" in sums) == plan.newline


def test_the_newline_is_frozen_with_the_connector() -> None:
    model, _ = build(ANYRES, modules={"connector": {"freeze": True}, "vision": {"freeze": True}})
    assert not model.connector.image_newline.requires_grad
    assert model.encode_images(None) is None
    assert "image_newline" not in dict(build(TILES)[0].connector.named_parameters())


def test_the_planner_counts_the_newline() -> None:
    for image in (ANYRES, TILES):
        own = recipe(image)
        model, _ = build(image)
        layout = layout_of(own, 1)
        counted = sum(one.elements for chunk in layout.chunks_of(0) for one in chunk_parameters(own, layout, chunk))
        assert counted == sum(p.numel() for p in model.parameters())


def test_bf16_sums_the_newlines_gradient_in_one_go() -> None:
    """A bf16 sum that rounds at each of 512 rows would stop growing at 256."""
    features = torch.zeros(4, 1, 8, dtype=torch.bfloat16, requires_grad=True)
    newline = torch.zeros(8, dtype=torch.bfloat16, requires_grad=True)
    index = torch.full((512, 1), -1)
    arrange_features(features, index, None, newline).sum().backward()
    assert newline.grad is not None and newline.grad.tolist() == [512.0] * 8


KINDS = {"anyres": ANYRES, "anyres_max": ANYRES_MAX, "dynamic_tiles": TILES, "split_tiles": SPLIT_TILES}


def test_all_plans_of_several_square_views_are_tried() -> None:
    assert KINDS.keys() == {name for name, kind in plan_kinds().items() if kind.plan.square and not kind.plan.fixed}


def test_every_layout_trains_tiles_like_one_process(tmp_path: Path) -> None:
    both = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True}
    # A newline vector belongs to the connector, but is used behind it: also where ranks hold that whole.
    cases = [(image, split) for split in ("shard", "replicate") for image in KINDS.values()]

    def jobs(name: str, **parallel: Any) -> list[dict[str, Any]]:
        return [
            {
                "image": image,
                "split": split,
                "recipe": {"parallel": parallel},
                "weights": str(tmp_path / image["kind"] / "step-00000000"),
                "save": str(tmp_path / name / split / image["kind"]),
            }
            for image, split in cases
        ]

    (one,) = ranks.run("tiles_cases:train", jobs("one"), world=1)
    many = ranks.run("tiles_cases:train", jobs("many", **both), world=4)
    for case, ((image, split), alone) in enumerate(zip(cases, one, strict=True)):
        for rank in many:
            assert rank[case]["loss"] == pytest.approx(alone["loss"], rel=FP32), (image, split)
            assert rank[case]["norm"] == pytest.approx(alone["norm"], rel=4 * FP32), (image, split)
            assert rank[case]["views"] == alone["views"] and rank[case]["images"] == alone["images"]
        assert (alone["newline"] is not None) == plan_of(recipe(image).model).newline
        if alone["newline"] is not None:
            assert torch.equal(many[0][case]["newline"], many[1][case]["newline"])  # TP ranks of the first stage
            torch.testing.assert_close(many[0][case]["newline"], alone["newline"], rtol=0, atol=1e-4)
        assert many[2][case]["newline"] is None
    assert one[0]["views"] == [int(pixels.shape[0]) for _, pixels in packs(plan_of(recipe(ANYRES).model), 4, 1)]
    assert max(one[0]["views"]) > max(one[0]["images"]) > 1


def test_a_stage_with_a_newline_begins_from_one_without(tmp_path: Path) -> None:
    """As LLaVA-1.6's second does: the vector begins anew, all else comes along; not the other way, nor in one run."""
    squash, tiles = recipe({"kind": "squash"}), recipe(ANYRES)
    one = unwrap(build_model(squash, IMAGE_TOKEN)[0])
    path = save_weights(tmp_path / "one", [one], recipe_yaml=to_yaml(squash))
    two = unwrap(build_model(tiles, IMAGE_TOKEN)[0])
    newline = two.connector.image_newline.detach().clone()
    fresh = _check_same_model(path, tiles, resuming=False)
    load(path, modules=[two], fresh=fresh)
    assert fresh == {"connector.image_newline"} and torch.equal(two.connector.image_newline, newline)
    assert newline.abs().max() > 0
    before, after = one.state_dict(), dict(two.named_parameters())
    assert all(torch.equal(value, before[name]) for name, value in after.items() if name not in fresh)
    back = save_weights(tmp_path / "two", [two], recipe_yaml=to_yaml(tiles))
    frozen = recipe(ANYRES, modules={"connector": {"freeze": True}, "vision": {"freeze": True}})
    for where, own, resuming, words in (
        (path, tiles, True, "choose a plan that agrees"),
        (path, frozen, False, "it would not learn: set modules.connector.freeze to false"),
        (back, squash, False, "choose a plan that agrees"),
    ):
        with pytest.raises(UserError, match=words):
            _check_same_model(where, own, resuming=resuming)
    assert _check_same_model(back, tiles) == frozenset()
