"""The panel of held-out answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megavlm.evaluation import panel
from megavlm.evaluation.panel import PanelItem, draw_panel

GREY = (200, 200, 200)


def picture(colour: tuple[int, int, int] = GREY, size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.new("RGB", size, colour)


def count(image: Image.Image, colour: tuple[int, int, int]) -> int:
    return int((np.asarray(image) == colour).all(axis=2).sum())


def extent(image: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    rows, columns = np.nonzero((np.asarray(image) == colour).all(axis=2))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def test_colour_tells_right_from_wrong() -> None:
    right = draw_panel([PanelItem("What?", "red", " Red", [picture()])])
    wrong = draw_panel([PanelItem("What?", "red", "blue", [picture()])])
    assert count(right, panel._RIGHT) > 200 and count(right, panel._WRONG) == 0
    assert count(wrong, panel._WRONG) > 200 and count(wrong, panel._RIGHT) == 0


def test_correctness_is_by_overlap_for_boxes_and_can_be_given() -> None:
    box = "<ref>a</ref><box>(0,0),(100,100)</box>"
    near, far = "<box>(0,0),(100,80)</box>", "<box>(500,500),(600,600)</box>"
    assert PanelItem("Where?", box, near).is_correct
    assert not PanelItem("Where?", box, far).is_correct
    assert PanelItem("Where?", box, far, correct=True).is_correct
    assert not PanelItem("What?", "red", "red", correct=False).is_correct
    for near, far in (("{<0><0><10><8>}", "{<50><50><60><60>}"), ("[[000,000,100,080]]", "[[500,500,600,600]]")):
        assert PanelItem("Where?", box, near).is_correct and PanelItem("Where?", near, near).is_correct
        assert not PanelItem("Where?", box, far).is_correct and not PanelItem("Where?", near, far).is_correct


@pytest.mark.parametrize(
    ("expected", "predicted"),
    [
        ("<box>(125,250),(500,750)</box>", "<box>(500,500),(875,875)</box>"),
        ("{<12><25><50><75>}", "<p>it</p>{<50><50><88><88>}"),
        ("[[125,250,500,750]]", "it is at [[500,500,875,875]]"),
        # A record's answer, and what a model of another notation says.
        ("<box>(125,250),(500,750)</box>", "{<50><50><88><88>}"),
    ],
)
def test_boxes_are_drawn_where_they_are(expected: str, predicted: str) -> None:
    tolerance = 4 if "{" in expected + predicted else 0  # hundredths of 800 pixels
    item = PanelItem("Where?", expected, predicted, [picture()])
    drawn = panel._pictures(item, 800, panel.ImageFont.load_default(14))
    assert extent(drawn, panel._WRONG) == pytest.approx((400, 400, 700, 700), abs=4 + tolerance)
    assert extent(drawn, panel._INK) == pytest.approx((100, 200, 400, 600), abs=6 + tolerance)
    # The dashed outline is one pixel wide and broken; the solid one is three wide.
    dashed = count(drawn, panel._INK)
    assert 0.3 * 1400 < dashed < 0.7 * 1400
    assert count(drawn, panel._WRONG) > 2.5 * 1200


def test_several_pictures_and_none() -> None:
    red, blue = (255, 0, 0), (0, 0, 255)
    font = panel.ImageFont.load_default(14)
    both = panel._pictures(PanelItem("Q", "a", "a", [picture(red), picture(blue)]), 200, font)
    assert count(both, red) == count(both, blue) == 96 * 96
    assert extent(both, red)[2] <= extent(both, blue)[0]
    five = panel._pictures(PanelItem("Q", "a", "a", [picture(red)] * 5), 200, font)
    assert count(five, red) == 5 * 62 * 62
    none = panel._pictures(PanelItem("Q", "a", "a"), 200, font)
    assert none.size == (200, 200) and count(none, panel._EMPTY) > 0.9 * 200 * 200


def test_a_wide_picture_keeps_its_proportions() -> None:
    red = (255, 0, 0)
    item = PanelItem("Q", "a", "a", [picture(red, (64, 32))])
    drawn = panel._pictures(item, 200, panel.ImageFont.load_default(14))
    assert extent(drawn, red) == (0, 50, 200, 150)


def test_grid_file_and_paths(tmp_path: Path) -> None:
    source = tmp_path / "one.jpg"
    picture().save(source)
    items = [PanelItem("Q", "a", "a", [source])] * 5
    target = tmp_path / "deep" / "panel.png"
    image = draw_panel(items, target, columns=3)
    assert image.width == 3 * (250 + 12) + 12
    with Image.open(target) as saved:
        assert saved.size == image.size
    single = draw_panel(items[:1], columns=3)
    assert single.width == 250 + 24 and image.height > 1.8 * single.height


def test_text_is_plain_and_wrapped() -> None:
    question = "Picture 1: <img>a.jpg</img>\nPicture 2: <img>b.jpg</img>\nWhich one?"
    assert panel._plain(question) == "Which one?"
    assert panel._plain("<ref>the cat</ref><box>(1,2),(3,4)</box>") == "the cat (1,2),(3,4)"
    font = panel.ImageFont.load_default(14)
    text = "word " * 12 + "x" * 80
    lines = panel._wrap(text, font, 120, most=50)
    assert all(font.getlength(line) <= 120 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    cut = panel._wrap(text, font, 120, most=3)
    assert len(cut) == 3 and cut[-1].endswith("...")
    assert all(font.getlength(line) <= 120 for line in cut)


def test_odd_answers_are_drawn_all_the_same() -> None:
    for predicted in ("", "\n\n", "圆形", "<box>(1,2", "<|im_end|>" * 20, "x" * 2000):
        draw_panel([PanelItem("Q", "red", predicted)])


def test_an_empty_panel_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        draw_panel([])
