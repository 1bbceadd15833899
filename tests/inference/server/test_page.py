"""The web page in a real browser, as a person uses it. SCREENSHOT=PATH keeps a picture of it."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import shutil
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import numpy as np
import pytest
from learnt import QUESTION
from PIL import Image
from serving import Served
from test_api import health, png, wait_until

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's."""
    if CHROMIUM is None:
        pytest.skip("no chromium; apt-get install chromium (make test-browser tries to)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield running
        finally:
            running.close()


@pytest.fixture
def page(browser: Browser, served: Served) -> Iterator[Page]:
    """The page, open."""
    with opened(browser, served) as one:
        yield one


@pytest.fixture
def hooked_page(browser: Browser, hooked: Served) -> Iterator[Page]:
    """The page of the slow model."""
    with opened(browser, hooked) as one:
        yield one


@contextlib.contextmanager
def opened(browser: Browser, served: Served) -> Iterator[Page]:
    one = browser.new_page(viewport={"width": 900, "height": 1100})
    asked: list[str] = []
    one.on("request", lambda request: asked.append(request.url))
    try:
        one.set_default_timeout(30_000)
        one.goto(served.url)
        one.get_by_label("Your question").wait_for()
        yield one
        assert len(asked) > 3  # and nothing is loaded from elsewhere
        assert all(url.startswith((served.url, "data:", "blob:")) for url in asked)
    finally:
        one.close()


def upload(page: Page, **files: bytes) -> None:
    """Upload pictures; ``scene`` is there as ``scene.png``."""
    named = [{"name": f"{name}.png", "mimeType": "image/png", "buffer": data} for name, data in files.items()]
    page.locator("input[type=file]").set_input_files(named)


def ask(page: Page, text: str) -> None:
    page.get_by_label("Your question").fill(text)
    page.get_by_role("button", name="Send").click()


def test_a_picture_is_uploaded_and_its_box_is_drawn(page: Page, served: Served) -> None:
    waiting = page.get_by_role("list", name="Pictures of the next question").get_by_role("listitem")
    upload(page, other=png(60, 40), scene=served.picture.read_bytes())
    waiting.nth(1).wait_for()
    assert waiting.get_by_role("img", name="scene.png").count() == 1
    page.get_by_role("button", name="Remove other.png").click()
    waiting.nth(1).wait_for(state="detached")
    ask(page, QUESTION)
    page.get_by_text("The red disc (125,250),(500,625) is there.").wait_for()
    page.get_by_role("img", name="The last picture with the answer's boxes").wait_for()
    pixels = np.asarray(_image(page.locator(".q-message-received .q-img img").get_attribute("src") or "")).astype(int)
    height, width, _ = pixels.shape
    assert width >= 512
    for x, y in ((0.125, 0.625), (0.5, 0.25), (0.5, 0.625)):  # corners, where the picture itself is pale
        assert np.abs(pixels[round(y * height), round(x * width)] - (214, 39, 40)).sum() < 60
        assert pixels[round(y * height) + 12, round(x * width) + 12].min() > 200
    # The picture has gone with the question; the next one goes without.
    assert waiting.count() == 0
    page.wait_for_timeout(500)
    if "SCREENSHOT" in os.environ:
        page.screenshot(path=os.environ["SCREENSHOT"])
    ask(page, "And <img> now?")
    page.get_by_role("alert").get_by_text("the prompt has 1 <img>, and 0 picture(s) are given").wait_for()
    ask(page, "Sure?")  # a second turn, which still shows the first one's picture
    page.locator(".q-message-received").nth(1).get_by_text("is there").wait_for()
    page.get_by_role("button", name="New conversation").click()
    page.locator(".q-message").first.wait_for(state="detached")


def test_two_pictures_are_asked_about_together(page: Page, served: Served) -> None:
    upload(page, other=png(60, 40), scene=served.picture.read_bytes())
    page.get_by_role("button", name="Remove scene.png").wait_for()
    ask(page, QUESTION)
    page.locator(".q-message-sent").get_by_role("img", name="Picture 2").wait_for()
    page.locator(".q-message-received").get_by_text("is there").wait_for()
    upload(page, third=png(60, 40))  # the server takes two
    page.get_by_role("alert").get_by_text("third.png: a conversation has room for 2 pictures").wait_for()


def test_what_is_used_has_a_name(page: Page) -> None:
    page.get_by_label("Your question").wait_for()
    assert page.get_by_role("slider", name="Temperature").count() == 1
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Add pictures").click()
    assert chooser.value.is_multiple()
    for button in page.get_by_role("button").all():
        assert (button.get_attribute("aria-label") or button.inner_text()).strip()
    assert page.get_by_role("log", name="Conversation").count() == 1


def test_what_is_no_picture_is_refused_with_a_reason(page: Page) -> None:
    upload(page, broken=b"no picture")
    page.get_by_role("alert").get_by_text("broken.png: image 1 cannot be used").wait_for()


def test_text_is_shown_as_text(page: Page) -> None:
    said = "<b id=forged>bold</b><script>document.title='forged'</script>"
    ask(page, said)
    page.locator(".q-message-sent").get_by_text(said).wait_for()
    assert page.locator("#forged").count() == 0 and "forged" not in page.title()


def test_an_answer_is_stopped_and_a_closed_page_asks_no_further(hooked_page: Page, hooked: Served) -> None:
    page = hooked_page
    before = health(hooked)["tokens"]
    upload(page, scene=hooked.picture.read_bytes())
    page.get_by_role("button", name="Remove scene.png").wait_for()
    ask(page, QUESTION)
    page.locator(".q-message-received").get_by_text("The").wait_for()
    page.get_by_role("button", name="Stop").click()
    page.get_by_role("button", name="Send").wait_for()
    wait_until(lambda: health(hooked)["requests"] == 0)
    assert health(hooked)["tokens"] - before < 30  # of 34
    before = health(hooked)["tokens"]
    ask(page, QUESTION)
    page.locator(".q-message-received").nth(1).wait_for()
    page.close()
    wait_until(lambda: health(hooked)["requests"] == 0)


def test_uploads_have_bounds_too(hooked_page: Page, hooked: Served) -> None:
    with hooked_page.expect_request("**/upload/**") as request:
        upload(hooked_page, scene=hooked.picture.read_bytes())
    for length, wanted in ((2 << 20, 413), (500, 408)):
        parts = urlsplit(request.value.url)
        with socket.create_connection((parts.hostname, parts.port), 10) as one:
            head = f"POST {parts.path} HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n"
            one.sendall(f"{head}Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n".encode())
            assert f" {wanted} ".encode() in one.recv(65536)


def _image(url: str) -> Image.Image:
    assert url.startswith("data:image/"), url[:80]
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")
