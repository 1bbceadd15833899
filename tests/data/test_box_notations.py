"""Boxes in the notations that published models write."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megavlm.data.box_notations import find_boxes
from megavlm.data.box_words import NOTATIONS
from megavlm.data.templates import find_template, names

WHOLE = (0.1, 0.2, 0.5, 0.75)


@pytest.mark.parametrize(
    ("answer", "name"),
    [
        ("Here: <ref>the cat</ref><box>(100,200),(500,750)</box>.", "the cat"),
        ("<box>(100, 200), (500, 750)</box>", None),
        ("<|object_ref_start|>the cat<|object_ref_end|><|box_start|>(100,200),(500,750)<|box_end|>", "the cat"),
        ("<ref>the cat</ref><box>[[100, 200, 500, 750]]</box>", "the cat"),
        ("<ref>the cat</ref><box>100 200 500 750</box>", "the cat"),
        ('```json\n[\n\t{"bbox_2d": [100, 200, 500, 750], "label": "the cat"}\n]\n```', "the cat"),
        ('{"label": "the cat", "bbox_2d": [100, 200, 500, 750.0]}', "the cat"),
        ("It is at <|begin_of_box|>[[100,200,500,750]]<|end_of_box|>", None),
        ("It is at <|begin_of_box|><100,200,500,750><|end_of_box|>", None),
        ('{"found": [{"label": "the cat", "bbox_2d": [[100, 200, 500, 750]]}]}', "the cat"),
        ("<loc0205><loc0102><loc0768><loc0512> the cat", "the cat"),
        ("[0.1, 0.2, 0.5, 0.75]", None),
        ("[.1,.2,.5,.75]", None),
        ("A cat [[100,200,500,750]] sits.", None),
        ("<p>the cat</p> {<10><20><50><75>}", "the cat"),
        ("{<10><20><50><75>}", None),
        ("{ <10> <20><unk><50> <75>}", None),
    ],
)
def test_each_notation(answer: str, name: str | None) -> None:
    (found,) = find_boxes(answer)
    assert found.name == name
    assert found.sides == pytest.approx(WHOLE, abs=6e-4)


def test_several_boxes_stand_in_their_order_and_pixels_are_of_what_the_model_sees() -> None:
    several = "<ref>a</ref><box>[[0, 0, 500, 500], [500, 500, 1000, 1000]]</box> <ref>b</ref><box>(1,1),(2,2)</box>"
    assert [(one.name, one.sides[0]) for one in find_boxes(several)] == [("a", 0.0), ("a", 0.5), ("b", 0.001)]
    cog = find_boxes("two cats[[000,010,500,500;500,500,999,999]] and a dog[[001,001,002,002]]")
    assert [one.sides[0] for one in cog] == [0.0, 0.5, 0.001]
    assert [one.sides[0] for one in find_boxes("[[000,010,500,500],[500,500,999,999], [001,001,002,002]]")] == [
        0.0, 0.5, 0.001,
    ]  # fmt: skip
    hundredths = "a photo of <p>a</p> {<0><0><50><50>}<delim>{<50><50><100><100>} and <p>b</p>{<1><1><2><2>}{<1><2><3>}"
    assert [(one.name, one.sides[0]) for one in find_boxes(hundredths)] == [("a", 0.0), ("a", 0.5), ("b", 0.01)]
    answer = '[{"bbox_2d": [64, 96, 320, 360], "label": "cat"}, {"bbox_2d": [0, 0, 640, 480], "label": "dog"'
    (cat,) = find_boxes(answer, pixels_of=(640, 480))  # the list was cut off within the second
    assert cat == ("cat", pytest.approx((0.1, 0.2, 0.5, 0.75)))
    # Other notations mean thousandths in such a model too.
    assert find_boxes("<box>(100,200),(500,750)</box>", pixels_of=(640, 480))[0].sides == pytest.approx(WHOLE)


@pytest.mark.parametrize(
    "answer",
    [
        "", "nothing", "<box>(100,200)</box>", "<box>(500,200),(100,750)</box>",
        "<box>(1000,0),(1200,10)</box>", "<box>(5,-9),(9,0)</box>",
        '{"bbox_2d": [1, 2, 3]}', '{"bbox_2d": ["1", 2, 3, 4]}', '{"bbox_2d": [true, 2, 3, 4]}', "[1, 2, 3, 4]",
        "bbox_2d " + "[" * 300_000, '{"bbox_2d": [1' + "0" * 400 + ", 0, 1, 1]}", '{"bbox_2d": [NaN, 0, 1e999, 1]}',
        "<ref>" * 3000, "<|object_ref_start|>" * 2000, "[0.1," * 3000,
        "[[1,2,3,4]]", "[[100,200,300]]", "[[100,200,500,750;" * 2000,
        "<ref>" * 3000, "{<101><0><5><5>}", "<p>a" * 3000, "{<1><1>" * 3000,
        "<|object_ref_start|>" * 2000, "[0.1," * 3000,
    ],
)  # fmt: skip
def test_what_is_no_box_is_left_out(answer: str) -> None:
    assert find_boxes(answer) == []


@pytest.mark.parametrize(
    ("answer", "sides"),
    [
        ('[{"bbox_2d": [-1, 96, 641, 360]}, {"bbox_2d": [0, 0, 9, 9]}]', (0.0, 0.2, 1.0, 0.75)),
        ("<box>(100,200),(500,1001)</box>", (0.1, 0.2, 0.5, 1.0)),
        ("<box>(-2,-1),(1200,750)</box>", (0.0, 0.0, 1.0, 0.75)),
        ("<|begin_of_box|>[[-1,200,500,750]]<|end_of_box|>", (0.0, 0.2, 0.5, 0.75)),
        ("[-.01, 0.2, 0.5, 1.02]", (0.0, 0.2, 0.5, 1.0)),
        ("{<10><20><101><75>}", (0.1, 0.2, 1.0, 0.75)),
    ],
)
def test_a_box_that_leaves_the_picture_is_cut_at_its_edges(answer: str, sides: tuple[float, ...]) -> None:
    assert find_boxes(answer, pixels_of=(640, 480))[0].sides == pytest.approx(sides)


def test_there_is_a_bound() -> None:
    assert len(find_boxes("<box>(1,1),(2,2)</box>" * 1000)) == 200


def test_bare_numbers_count_the_square_that_the_picture_is_padded_to() -> None:
    # A picture of 2 to 1 lies in the middle of its square: from a quarter of its height to three quarters.
    place = (0.0, 0.25, 1.0, 0.5)
    (found,) = find_boxes("[0.1, 0.35, 0.5, 0.625]", parts_of=place)
    assert found.sides == pytest.approx(WHOLE)
    assert find_boxes("[0.1, 0.2, 0.5, 0.5]", parts_of=place)[0].sides == pytest.approx((0.1, 0.0, 0.5, 0.5))
    assert find_boxes("[0.1, 0.0, 0.5, 0.2]", parts_of=place) == []  # padding alone
    assert find_boxes("<box>(100,200),(500,750)</box>", parts_of=place)[0].sides == pytest.approx(WHOLE)


@pytest.mark.parametrize(
    ("name", "written", "edges"),
    [
        ("qwen_vl", "<box>(100,200),(500,750)</box>", "<box>(0,0),(999,999)</box>"),
        ("minigpt_v2", "{<10><20><50><75>}", "{<0><0><100><100>}"),
        ("cogvlm", "[[100,200,500,750]]", "[[000,000,999,999]]"),
    ],
)
def test_what_is_written_is_read(name: str, written: str, edges: str) -> None:
    """The forms are written once more, from the papers and code that box_words.py names."""
    notation = NOTATIONS[name]
    assert (notation.write(WHOLE), notation.write((-1, 0, 1, 2))) == (written, edges)
    assert notation.write_pixels((64, 96, 320, 360), (640, 480)) == written
    assert find_boxes(notation.write((0.337, 0.005, 0.339, 0.019)))[:1] == find_boxes(
        {"qwen_vl": "<box>(337,5),(339,19)</box>", "minigpt_v2": "", "cogvlm": "[[337,005,339,019]]"}[name]
    )  # of less than a hundredth there is no box with an area
    (found,) = find_boxes(f"It is at {written}.")
    assert found.sides == pytest.approx(WHOLE)
    assert "{thing}" in notation.asks and "{box}" in notation.names and "{thing}" in notation.named


def test_templates_name_notations_that_there_are_and_no_token_depends_on_it() -> None:
    taught = {name: find_template(name).boxes for name in names()}
    assert {one for one in taught.values() if one} == set(NOTATIONS)
    assert [name for name, boxes in taught.items() if boxes == "minigpt_v2"] == ["minigpt_v2", "tinygpt_v"]
    assert [name for name, boxes in taught.items() if boxes == "qwen_vl"] == ["qwen_vl"]
    for name in ("qwen_vl", "cogvlm"):  # saved states have the fingerprint
        template = find_template(name)
        assert replace(template, boxes="").fingerprint == template.fingerprint
