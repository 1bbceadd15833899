"""The web page in a real browser, as a person uses it. SCREENSHOT=PATH keeps a picture of it."""

from __future__ import annotations

import base64
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from learnt import QUESTION
from PIL import Image
from serving import Served

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture
def page(served: Served) -> Iterator[Page]:
    """The page, open."""
    if CHROMIUM is None:
        pytest.skip("no chromium; apt-get install chromium (make test-browser tries to)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            one = browser.new_page(viewport={"width": 900, "height": 1240})
            one.set_default_timeout(30_000)
            one.goto(served.url)
            yield one
        finally:
            browser.close()


def test_a_picture_is_uploaded_and_its_box_is_drawn(page: Page, served: Served) -> None:
    page.locator("input[type=file]").set_input_files(str(served.picture))
    page.locator(".q-footer .q-img img").first.wait_for()
    page.get_by_placeholder("Ask about the pictures").fill(QUESTION)
    page.get_by_role("button", name="Send").click()
    page.get_by_text("The red disc (125,250),(500,625) is there.").wait_for()
    drawn = page.locator(".q-message-received .q-img img")
    drawn.wait_for()
    pixels = np.asarray(_image(drawn.get_attribute("src") or "").convert("RGB")).astype(int)
    height, width, _ = pixels.shape
    assert width >= 512
    for x, y in ((0.125, 0.625), (0.5, 0.25), (0.5, 0.625)):  # corners, where the picture itself is pale
        assert np.abs(pixels[round(y * height), round(x * width)] - (214, 39, 40)).sum() < 60
        assert pixels[round(y * height) + 12, round(x * width) + 12].min() > 200
    # The picture has gone with the question; the next one goes without.
    assert page.locator(".q-footer .q-img img").count() == 0
    page.wait_for_timeout(500)
    if "SCREENSHOT" in os.environ:
        page.screenshot(path=os.environ["SCREENSHOT"])
    page.get_by_placeholder("Ask about the pictures").fill("And <img> now?")
    page.get_by_role("button", name="Send").click()
    page.get_by_text("the prompt has 1 <img>, and 0 picture(s) are given").wait_for()
    page.get_by_role("button", name="New conversation").click()
    page.get_by_text("is there.").wait_for(state="detached")


def test_what_is_no_picture_is_refused_with_a_reason(page: Page, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    page.locator("input[type=file]").set_input_files(str(broken))
    page.get_by_text("broken.png: image 1 cannot be used").wait_for()


def test_text_is_shown_as_text(page: Page) -> None:
    said = "<b id=forged>bold</b><script>document.title='forged'</script>"
    page.get_by_placeholder("Ask about the pictures").fill(said)
    page.get_by_role("button", name="Send").click()
    page.get_by_text(said).first.wait_for()
    assert page.locator("#forged").count() == 0 and "forged" not in page.title()


def _image(url: str) -> Image.Image:
    assert url.startswith("data:image/"), url[:80]
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
