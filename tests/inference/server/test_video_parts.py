"""Films of a request: data URLs and no others, and their places in the text."""

from __future__ import annotations

import asyncio
import base64
import io
from pathlib import Path
from typing import Any

import pytest
from data_helpers import encode_image, smooth_image

from megavlm.data.films.container import write_frames
from megavlm.data.films.film import Film
from megavlm.data.schema import FILM_PLACEHOLDER, IMAGE_PLACEHOLDER
from megavlm.inference.server.errors import ApiError
from megavlm.inference.server.images import load_images
from megavlm.inference.server.limits import Limits
from megavlm.inference.server.request import ImagePart, _content
from megavlm.inference.turns import in_their_order, read_film, user_turn


def frames() -> bytes:
    out = io.BytesIO()
    write_frames([encode_image(smooth_image(number, 40, 30)) for number in range(3)], 2.0, out)
    return out.getvalue()


def load(url: str) -> Any:
    return asyncio.run(load_images([ImagePart(url, "messages.0", film=True)], Limits(), allow_remote=True))


def test_a_film_in_a_request() -> None:
    url = "data:video/mp4;base64," + base64.b64encode(frames()).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,aaaa"}},
        {"type": "video_url", "video_url": {"url": url}},
        {"type": "text", "text": "What is it?"},
    ]
    text, found = _content(parts, "messages.0.content", "user")
    assert text == f"Picture 1: {IMAGE_PLACEHOLDER}\n{FILM_PLACEHOLDER}What is it?"
    assert [one.film for one in found] == [False, True]
    (film,) = load(url)
    assert isinstance(film, Film) and film.shape()[:3] == (40, 30, 3)
    assert film.stored is not None  # it is not looked through again for each thing that is asked of it


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("file:///etc/hostname", "remote_video_refused"),
        ("/etc/hostname", "remote_video_refused"),
        ("https://example.com/film.mp4", "remote_video_refused"),
        ("data:video/mp4;base64,AAAA", "invalid_video"),
        ("data:video/mp4;base64,", "invalid_video"),
    ],
)
def test_what_is_no_film(url: str, code: str) -> None:
    with pytest.raises(ApiError) as raised:
        load(url)
    assert raised.value.status == 400 and raised.value.code == code


def test_a_film_is_judged_in_its_own_words() -> None:
    url = "data:video/mp4;base64," + base64.b64encode(frames()).decode()
    for broken, code in ((url[:-3] + "!", "invalid_video"), ("data:video/mp4,AAAA", "invalid_video")):
        with pytest.raises(ApiError, match="film 1: ") as caught:
            load(broken)
        assert caught.value.body["error"]["code"] == code
    with pytest.raises(ApiError, match="40 x 30 pixels, at most 1000"):
        asyncio.run(load_images([ImagePart(url, "messages.0", film=True)], Limits(pixels=1000), allow_remote=False))


def test_the_mark_of_a_film_in_a_text() -> None:
    with pytest.raises(ApiError, match="send a film as a video_url part"):
        _content([{"type": "text", "text": FILM_PLACEHOLDER[:3]}, {"type": "text", "text": "lm"}], "messages.0", "user")
    assert _content(f"an {FILM_PLACEHOLDER}answer", "messages.1", "assistant") == ("an answer", [])


def test_films_of_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "film").mkdir()
    for number in range(3):
        (tmp_path / "film" / f"{number}.png").write_bytes(encode_image(smooth_image(number, 40, 30)))
    film = read_film(tmp_path / "film")
    assert film.shape().sampled
    turn = user_turn("first <video> then <img> and <video>", 1, 2)
    assert in_their_order([turn], [b"x"], [film, film]) == (film, b"x", film)
    assert user_turn("why?", 1, 1).text == f"Picture 1: {IMAGE_PLACEHOLDER}\n{FILM_PLACEHOLDER}why?"
    assert user_turn("the <video> tag", 0).text == "the <video> tag"
