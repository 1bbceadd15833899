"""The report page: what stands on it, boxes in the pictures, and its filter in a real browser."""

from __future__ import annotations

import base64
import io
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megavlm.data.media import ImagePlan
from megavlm.data.plans_native import NativePlan
from megavlm.data.plans_single import PadPlan
from megavlm.data.plans_tiles import DynamicTilesPlan
from megavlm.evaluation.metrics.grounding import box_text
from megavlm.evaluation.report import Card, Page, write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SIDE = 200


def white() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), "white").save(file, "PNG")
    return file.getvalue()


def card(score: float | None, predicted: str = "red", expected: str = "blue") -> Card:
    return Card(f"id {score}", "What?", expected, predicted, score, [white()])


def page_of(path: Path, *cards: Card, plan: ImagePlan | None = None) -> str:
    page = Page(
        title="vqav2: 4 questions",
        facts={"run": "<b>x</b>"},
        values={"vqa_accuracy": 41.5},
        kinds={"number": {"vqa_accuracy": 25.0, "questions": 4.0}, "other": {"vqa_accuracy": 75.0, "questions": 1.0}},
        published={"vqa_accuracy": {"Qwen-VL": 78.2}, "unknown": {"Nobody": 1.0}},
        problems=["7 counts as wrong: <img onerror=x>"],
        cards=cards,
        plan=plan,
    )
    write_report(path, page)
    return path.read_text("utf-8")


def test_figures_stand_beside_published_ones(tmp_path: Path) -> None:
    text = page_of(tmp_path / "a.html", card(0.0), card(0.3), card(1.0), card(None))
    assert '<th>this run</th><td class="n">41.50</td><td class="n"><div class="bar"><i style="width:41.5%">' in text
    assert (
        '<th>Qwen-VL</th><td class="n">78.20</td><td class="n"><div class="bar other"><i style="width:78.2%">' in text
    )
    assert "Nobody" not in text  # a figure that this run does not have
    assert '<th>number</th><td class="n">25.00</td><td class="n">4</td>' in text
    for label in ("all (4)", "wrong (1)", "partly right (1)", "right (1)", "not scored (1)"):
        assert f">{label}</label>" in text
    assert "&lt;b&gt;x&lt;/b&gt;" in text
    assert "&lt;img onerror=x&gt;" in text
    assert not re.search(r"<script|<img onerror|https?://", text)
    alone = page_of(tmp_path / "b.html", card(1.0))
    assert "wrong (" not in alone
    assert "Boxes:" not in alone


@pytest.mark.parametrize(("score", "colour"), [(1.0, (18, 128, 62)), (0.0, (196, 36, 44))])
def test_boxes_are_drawn(score: float, colour: tuple[int, int, int], tmp_path: Path) -> None:
    size = (SIDE, SIDE)
    said, true = box_text((20, 40, 120, 160), size), box_text((30, 50, 130, 170), size)
    text = page_of(tmp_path / "a.html", card(score, said, true))
    assert "Boxes: predicted is solid" in text
    encoded = re.findall(r"data:image/jpeg;base64,([^\"]+)", text)
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded[0]))).convert("RGB")).astype(int)
    scale = pixels.shape[0] / SIDE
    edge = pixels[round(100 * scale), round(20 * scale) - 4 : round(20 * scale) + 5]
    assert np.abs(edge - colour).sum(1).min() < 60
    # The expected box is dashed: dark here and there along its edge.
    edge = pixels[round(60 * scale) : round(150 * scale), round(130 * scale) - 2 : round(130 * scale) + 3].sum(2).min(1)
    assert 0.2 < (edge < 300).mean() < 0.9
    assert pixels[5, 5].min() > 240


def test_pictures_stand_there_as_the_model_sees_them(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.new("RGB", (200, 100), "white").save(file, "PNG")
    one = Card("a", "What?", "blue", "red", 0.0, [file.getvalue()])
    text = page_of(tmp_path / "a.html", one, plan=DynamicTilesPlan(64, 16, max_tiles=4))
    assert "2 x 1 tiles of 64 x 64 + whole at 64 x 64: 48 tokens" in text
    assert text.count('<rect class="cut"') == 2 and 'class="pad"' not in text
    text = page_of(tmp_path / "a.html", one, plan=PadPlan(64, 16, fill=(120, 60, 30)))
    assert "one view at 64 x 64, padded: 16 tokens" in text and text.count('class="pad"') == 1
    plane = re.findall(r"data:image/jpeg;base64,([^\"]+)", text)[1]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(plane))).convert("RGB")).astype(int)
    assert np.abs(pixels[3, 32] - (120, 60, 30)).max() < 12 and pixels[32, 32].min() > 240
    text = page_of(tmp_path / "a.html", one, plan=NativePlan(56, 4))
    assert "resized to 196 x 112, 7 x 4 blocks: 28 tokens" in text and text.count('class="block"') == 1
    # A picture that the plan cannot have is told of, and the page is made all the same.
    narrow = io.BytesIO()
    Image.new("RGB", (900, 2), "white").save(narrow, "PNG")
    text = page_of(tmp_path / "a.html", Card("a", "?", "b", "c", 0.0, [narrow.getvalue()]), plan=NativePlan(56, 4))
    assert "The model cannot have it: too narrow" in text


@pytest.mark.browser
def test_the_filter_in_a_browser(tmp_path: Path) -> None:
    if CHROMIUM is None:
        pytest.skip("no chromium; apt-get install chromium (make test-browser tries to)")
    from playwright.sync_api import sync_playwright

    page_of(tmp_path / "a.html", card(1.0), card(0.0), card(0.3), card(0.0), plan=DynamicTilesPlan(64, 16, max_tiles=4))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            page = browser.new_page(viewport={"width": 1280, "height": 800})
            page.goto((tmp_path / "a.html").as_uri())
            for label, count in (("wrong (2)", 2), ("partly right (1)", 1), ("right (1)", 1), ("all (4)", 4)):
                page.get_by_text(label, exact=True).click()
                assert page.locator(".card:visible").count() == count, label
            assert (
                page.locator(".card.wrong").first.bounding_box()["y"] >= page.locator(".card.right").bounding_box()["y"]
            )
            page.get_by_text("worst first").click()
            first = min(page.locator(".card").all(), key=lambda one: (one.bounding_box()["y"], one.bounding_box()["x"]))
            assert "wrong" in first.get_attribute("class")
            page.get_by_text("as the model sees it").first.click()
            assert page.locator(".plane:visible").first.bounding_box()["width"] > 50
            ground = "getComputedStyle(document.body).backgroundColor"
            light = page.evaluate(ground)
            page.get_by_text("light / dark").click()
            assert page.evaluate(ground) != light
            page.emulate_media(color_scheme="dark")  # the switch goes the other way now
            assert page.evaluate(ground) == light
            figures, cards = page.locator(".figures"), page.locator(".cards")
            assert figures.bounding_box()["x"] + figures.bounding_box()["width"] <= cards.bounding_box()["x"]
            page.set_viewport_size({"width": 360, "height": 740})
            assert page.evaluate("document.documentElement.scrollWidth") == 360
        finally:
            browser.close()
