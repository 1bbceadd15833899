"""Films in the whole model: packed with others as one by one, and each step in time by itself in the tower."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from data.data_helpers import encode_image, smooth_image
from film_maker import film, film_recipe
from test_vlm import close, parts
from tiles_cases import ANYRES_MAX
from tiles_cases import recipe as tiles_recipe
from tiny import IMAGE_TOKEN
from torch import Tensor

from megavlm.config.schema import Recipe, VideoConfig
from megavlm.data.batch import IGNORE_INDEX
from megavlm.data.chat import EncodedSample
from megavlm.data.decoders import make_decoder
from megavlm.data.device_batch import Batch, make_batch
from megavlm.data.films.film import Film
from megavlm.data.films.plan import FilmLayout
from megavlm.data.images import lay_out
from megavlm.data.media import plan_of, views_of
from megavlm.data.packing import PackableSample, build_pack
from megavlm.data.positions import positions_of
from megavlm.data.read_pack import decode_pack
from megavlm.models.build import build_model, unwrap
from megavlm.models.vlm import VisionLanguageModel


def squares() -> Recipe:
    """Return a model of LLaVA-OneVision's kind: its frames are squares, and a newline vector ends the film."""
    own = tiles_recipe(ANYRES_MAX)
    video = VideoConfig(kind="llava_onevision", num_frames=3)
    return dataclasses.replace(own, model=dataclasses.replace(own.model, video=video))


RECIPES = {
    "M-RoPE in seconds": film_recipe(),
    "timestamps": film_recipe(kind="qwen3_vl", max_pixels=None, total_pixels=2048, tokens_per_second=None),
    "squares": squares(),
}
SHOWN: Sequence[Sequence[bytes | Film]] = (
    (Film(film(31)),),
    (),
    (encode_image(smooth_image(1, 40, 30)), Film(film(5, "webm", "libvpx-vp9", size=(48, 64)))),
    (encode_image(smooth_image(2, 30, 60)),),
    (Film(film(2)), Film(film(31, rate=25))),
)


def sample(recipe: Recipe, number: int, shown: Sequence[bytes | Film]) -> PackableSample:
    plan, draw = plan_of(recipe.model), np.random.default_rng(number)
    layouts = lay_out(shown, plan)
    tokens = [draw.integers(0, IMAGE_TOKEN, 6)]
    for layout in layouts:
        for run in layout.runs:
            tokens.append(draw.integers(0, IMAGE_TOKEN, 3) if isinstance(run, str) else np.full(run, IMAGE_TOKEN))
        tokens.append(draw.integers(0, IMAGE_TOKEN, 4))
    ids = np.concatenate(tokens).astype(np.int64)
    labels = np.where((ids == IMAGE_TOKEN) | (draw.random(len(ids)) < 0.3), IGNORE_INDEX, ids)
    return PackableSample(
        EncodedSample(ids, labels, len(shown)), tuple(shown), f"s/{number}", 0,
        shapes=tuple(one.film if isinstance(one, FilmLayout) else one.shape for one in layouts),
        views=round(sum(views_of(plan, one) for one in layouts)),
    )  # fmt: skip


def batch_of(recipe: Recipe, samples: Sequence[PackableSample], padding: int = 0) -> Batch:
    plan = plan_of(recipe.model)
    length = sum(map(len, samples)) + padding
    pack = build_pack(samples, length, 3, plan, positions_of(recipe.model, IMAGE_TOKEN))
    read = decode_pack(pack, make_decoder("pil"), plan, IMAGE_TOKEN)
    assert not read.masked
    return make_batch(pack, read.pixels, torch.device("cpu"), read.arrangement)


def losses(model: VisionLanguageModel, batch: Batch) -> Tensor:
    assert batch.labels is not None
    return (model(**batch.inputs(with_labels=True)) * (batch.labels != IGNORE_INDEX)).view(-1)


@pytest.mark.parametrize("name", RECIPES)
def test_a_pack_of_films_pictures_and_text_equals_its_samples_one_by_one(name: str) -> None:
    recipe = RECIPES[name]
    torch.manual_seed(0)
    model = unwrap(build_model(recipe, IMAGE_TOKEN)[0])
    samples = [sample(recipe, number, shown) for number, shown in enumerate(SHOWN)]
    batch = batch_of(recipe, samples, padding=7)
    found = losses(model, batch)
    found.sum().backward()
    packed = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad(set_to_none=True)
    for got, one in zip(parts(batch, found), samples, strict=False):
        alone = losses(model, batch_of(recipe, [one]))
        close(got, alone)
        alone.sum().backward()
    assert packed.keys() == {name for name, one in model.named_parameters() if one.grad is not None}
    for name, one in model.named_parameters():
        if one.grad is not None:
            close(packed[name], one.grad)


def test_steps_in_time_do_not_see_each_other() -> None:
    recipe = RECIPES["M-RoPE in seconds"]
    model = unwrap(build_model(recipe, IMAGE_TOKEN)[0])
    shown = batch_of(recipe, [sample(recipe, 0, SHOWN[0])])
    assert shown.images is not None and shown.image_grid is not None
    (steps, rows, columns) = shown.image_grid[0].tolist()
    assert steps == 3
    with torch.no_grad():
        whole = model.vision(shown.images, shown.image_grid)
        alone = [model.vision(one, torch.tensor([[1, rows, columns]])) for one in shown.images.chunk(steps)]
    close(whole, torch.cat(alone))
