"""Remote pictures through the API: what is fetched, and what is refused with a reason; ``hooked.py`` has the names."""

from __future__ import annotations

import time
from typing import Any

import openai
import pytest
from serving import Served
from test_api import post_json


def asking_for(*urls: str) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {
        "model": "tiny",
        "max_tokens": 1,
        "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "What is this?"}]}],
    }


@pytest.mark.parametrize("path", ["/a.png", "/moved"])
def test_a_public_picture_is_seen(path: str, hooked: Served) -> None:
    client = openai.OpenAI(base_url=f"{hooked.url}/v1", api_key="none", max_retries=0, timeout=600)
    said = client.chat.completions.create(**asking_for(f"http://pictures.example{path}"))
    alone = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "What is this?"}], max_tokens=1
    )
    assert said.usage and alone.usage and said.usage.prompt_tokens > alone.usage.prompt_tokens + 4


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://127.0.0.1:80/a.png", "an address that is not public"),
        ("http://localhost/a.png", "an address that is not public"),
        ("http://[::1]/a.png", "an address that is not public"),
        ("http://[::ffff:127.0.0.1]/a.png", "an address that is not public"),
        ("http://2130706433/a.png", "an address that is not public"),
        ("http://private.example/a.png", "an address that is not public"),
        ("http://metadata.example/latest", "an address that is not public"),
        ("http://loopback.example/a.png", "an address that is not public"),
        ("http://mapped.example/a.png", "an address that is not public"),
        ("http://both.example/a.png", "an address that is not public"),
        ("http://pictures.example/to-loopback", "loopback.example has an address that is not public"),
        ("http://pictures.example/to-address", "169.254.169.254 has an address that is not public"),
        ("http://rebinding.example/to-itself", "rebinding.example has an address that is not public"),
        ("http://pictures.example/to-file", "only http and https"),
        ("file:///etc/passwd", "only http and https"),
        ("ftp://pictures.example/a.png", "only http and https"),
        ("http://me:word@pictures.example/a.png", "has a user name"),
        ("http://pictures.example/absent", "answered 404"),
        ("http://pictures.example/big", "more than 1,048,576 bytes"),
        ("http://pictures.example/slow", "took too long"),
        ("http://slow.example/a.png", "took too long"),
    ],
)  # fmt: skip
def test_what_is_not_fetched(url: str, reason: str, hooked: Served) -> None:
    began = time.monotonic()
    status, said, _ = post_json(hooked, asking_for(url))
    error = said["error"]
    assert status == 400 and error["code"] == "remote_image_failed" and reason in error["message"], said
    assert error["param"] == "messages.0.content.0.image_url" and "image 1 was not fetched" in error["message"]
    assert time.monotonic() - began < 25  # slow ones take 30 s
    assert "was tried" not in hooked.log.read_text()


def test_what_is_fetched_must_be_a_picture(hooked: Served) -> None:
    status, said, _ = post_json(hooked, asking_for("http://pictures.example/a.png", "http://pictures.example/text"))
    assert status == 400 and "image 2 cannot be used: not an image" in said["error"]["message"]


def test_pictures_of_a_request_share_its_bound(hooked: Served) -> None:
    assert post_json(hooked, asking_for("http://pictures.example/padded"))[0] == 200
    status, said, _ = post_json(hooked, asking_for(*["http://pictures.example/padded"] * 2))
    assert (
        status == 400 and "image 2 was not fetched" in said["error"]["message"] and "bytes" in said["error"]["message"]
    )
