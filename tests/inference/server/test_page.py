"""The web page in a real browser, as a person uses it. SCREENSHOTS=FOLDER keeps pictures of it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from learnt import ANSWER, QUESTION
from serving import Served
from test_api import health, png, wait_until

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
EVIL = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
CONTRASTS = """() => {
  const parts = (colour) => {
    const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
    canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a];
  };
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (element) => {
    for (let one = element; one; one = one.parentElement) {
      const colour = parts(getComputedStyle(one).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255, 255];
  };
  const low = [];
  for (const element of document.querySelectorAll("body *")) {
    const words = [...element.childNodes].some((one) => one.nodeType === 3 && one.data.trim());
    if (!words || !element.checkVisibility() || element.closest(".unseen, .skip, noscript")) continue;
    const [a, b] = [parts(getComputedStyle(element).color), ground(element)].map(light).sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) low.push(`${element.tagName} ${element.className} ${element.textContent}: ${ratio.toFixed(2)}`);
  }
  return low;
}"""
"""Texts whose contrast is below AA."""


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


@contextlib.contextmanager
def opened(browser: Browser, served: Served, **options: Any) -> Iterator[Page]:
    """Open the page; it loads nothing from elsewhere, and its policy forbids nothing that it does."""
    context = browser.new_context(**{"viewport": {"width": 900, "height": 1100}, **options})
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    one = context.new_page()
    asked: list[str] = []
    said: list[str] = []
    one.on("request", lambda request: asked.append(request.url))
    one.on("pageerror", lambda error: said.append(str(error)))
    one.on("console", lambda message: said.append(message.text) if "Failed to load" not in message.text else None)
    try:
        one.set_default_timeout(300_000)
        one.goto(served.url)
        one.get_by_role("heading", name="tiny", exact=True).wait_for()
        yield one
        assert len(asked) > 8
        assert all(url.startswith((served.url, "data:", "blob:")) for url in asked)
        assert said == []
    finally:
        context.close()


def upload(page: Page, **files: bytes) -> None:
    """Upload pictures; ``scene`` is there as ``scene.png``."""
    named = [{"name": f"{name}.png", "mimeType": "image/png", "buffer": data} for name, data in files.items()]
    page.locator("input[type=file]").set_input_files(named)


def ask(page: Page, text: str) -> None:
    page.get_by_label("Your question").fill(text)
    page.get_by_role("button", name="Send").click()


def answers(page: Page) -> Any:
    return page.get_by_role("article", name="tiny")


def say(page: Page, answer: str) -> None:
    """Let the model say something that this one has not learnt; all else is the real server's."""

    def fulfil(route: Any) -> None:
        chunks = [{"choices": [{"delta": {"content": answer[i : i + 7]}, "finish_reason": None}]}
                  for i in range(0, len(answer), 7)]  # fmt: skip
        chunks.append({"choices": [{"delta": {}, "finish_reason": "stop"}]})
        body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
        route.fulfill(body=body, content_type="text/event-stream")

    page.route("**/v1/chat/completions", fulfil)


def test_a_picture_is_asked_about_and_its_box_is_drawn(page: Page, served: Served) -> None:
    shelf = page.get_by_role("list", name="Pictures of the next question").get_by_role("listitem")
    upload(page, other=png(60, 40), scene=served.picture.read_bytes())
    shelf.nth(1).wait_for()
    page.get_by_role("button", name="Remove other.png").click()
    shelf.get_by_text("4 tokens").wait_for()
    assert shelf.count() == 1
    with page.expect_request("**/v1/chat/completions") as request:
        ask(page, QUESTION)
    assert request.value.post_data_json["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png")
    answers(page).get_by_text("The red disc (125,250),(500,625) is there.").wait_for()
    stage = page.locator(".stage")
    picture, box = stage.locator("img").bounding_box(), stage.locator("rect:not(.rim)").bounding_box()
    assert picture is not None and box is not None
    for low, size, start, end in (("x", "width", 0.125, 0.5), ("y", "height", 0.25, 0.625)):
        assert (box[low] - picture[low]) / picture[size] == pytest.approx(start, abs=0.02)
        assert (box[low] + box[size] - picture[low]) / picture[size] == pytest.approx(end, abs=0.02)
    assert page.get_by_role("list", name="Boxes").get_by_role("button", name="red disc").count() == 1
    answers(page).get_by_text("33 tokens").wait_for()
    assert "The red disc" in page.get_by_role("log").inner_text()
    page.get_by_role("button", name="Copy").click()
    page.get_by_role("button", name="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == ANSWER
    page.get_by_role("button", name="Try again").click()
    answers(page).get_by_text("33 tokens").wait_for()
    assert answers(page).count() == 1
    # The picture has gone with the question; a second turn still shows it to the model.
    assert shelf.count() == 0
    with page.expect_request("**/v1/chat/completions") as request:
        ask(page, "Sure?")
    assert [one["role"] for one in request.value.post_data_json["messages"]] == ["user", "assistant", "user"]
    answers(page).nth(1).get_by_text("is there").wait_for()
    page.get_by_role("button", name="New conversation").click()
    assert answers(page).count() == 0
    page.get_by_role("heading", name="Ask about a picture").wait_for()


def test_several_pictures_and_what_is_refused(page: Page, served: Served) -> None:
    upload(page, other=png(60, 40), scene=served.picture.read_bytes())
    page.get_by_role("button", name="Remove scene.png").wait_for()
    alert = page.get_by_role("alert")
    ask(page, "And <img> now?")
    alert.get_by_text("The question has 1 <img>, and 2 pictures are given").wait_for()
    upload(page, third=png(60, 40))  # the server takes two
    alert.get_by_text("third.png: a conversation has room for 2 pictures; begin a new one").wait_for()
    say(page, ANSWER)
    ask(page, QUESTION)
    page.get_by_role("img", name="Picture 2: scene.png").wait_for()
    page.get_by_role("button", name="On picture 1").click()
    page.get_by_role("img", name="other.png with the answer's boxes").wait_for()
    page.unroute("**/v1/chat/completions")
    page.get_by_role("button", name="New conversation").click()
    upload(page, broken=b"no picture")
    alert.get_by_text("broken.png: no picture that this browser can read; take a PNG").wait_for()
    upload(page, wide=png(900, 300))
    alert.get_by_text("wide.png: 900 x 300 pixels, at most 200,000; make it smaller").wait_for()
    # What the server refuses leaves the question where it can be changed.
    ask(page, "word " * 3000)
    alert.get_by_text("the context has").get_by_text("shorten the question").wait_for()
    assert page.get_by_label("Your question").input_value().startswith("word word") and answers(page).count() == 0
    page.route("**/v1/chat/completions", lambda route: route.abort())
    ask(page, "Hello?")
    alert.get_by_text("The server does not answer; see whether megavlm serve still runs").wait_for()


def test_examples_paste_and_drop(page: Page, served: Served) -> None:
    with page.expect_request("**/v1/chat/completions") as request:
        page.get_by_role("button", name="Compare").click()
    parts = request.value.post_data_json["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["image_url", "image_url", "text"]
    answers(page).get_by_text("tokens").wait_for()
    page.get_by_role("button", name="New conversation").click()
    for event in ("paste", "drop"):
        page.evaluate(
            """async ([kind]) => {
              const data = new DataTransfer();
              const blob = await (await fetch("page/sign.png")).blob();
              data.items.add(new File([blob], `${kind}.png`, {type: "image/png"}));
              const made = {bubbles: true, cancelable: true};
              document.body.dispatchEvent(kind === "paste" ? new ClipboardEvent(kind, {...made, clipboardData: data})
                                                           : new DragEvent(kind, {...made, dataTransfer: data}));
            }""",
            [event],
        )
        page.get_by_role("button", name=f"Remove {event}.png").wait_for()
    # As the model sees it: one square view.
    page.get_by_role("button", name="paste.png").first.click()
    page.get_by_role("dialog", name="paste.png").get_by_text(
        "480 x 360 pixels; the model sees it one view at 32"
    ).wait_for()
    page.keyboard.press("Escape")
    page.get_by_role("dialog", name="paste.png").wait_for(state="hidden")


def test_the_keyboard_alone(browser: Browser, hooked: Served) -> None:
    with opened(browser, hooked) as page:
        page.keyboard.press("Tab")
        seen = []
        for _ in range(30):
            seen.append(page.evaluate("document.activeElement.ariaLabel || document.activeElement.id"))
            ring = page.evaluate("""() => { const one = document.activeElement; const shown = one.id === "question"
                ? getComputedStyle(one.parentElement).boxShadow : getComputedStyle(one).outlineStyle;
                return one === document.body || shown !== "none" }""")
            assert ring, seen[-1]
            if seen[-1] == "question":
                break
            page.keyboard.press("Tab")
        names = ["Use the dark scheme", "Settings", "Add pictures", "question"]
        assert [name for name in seen if name in names] == names
        before = health(hooked)["tokens"]
        page.keyboard.type("Where is")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("the red disc?")
        page.keyboard.press("Enter")
        page.get_by_role("article", name="You").get_by_text("Where is\nthe red disc?").wait_for()
        page.get_by_role("button", name="Stop").wait_for()
        wait_until(lambda: health(hooked)["tokens"] > before)
        page.keyboard.press("Escape")
        answers(page).get_by_text("stopped").last.wait_for()
        page.get_by_role("button", name="Send").wait_for()
        wait_until(lambda: health(hooked)["requests"] == 0)
        assert health(hooked)["tokens"] - before < 30
        assert page.evaluate("document.activeElement.id") == "question"


def test_an_answer_is_stopped_and_a_closed_page_asks_no_further(browser: Browser, hooked: Served) -> None:
    with opened(browser, hooked) as page:
        before = health(hooked)["tokens"]
        upload(page, scene=hooked.picture.read_bytes())
        page.get_by_role("button", name="Remove scene.png").wait_for()
        ask(page, QUESTION)
        answers(page).get_by_text("The").wait_for()
        page.get_by_role("button", name="Stop").click()
        answers(page).get_by_text("stopped", exact=True).wait_for()
        wait_until(lambda: health(hooked)["requests"] == 0)
        assert health(hooked)["tokens"] - before < 30  # of 34
        ask(page, QUESTION)
        wait_until(lambda: health(hooked)["requests"] == 1)
        page.get_by_role("button", name="New conversation").click()  # also while it answers
        wait_until(lambda: health(hooked)["requests"] == 0)
        ask(page, "Hello?")
        wait_until(lambda: health(hooked)["requests"] == 1)
    wait_until(lambda: health(hooked)["requests"] == 0)


def test_a_phone(browser: Browser, served: Served) -> None:
    size = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True}
    with opened(browser, served, **size) as page:
        wide = "document.documentElement.scrollWidth"
        assert page.evaluate(wide) == 360
        upload(page, scene=served.picture.read_bytes())
        page.get_by_role("button", name="Remove scene.png").wait_for()
        ask(page, f"{QUESTION} {'long' * 60}")
        answers(page).get_by_text("tokens").wait_for()
        assert page.evaluate(wide) == 360
        page.get_by_role("button", name="Settings").click()
        page.get_by_role("dialog", name="Settings").wait_for()
        assert page.evaluate(wide) == 360
        # Smaller type makes a phone zoom in where one types.
        assert page.evaluate("[...document.querySelectorAll('textarea, input[type=number]')]"
                             ".every((one) => parseFloat(getComputedStyle(one).fontSize) >= 16)")  # fmt: skip
        small = page.evaluate("""[...document.querySelectorAll('header button, form.composer button, .after button')]
            .filter((one) => one.checkVisibility()).map((one) => [one.ariaLabel || one.textContent,
            one.getBoundingClientRect().width, one.getBoundingClientRect().height])
            .filter(([, w, h]) => w < 44 || h < 44)""")
        assert small == []


def test_schemes_and_settings(browser: Browser, served: Served) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    with opened(browser, served, color_scheme="dark", viewport={"width": 1440, "height": 900}) as page:
        dark = page.evaluate(ground)
        assert page.evaluate(CONTRASTS) == []
        page.get_by_role("button", name="Use the light scheme").click()
        light = page.evaluate(ground)
        assert max(map(int, dark[4:-1].split(","))) < 60 and min(map(int, light[4:-1].split(","))) > 220
        upload(page, scene=served.picture.read_bytes())
        page.get_by_role("button", name="Remove scene.png").wait_for()
        page.get_by_label("Temperature").fill("0.7")
        page.get_by_label("Top-p").fill("0.9")
        page.get_by_label("Longest answer").fill("30")
        page.get_by_label("System message").fill("Be brief.")
        with page.expect_request("**/v1/chat/completions") as request:
            ask(page, QUESTION)
        sent = request.value.post_data_json
        assert (sent["temperature"], sent["top_p"], sent["max_completion_tokens"]) == (0.7, 0.9, 30)
        assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
        answers(page).get_by_text("tokens").wait_for()
        assert page.evaluate(CONTRASTS) == []
        page.reload()
        page.get_by_text("0.7").wait_for()
        assert page.evaluate(ground) == light and page.get_by_label("System message").input_value() == "Be brief."
        page.get_by_role("button", name="Reset").click()
        assert page.get_by_label("Temperature").input_value() == "0"
        if "SCREENSHOTS" in os.environ:
            page.screenshot(path=Path(os.environ["SCREENSHOTS"]) / "page.png")


def test_nothing_in_an_answer_or_a_name_runs(page: Page, served: Served) -> None:
    answer = (
        f"# Title {EVIL}\n\n**bold** `{EVIL}` [link](javascript:alert(1)) [real](https://example.org/a) \n\n"
        f"- one\n- two {EVIL}\n\n```html\n{EVIL}\n```\n\n| a | b |\n|---|---|\n| {EVIL} | 2 |\n\n![p](https://example.org/x.png)\n"
        f"<ref>{EVIL[:20]}</ref><box>(10,20),(500,600)</box>"
        '\n\n[{"bbox_2d": [100, 200, 300, 400], "label": "<b id=forged>cat</b>"}]'
    )
    say(page, answer)
    page.locator("input[type=file]").set_input_files(
        [{"name": f"{EVIL}.png", "mimeType": "image/png", "buffer": served.picture.read_bytes()}]
    )
    page.get_by_role("button", name=f"Remove {EVIL}.png").wait_for()
    ask(page, f"<b id=forged>bold</b>{EVIL}")
    page.locator(".stage").wait_for()
    text = answers(page)
    assert text.locator("h3").inner_text() == f"Title {EVIL}"
    assert text.locator("strong").inner_text() == "bold" and text.locator("li").nth(1).inner_text() == f"two {EVIL}"
    assert text.locator("pre").inner_text().strip() == EVIL and text.locator("td").first.inner_text() == EVIL
    assert text.locator("a").first.get_attribute("href") == "https://example.org/a"
    assert text.locator("a[href^=javascript]").count() == 0
    assert text.locator(".text :is(img, script, iframe)").count() == 0 and page.locator("#forged").count() == 0
    assert page.get_by_role("list", name="Boxes").get_by_role("button").last.inner_text() == "<b id=forged>cat</b>"
    assert "owned" not in page.title()


def test_what_is_used_has_a_name(page: Page) -> None:
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Add pictures").click()
    assert chooser.value.is_multiple()
    page.get_by_role("button", name="Settings").click()
    for control in page.locator("button, input:not([type=file]), textarea").all():
        name = control.evaluate("(one) => one.ariaLabel || one.labels?.[0]?.textContent || one.textContent")
        assert name.strip(), control.evaluate("(one) => one.outerHTML")
    page.get_by_role("button", name="Close settings").click()
    page.get_by_role("dialog", name="Settings").wait_for(state="hidden")
