"""How a model sees a picture, for each kind of plan."""

from __future__ import annotations

import pytest

from megavlm.data.media import ImagePlan
from megavlm.data.plans_native import NativePlan
from megavlm.data.plans_single import CropPlan, PadPlan, SquashPlan
from megavlm.data.plans_slices import SlicesPlan
from megavlm.data.plans_tiles import AnyresPlan, DynamicTilesPlan
from megavlm.data.seen import said, seen, token_range

POINTS = ((336, 672), (672, 336), (672, 672))


def test_one_square() -> None:
    (plane,) = seen(SquashPlan(336, 144), SquashPlan(336, 144).plan(640, 480))
    assert plane.picture == (0, 0, 1, 1) and plane.views == ((0, 0, 1, 1),) and not plane.padded
    plan = PadPlan(336, 144)
    (plane,) = seen(plan, plan.plan(640, 480))
    assert plane.padded and plane.picture == pytest.approx((0, 0.125, 1, 0.75))
    assert said(plan, plan.plan(640, 480)) == "one view at 336 x 336, padded: 144 tokens"
    crop = CropPlan(336, 144, short_side=336)
    (plane,) = seen(crop, crop.plan(640, 480))
    assert not plane.padded and plane.picture == pytest.approx((-1 / 6, 0, 4 / 3, 1), abs=3e-3)
    assert token_range(plan) == (144, 144, 1)


def test_tiles() -> None:
    plan = DynamicTilesPlan(448, 256)
    layout = plan.plan(1344, 896)
    tiles, overview = seen(plan, layout)
    assert (
        tiles.size == (1344, 896)
        and len(tiles.views) == 6
        and tiles.views[4] == pytest.approx((1 / 3, 0.5, 1 / 3, 0.5))
    )
    assert overview.views == ((0, 0, 1, 1),)
    assert said(plan, layout) == "3 x 2 tiles of 448 x 448 + whole at 448 x 448: 1,792 tokens"
    assert token_range(plan) == (256, 3328, 13)
    any_plan = AnyresPlan(336, 576, pinpoints=POINTS)
    layout = any_plan.plan(1000, 1000)
    assert [plane.padded for plane in seen(any_plan, layout)] == [False, False]
    layout = any_plan.plan(1000, 800)
    overview, tiles = seen(any_plan, layout)
    assert tiles.padded and tiles.picture[3] < 0.9 and said(any_plan, layout).count("padded") == 1


def test_own_sizes() -> None:
    plan = NativePlan(448, 256)
    layout = plan.plan(640, 480)
    (plane,) = seen(plan, layout)
    assert plane.blocks == (23, 17) and layout.tokens == 23 * 17
    assert said(plan, layout) == "resized to 644 x 476, 23 x 17 blocks: 391 tokens"
    least, most, views = token_range(plan)
    assert (least, views) == (4, 1) and 1200 < most <= 1280
    slices = SlicesPlan(448, 64)
    assert len(seen(slices, slices.plan(2000, 1000))) == 2


@pytest.mark.parametrize(
    "plan", [SquashPlan(336, 144), NativePlan(448, 256), DynamicTilesPlan(448, 256), SlicesPlan(448, 64)]
)
@pytest.mark.parametrize("size", [(1, 1), (37, 5000), (6000, 31), (4000, 3000)])
def test_views_lie_within_their_plane(plan: ImagePlan, size: tuple[int, int]) -> None:
    if isinstance(plan, NativePlan):
        size = (max(size[0], 31), max(size[1], 31))
    layout = plan.plan(*size)
    planes = seen(plan, layout)
    assert sum(len(plane.views) for plane in planes) == len(layout.views)
    for plane in planes:
        for left, top, width, height in plane.views:
            assert left >= -1e-9 and left + width <= 1 + 1e-9 and top >= -1e-9 and top + height <= 1 + 1e-9
