"""Films' frames, sizes, tokens and texts are those of each family's published processor.

The oracle is ``film_vectors.json``, made by ``film_vectors.py`` with torchvision, which the processors need.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import film_vectors
import numpy as np
import pytest
import torch
from film_vectors import CASES, CLASSES, HERE, SLOT, digest, films, unpacked
from pydantic import TypeAdapter
from tiny import tiny_recipe

from megavlm.config.errors import UserError
from megavlm.config.help import to_tree
from megavlm.config.saved import with_defaults
from megavlm.config.schema import ModelConfig, VideoConfig
from megavlm.data.films.plan import FilmError, FilmPlan, FilmShape, PackedFilmPlan, film_plan_kinds, film_plan_of
from megavlm.data.media import arrange, plan_of
from megavlm.data.patches import patch_rows
from megavlm.data.positions import positions_of
from megavlm.data.render import render_frame
from megavlm.families.presets import expand_presets

VECTORS = json.loads(HERE.read_text())
MODELS = {
    "qwen2_vl": "qwen2_5_vl_3b", "llava_onevision1_5": "llava_onevision1_5_4b", "qwen3_vl": "qwen3_vl_2b",
    "glm4v": "glm4_1v_9b", "llava_onevision": "llava_onevision_0_5b", "internvl": "internvl3_1b",
}  # fmt: skip
EDGES = {"qwen2_vl": ("min_pixels", "max_pixels"), "qwen3_vl": ("min_pixels", "total_pixels")}


def model(name: str, **video: Any) -> ModelConfig:
    """Return the preset's model with these keys alone: the class's own values stand for the others."""
    tree = {"model": {"preset": MODELS.get(name, MODELS[video["kind"]])}}
    found = TypeAdapter(ModelConfig).validate_python(expand_presets(tree)["model"])
    return dataclasses.replace(found, video=VideoConfig(**video))


def plan_of_case(name: str) -> FilmPlan:
    case = CASES[name]
    sizes = dict(zip(EDGES.get(case["kind"], EDGES["qwen3_vl"]), case.get("size", ()), strict=False))
    plan = film_plan_of(model(name, kind=case["kind"], **sizes, **case["asked"], **case.get("video", {})))
    assert plan is not None
    return plan


@pytest.mark.parametrize("name", CASES)
def test_50_films_of_a_processor(name: str) -> None:
    plan, case, same = plan_of_case(name), CASES[name], 0
    for film, theirs in zip(films(name), VECTORS["films"][name], strict=True):
        shape = FilmShape(*film)
        if theirs is None:  # refused there: too short for what is asked
            assert film[2] < 160
            continue
        layout, same = plan.plan(shape), same + 1
        chosen = plan.choose(shape)
        assert (len(chosen), digest(str(list(chosen)))) == (theirs["frames"], theirs["indices"]), film
        assert layout.canvases[0].resized == tuple(theirs["size"]), film
        own = "".join(run if isinstance(run, str) else SLOT * run for run in layout.runs)
        if case["kind"] == "qwen2_vl":
            own = own.removeprefix("<|vision_start|>").removesuffix("<|vision_end|>")
            seconds = [grid.step / 2 for grid in dataclasses.replace(plan, tokens_per_second=2).token_grids(layout)]
            assert seconds == pytest.approx([theirs["seconds"]], rel=1e-12)
        if case["kind"] == "glm4v":  # its template writes what stands around it
            own = own.removeprefix("<|begin_of_video|>").removesuffix("<|end_of_video|>")
        assert (own.count(SLOT), digest(own)) == (theirs["tokens"], theirs["text"]), film
        assert layout.tokens == theirs["tokens"]
    assert same > 25


@pytest.mark.parametrize("kind", CLASSES)
def test_pixels_of_a_film(kind: str) -> None:
    theirs = VECTORS["pixels"][kind]
    film = torch.from_numpy(film_vectors.pixels(kind)).permute(0, 3, 1, 2)
    frames, _, height, width = film.shape
    base = film_plan_of(model(kind, kind=kind))
    own: dict[str, Any] = {"side": 14} if not isinstance(base, PackedFilmPlan) else {"patch": 4, "min_pixels": 64}
    if isinstance(base, PackedFilmPlan):
        own |= {"max_pixels": 1024} if kind == "qwen2_vl" else {"total_pixels": 4096}
    plan: Any = dataclasses.replace(base, **own)
    layout = plan.plan(FilmShape(width, height, frames, 24.0, sampled=True))
    views = [render_frame(film[index], plan, layout, number) for number, index in enumerate(layout.indices)]
    if isinstance(plan, PackedFilmPlan):
        rows = [patch_rows(view, plan.merge, plan.patch) for view in views]
        steps = [torch.stack(rows[at : at + 2], 2).flatten(1) for at in range(0, len(rows), 2)]
        got = torch.cat(steps).numpy()
    else:
        got = torch.stack(views).numpy()
    assert got.shape == tuple(plan.pixels_of(layout)) == tuple(theirs["shape"])
    assert np.array_equal(got, unpacked(theirs["values"], theirs["shape"]))


def test_onevisions_features_are_pooled() -> None:
    """As its ``apply_pooling``, with the newline vector behind the film: 196 tokens a frame."""
    models = model("llava_onevision", kind="llava_onevision")
    plan = plan_of(models)
    layout = plan.of(FilmShape(640, 360, 90, 30.0, sampled=False))
    assert layout.tokens == 32 * 196 + 1
    layout = plan.of(FilmShape(640, 360, 3, 30.0))
    own = arrange(plan, [layout])
    features = torch.randn(3, 729, 5, dtype=torch.float64)
    square = features.view(3, 27, 27, 5).permute(0, 3, 1, 2)
    pooled = torch.nn.functional.interpolate(square, size=(14, 14), mode="bilinear")
    expected = torch.cat([pooled.permute(0, 2, 3, 1).reshape(-1, 5), torch.full((1, 5), 7.0)])
    table = torch.cat([features.flatten(0, 1), torch.full((1, 5), 7.0)])
    assert own.index is not None and own.weight is not None
    got = (table[torch.from_numpy(own.index)] * torch.from_numpy(own.weight)[..., None]).sum(1)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_films_of_few_frames() -> None:
    one = FilmShape(64, 48, 1, 25.0)
    for kind in CLASSES:
        plan = film_plan_of(model(kind, kind=kind))
        assert plan is not None
        if kind == "qwen3_vl":
            with pytest.raises(FilmError, match="a patch of this model has 2"):
                plan.plan(one)
            continue
        assert set(plan.plan(one).indices) == {0}
        assert plan.plan(FilmShape(64, 48, 3, 25.0)).tokens > 0
        for bad in (FilmShape(0, 48, 3, 25.0), FilmShape(64, 48, 0, 25.0), FilmShape(64, 48, 3, 0.0)):
            with pytest.raises(FilmError):
                plan.plan(bad)
        if isinstance(plan, PackedFilmPlan):
            with pytest.raises(FilmError, match="200 times"):
                plan.plan(FilmShape(6000, 28, 9, 25.0))


def test_frames_that_were_chosen_are_all_shown() -> None:
    for kind in CLASSES:
        plan: Any = film_plan_of(model(kind, kind=kind))
        assert plan.choose(FilmShape(64, 48, 7, 1.0, sampled=True)) == tuple(range(7))[: getattr(plan, "num_frames", 7)]
        many = plan.choose(FilmShape(64, 48, 5000, 1.0, sampled=True))
        assert many[0] == 0 and many[-1] == 4999 and list(many) == sorted(set(many))


def test_the_budget_of_a_sample_is_shared() -> None:
    for kind in ("qwen2_vl", "qwen3_vl", "glm4v"):
        own = {} if kind == "qwen2_vl" else {"total_pixels": 30_000_000}
        alone: Any = film_plan_of(model(kind, kind=kind, sample_pixels=3_000_000, **own))
        shape = FilmShape(1280, 720, 200, 25.0)
        for shown in (1, 2, 4):
            layout = alone.plan(shape._replace(shown=shown))
            width, height = layout.canvases[0].resized
            counted = len(layout.indices) // (2 if kind == "qwen2_vl" else 1)
            least = 1.05 * alone.min_pixels * len(layout.indices) if kind == "qwen2_vl" else 0
            assert width * height * counted <= max(3_000_000 / shown, least), (kind, shown)
        assert alone.plan(shape).tokens > alone.plan(shape._replace(shown=4)).tokens


def test_longer_films_stay_below_their_budget() -> None:
    for name in ("qwen3_vl", "glm4v"):
        plan: Any = film_plan_of(model(name, kind=name))
        layout = plan.plan(FilmShape(1920, 1080, 100_000, 30.0))
        width, height = layout.canvases[0].resized
        assert width * height * len(layout.indices) <= max(plan.total_pixels, len(layout.indices) * 32**2)


@pytest.mark.parametrize(
    ("video", "said"),
    [
        ({"kind": "qwen2_vl", "fps": 2.0, "num_frames": 8}, "model.video.num_frames: cannot stand beside"),
        ({"kind": "qwen3_vl", "min_frames": 9, "max_frames": 8}, "model.video.min_frames: 9 is more than"),
        ({"kind": "qwen2_vl", "min_pixels": 4000, "max_pixels": 3999}, "model.video.max_pixels: 3999 is less than"),
        ({"kind": "glm4v", "total_pixels": 12000}, "model.video.total_pixels: 12000 is less than"),
        ({"kind": "qwen3_vl", "num_frames": 1}, "model.video.num_frames: 1 is less than the 2 frames of a patch"),
        ({"kind": "glm4v", "max_frames": 12}, "model.video.max_frames: glm4v does not have this key"),
        ({"kind": "internvl", "min_pixels": 12}, "model.video.min_pixels: internvl does not have this key"),
        ({"kind": "qwen3_vl", "tokens_per_second": 2.0}, "model.video.tokens_per_second: qwen3_vl does not have"),
        ({"kind": "qwen2_vl", "num_frames": 8, "min_frames": 4}, "model.video.min_frames: has no effect beside"),
        (
            {"kind": "qwen3_vl", "num_frames": 8, "max_frames": 7},
            "model.video.max_frames: 7 is less than",
        ),
        ({"kind": "glm4v", "fps": 30.0}, "model.video.fps: 300 seconds of 30 frames are 9000, more than are ever"),
        ({"kind": "glm4v", "max_seconds": 3000.0}, "model.video.max_seconds: 3000 seconds of 2 frames are 6000"),
    ],
)
def test_keys_that_do_not_go_together(video: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        film_plan_of(model(video["kind"], **video))


OTHER: dict[str, Any] = {
    "fps": 3.0, "num_frames": 6, "min_frames": 6, "max_frames": 90, "max_seconds": 7.0, "min_pixels": 200_000,
    "max_pixels": 150_000, "total_pixels": 2_000_000, "sample_pixels": 1_000_000, "tokens_per_second": 3.0,
    "positions_after": "side", "outer_marks": True,
}  # fmt: skip
"""A value of each key that is not its default, and shows in what becomes of some film."""


def test_every_key_is_honoured_or_refused() -> None:
    """Whatever the kind of films, and where none are read."""
    assert OTHER.keys() == {one.name for one in dataclasses.fields(VideoConfig)} - {"kind"}
    shapes = [
        FilmShape(640, 360, 400, 10.0, 2),
        FilmShape(640, 360, 6, 10.0),
        FilmShape(64, 48, 200, 2.0, sampled=True),
        FilmShape(64, 48, 8, 4.0),
    ]
    assert film_plan_kinds().keys() == CLASSES.keys()
    for kind in (*CLASSES, "none"):
        own = film_plan_kinds()[kind].keys if kind != "none" else ()
        name = "qwen2_vl" if kind == "none" else kind
        before: Any = None if kind == "none" else film_plan_of(model(kind, kind=kind))
        for key, value in OTHER.items():
            chosen = dataclasses.replace(model(name, kind=name), video=VideoConfig(kind=kind, **{key: value}))
            if key not in own:
                with pytest.raises(UserError, match=rf"model\.video\.{key}: {kind} does not have this key"):
                    film_plan_of(chosen)
                continue
            plan: Any = film_plan_of(chosen)
            if key == "positions_after":  # where text goes on
                assert positions_of(chosen, 7) != positions_of(model(kind, kind=kind), 7)
                continue
            made = [[one.plan(shape) for shape in shapes] for one in (before, plan)]
            if key == "tokens_per_second":
                made = [
                    [one.token_grids(layout) for layout in some] for one, some in zip((before, plan), made, strict=True)
                ]
            assert made[0] != made[1], (kind, key)
    for key in ("tokens_per_second", "positions_after"):  # plain positions have no time
        with pytest.raises(UserError, match=rf"model\.video\.{key}: says where a film lies"):
            film_plan_of(model("llava_onevision1_5", kind="qwen2_vl", **{key: OTHER[key]}))


@pytest.mark.parametrize("key", ["num_frames", "min_frames", "max_frames"])
def test_more_frames_than_are_ever_shown(key: str) -> None:
    for kind in CLASSES:
        if key in film_plan_kinds()[kind].keys:
            with pytest.raises(UserError, match=rf"model\.video\.{key}: 4097 is more frames than are ever shown"):
                film_plan_of(model(kind, kind=kind, **{key: 4097}))


def test_a_checkpoint_with_keys_that_had_no_effect_still_loads() -> None:
    whole = to_tree(tiny_recipe())["model"]
    for told, kept in (
        ({"kind": "none", "fps": 3.0, "max_frames": 5}, {}),
        ({"kind": "qwen3_vl", "num_frames": 8, "min_frames": 4, "max_frames": 6}, {"num_frames": 8}),
        ({"kind": "qwen3_vl", "max_frames": 9000}, {"max_frames": 4096}),
        ({"kind": "glm4v", "fps": 32.0}, {"fps": 32.0, "max_seconds": 128.0}),
        ({"kind": "glm4v", "max_seconds": 3000.0}, {"max_seconds": 2048.0}),
        ({"kind": "glm4v", "fps": 4.0, "max_seconds": 900.0}, {"fps": 4.0, "max_seconds": 900.0}),
        ({"kind": "qwen2_vl", "tokens_per_second": 2.0, "positions_after": "side", "fps": 3.0}, {"fps": 3.0}),
    ):
        found = with_defaults({"model": {**whole, "video": told}})["model"]["video"]
        assert VideoConfig(**found) == VideoConfig(kind=told["kind"], **kept), told
    timed = {**whole, "language": {**whole["language"], "rotary_sections": [8, 12, 12]}}
    told = {"kind": "qwen2_vl", "tokens_per_second": 2.0, "positions_after": "side"}
    assert told.items() <= with_defaults({"model": {**timed, "video": told}})["model"]["video"].items()


def test_a_tower_that_does_not_fit() -> None:
    with pytest.raises(UserError, match=r"model\.video\.kind: qwen2_vl needs a tower that takes frames of any size"):
        film_plan_of(model("internvl", kind="qwen2_vl"))
    with pytest.raises(UserError, match=r"model\.video\.kind: internvl makes squares"):
        film_plan_of(model("qwen2_vl", kind="internvl"))
    with pytest.raises(UserError, match="ends with the learned newline vector"):
        film_plan_of(model("internvl", kind="llava_onevision"))


def test_where_text_goes_on() -> None:
    for after in ("longest", "side"):
        own = positions_of(model("qwen2_vl", kind="qwen2_vl", positions_after=after), 7)
        assert own is not None and own.after_film == after
