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


def page_of(path: Path, *cards: Card) -> str:
    page = Page(
        title="vqav2: 4 questions",
        facts={"run": "<b>x</b>"},
        values={"vqa_accuracy": 41.5},
        kinds={"number": {"vqa_accuracy": 25.0, "questions": 4.0}, "other": {"vqa_accuracy": 75.0, "questions": 1.0}},
        published={"vqa_accuracy": {"Qwen-VL": 78.2}, "unknown": {"Nobody": 1.0}},
        problems=["7 counts as wrong: <img onerror=x>"],
        cards=cards,
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


@pytest.mark.browser
def test_the_filter_in_a_browser(tmp_path: Path) -> None:
    if CHROMIUM is None:
        pytest.skip("no chromium; apt-get install chromium (make test-browser tries to)")
    from playwright.sync_api import sync_playwright

    page_of(tmp_path / "a.html", card(0.0), card(0.0), card(0.3), card(1.0))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            page = browser.new_page()
            page.goto((tmp_path / "a.html").as_uri())
            for label, count in (("wrong (2)", 2), ("partly right (1)", 1), ("right (1)", 1), ("all (4)", 4)):
                page.get_by_text(label, exact=True).click()
                assert page.locator(".card:visible").count() == count, label
        finally:
            browser.close()
