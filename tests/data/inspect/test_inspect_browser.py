"""The page of ``megavlm inspect`` in a real browser, from the disk. INSPECT_SCREENSHOT=PATH keeps a picture of it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from data_helpers import encode_image, prepare
from PIL import Image

from megavlm import cli

pytestmark = pytest.mark.browser
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
EVIL = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


def test_boxes_lie_where_they_belong_and_nothing_of_the_data_runs(tmp_path: Path, tokenizer_path: Path) -> None:
    if CHROMIUM is None:
        pytest.skip("no chromium; apt-get install chromium (make test-browser tries to)")
    from playwright.sync_api import sync_playwright

    images = tmp_path / "images"
    images.mkdir()
    (images / "a.jpg").write_bytes(encode_image(Image.new("RGB", (640, 480), (240, 240, 235))))
    turns = [
        {"from": "user", "value": f"<img>a.jpg</img>Where is <ref>the cat</ref> {EVIL}"},
        {"from": "assistant", "value": "<ref>the cat</ref><box>(100,200),(500,700)</box>"},
    ]
    shards = prepare(tmp_path, [{"conversations": turns, "task": EVIL}] * 4, name="a", images=images)
    out = tmp_path / "page.html"
    words = [shards, "-o", out, "--tokenizer", tokenizer_path, "--tokens-per-image", 6, "--sequence-length", 600]
    assert cli.main(["inspect", *map(str, words), "--samples", "1", "--packs", "1"]) == 0
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1184, "height": 1900})
        asked: list[str] = []
        said: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(out.as_uri())
        assert [url for url in asked if not url.startswith("data:")] == [out.as_uri()]
        assert said == []
        assert page.title() != "owned"
        frame = page.locator("#sample-1 .frame")
        picture = frame.locator("img").bounding_box()
        box = frame.locator("polygon:not(.rim)").bounding_box()
        assert picture is not None and box is not None
        assert picture["width"] == 280
        for low, size, from_, to in (("x", "width", 0.1, 0.5), ("y", "height", 0.2, 0.7)):
            start = (box[low] - picture[low]) / picture[size]
            assert start == pytest.approx(from_, abs=0.02)
            assert start + box[size] / picture[size] == pytest.approx(to, abs=0.02)
        assert frame.locator("b").inner_text() == "the cat"
        assert page.locator("#sample-1 .plane").is_visible()  # as the model sees it
        # No line of the page is wider than the window.
        assert page.evaluate("document.documentElement.scrollWidth") <= 1184
        if "INSPECT_SCREENSHOT" in os.environ:
            page.screenshot(path=os.environ["INSPECT_SCREENSHOT"])
        page.set_viewport_size({"width": 360, "height": 740})
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        page.set_viewport_size({"width": 1600, "height": 900})
        assert (
            page.evaluate("getComputedStyle(document.querySelector('.blocks')).gridTemplateColumns.split(' ').length")
            == 2
        )
        browser.close()
