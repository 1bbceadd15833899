"""What a recipe says of pictures: wrong keys cost a line; recipes from before the branch squash, as they did."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from tiny import tiny_recipe

from megavlm.config.checks import check_recipe
from megavlm.config.errors import RecipeError
from megavlm.config.load import load_recipe
from megavlm.config.saved import with_defaults
from megavlm.config.schema import ImageConfig
from megavlm.data import media
from megavlm.data.media import Box, Canvas, ImageLayout, ImagePlan, ImageShape, View, plan_of, register_plan
from megavlm.data.plans_single import SquashPlan
from megavlm.families.presets import expand_presets

MLP = "model.connector={preset: mlp2x_gelu, init_method_std: 0.02}"
WRONG = {
    ("kind: nope",): "model.image.kind: no image plan 'nope'; there are anyres, anyres_max, canvas_tiles,",
    ("kind: pad", "thumbnail: false"): "model.image.thumbnail: pad does not have this key (dynamic_tiles has it)",
    (
        "kind: squash",
        "max_tiles: 3",
    ): "model.image.max_tiles: squash does not have this key (anyres_max,",
    ("kind: pad", "fill: red"): 'model.image.fill: expected mean or list of 3 or null, got "red"; change the value',
    ("kind: pad", "fill: [0, 0]"): "model.image.fill: expected mean or list of 3 or null, got [0, 0]; change",
    ("kind: anyres", "pinpoints: [[64]]"): "model.image.pinpoints: expected list of lists, got [[64]]; change the",
    ("kind: pad", "fill: [0, 0, 256]"): "model.image.fill: [0, 0, 256] is not a colour",
    ("kind: anyres", "pinpoints: [[64, 65]]"): "model.image.pinpoints.0: 64 x 65 is not made of tiles of 64 pixels",
    ("kind: anyres", "pinpoints: [[64, 64000]]"): "model.image.pinpoints.0: 64 x 64000 is 1000 tiles; at most 256",
    ("kind: dynamic_tiles", "min_tiles: 5", "max_tiles: 4"): "model.image.min_tiles: 5 is more than",
    ("kind: dynamic_tiles", "max_tiles: 1000"): "model.image.max_tiles: 1000 tiles; at most 256 are possible",
    ("kind: slices",): "model.image.kind: slices are not square, and the tower",
    ("kind: anyres_max",): "data.sequence_length: 32 is too short: one image takes",
    ("image_size: 64",): "model.image.image_size: unknown key; did you mean model.vision.image_size",
    ("resample: nearest",): "model.image.resample: expected bicubic",
}


def loaded(*overrides: str) -> None:
    check_recipe(load_recipe("quickstart", [*overrides], expand_presets))


@pytest.mark.parametrize("keys", WRONG, ids=" ".join)
def test_wrong_keys_cost_a_line(keys: tuple[str, ...]) -> None:
    short = ["data.sequence_length=32"] if "anyres_max" in keys[0] else []
    with pytest.raises(RecipeError) as error:
        loaded(MLP, f"model.image={{{', '.join(keys)}}}", *short)
    assert WRONG[keys] in str(error.value) and "\n" not in str(error.value)


def test_tiles_need_features_that_stay_in_their_places() -> None:
    with pytest.raises(RecipeError, match="the connector 'resampler' does not keep them where their patches are"):
        check_recipe(tiny_recipe(model={"preset": "tiny", "image": {"kind": "anyres"}}))


def test_recipes_from_before_the_branch_squash(tmp_path: Path) -> None:
    recipe = tiny_recipe()
    assert recipe.model.image == ImageConfig()
    assert plan_of(recipe.model) == SquashPlan(recipe.model.vision.image_size, recipe.model.tokens_per_view)
    model = {
        name: {"preset": getattr(recipe.model, name).preset, "init_method_std": 0.02}
        | {field.name: getattr(getattr(recipe.model, name), field.name)
           for field in dataclasses.fields(getattr(recipe.model, name))}
        for name in ("vision", "connector", "language")
    }  # fmt: skip
    assert with_defaults({"model": model})["model"]["image"]["kind"] == "squash"


@dataclasses.dataclass(frozen=True)
class HalvesPlan(ImagePlan):
    """The left and the right half, each squashed (the example of docs/images.md)."""

    def lay_out(self, shape: ImageShape) -> ImageLayout:
        frame = Box(0, 0, 2 * self.side, self.side)
        whole = Canvas(Box(0, 0, shape.width, shape.height), (2 * self.side, self.side), frame)
        halves = (View(0, Box(0, 0, self.side, self.side)), View(0, Box(self.side, 0, 2 * self.side, self.side)))
        return ImageLayout(shape, (whole,), halves, (2 * self.tokens_per_view,), (1, 2))


def test_a_plan_of_another_package(monkeypatch: pytest.MonkeyPatch) -> None:
    media.plan_kinds()
    monkeypatch.setattr(media._KINDS, "known", dict(media._KINDS.known))
    register_plan(
        "halves",
        HalvesPlan,
        lambda model: HalvesPlan(model.vision.image_size, model.tokens_per_view),
        keys=("options",),
    )
    image = {"kind": "halves", "options": ["turn=1"]}
    recipe = tiny_recipe(model={"preset": "tiny", "image": image})
    check_recipe(recipe)
    layout = plan_of(recipe.model).plan(100, 50)
    assert layout.tokens == 2 * recipe.model.tokens_per_view and len(layout.views) == 2
    with pytest.raises(ValueError, match="registered twice"):
        register_plan("halves", HalvesPlan, lambda _: layout)  # type: ignore[arg-type,return-value]
