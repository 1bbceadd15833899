"""The pictures of a request: data URLs, and remote ones where the server allows them."""

from __future__ import annotations

import asyncio
import base64
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Literal

from megavlm.config.errors import MachineError
from megavlm.data.fetch import FetchError, fetch
from megavlm.data.films.film import Film
from megavlm.data.films.plan import FilmError
from megavlm.data.images import ImageError, decode_with_pil, read_header
from megavlm.inference.server.errors import ApiError, bad_request, shown
from megavlm.inference.server.limits import Limits
from megavlm.inference.server.request import ImagePart
from megavlm.inference.turns import Visual

_DATA = "data:"
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_IS_BASE64 = re.compile(r"; *base64 *$", re.IGNORECASE)
_WHITE = b"\t\n\f\r "
_TO_STANDARD = bytes.maketrans(b"-_", b"+/")
_PERCENT = {b"%2B": b"+", b"%2F": b"/", b"%3D": b"=", b"%0A": b"", b"%0D": b"", b"%09": b"", b"%20": b""}
_NOT_BASE64 = re.compile(rb"[^A-Za-z0-9+/]")
_FETCHERS = ThreadPoolExecutor(8, thread_name_prefix="fetch")
"""Apart from those that decode, so that slow hosts hold up no one else."""


async def load_images(parts: Sequence[ImagePart], limits: Limits, allow_remote: bool) -> tuple[Visual, ...]:
    """Return the image files, and films, that a request's URLs stand for.

    Pictures are decoded once, so that what is broken is refused here; of films the packets are read.

    Args:
        parts: ``data:image/...;base64,...``, or http(s); of films data URLs only.
        limits: of the server; the remote ones share its bytes and its seconds.
        allow_remote: whether http(s) is fetched.

    Raises:
        ApiError: one is no picture, too large, or not allowed.
    """
    images: list[Visual] = []
    fetched = 0
    deadline = time.monotonic() + limits.seconds
    for number, part in enumerate(parts, 1):
        url = part.url.strip()
        if part.film:
            images.append(await asyncio.to_thread(_film, url, number, part.param, limits))
            continue
        if url[: len(_DATA)].lower() == _DATA:
            data = await asyncio.to_thread(_from_data_url, url, number, part.param)
        elif not _SCHEME.match(url):
            raise bad_request(
                f"image {number}: {shown(url)} is no URL; if it is base64, data:image/png;base64, is missing in front",
                part.param,
                "invalid_image",
            )
        else:
            if not allow_remote:
                raise _not_allowed(number, part.param)
            data = await _fetched(ImagePart(url, part.param), number, limits.bytes - fetched, deadline)
            fetched += len(data)
        await asyncio.to_thread(check_image, data, number, part.param, limits)
        images.append(data)
    return tuple(images)


def _not_allowed(number: int, param: str) -> ApiError:
    return bad_request(
        f"image {number}: this server takes pictures as data URLs only (data:image/png;base64,...); it was "
        "started without --allow-remote-images",
        param,
        "remote_image_refused",
    )


async def _fetched(part: ImagePart, number: int, most: int, deadline: float) -> bytes:
    """Return a remote picture of at most ``most`` bytes.

    Raises:
        ApiError: it cannot be had.
    """
    left = deadline - time.monotonic()
    fetching = asyncio.get_running_loop().run_in_executor(
        _FETCHERS, partial(fetch, part.url, max_bytes=most, timeout=max(left, 0.001))
    )
    try:
        # A name that is looked up for long has no time-out of its own, nor has the wait for a free thread.
        return await asyncio.wait_for(fetching, left + 0.5)
    except (FetchError, TimeoutError) as error:
        reason = error if isinstance(error, FetchError) else f"{shown(part.url)}: took too long"
        raise bad_request(f"image {number} was not fetched: {reason}", part.param, "remote_image_failed") from None


def _film(url: str, number: int, param: str, limits: Limits) -> Film:
    """Return the film of a data URL; no frame of it is decoded.

    Raises:
        ApiError: It is no data URL, or holds no film that can be read, or one whose frames are too large.
    """
    if url[: len(_DATA)].lower() != _DATA:
        raise bad_request(
            f"film {number}: this server takes films as data URLs only (data:video/mp4;base64,...)",
            param,
            "remote_video_refused",
        )
    data = _from_data_url(url, number, param, "film")
    try:
        index = Film(data).index()
        if index.width * index.height > limits.pixels:
            raise FilmError("too large", f"{index.width} x {index.height} pixels, at most {limits.pixels}")
    except (FilmError, MachineError) as error:
        raise bad_request(f"film {number} cannot be used: {error}", param, "invalid_video") from None
    return Film(data, index.to_bytes())


def check_image(data: bytes, number: int, param: str, limits: Limits) -> None:
    """Refuse a picture that is broken or too large.

    Raises:
        ApiError: it is.
    """
    try:
        header = read_header(data)
        if header.width * header.height > limits.pixels:
            raise ImageError("too large", f"{header.width} x {header.height} pixels, at most {limits.pixels}")
        decode_with_pil(data)
    except ImageError as error:
        raise bad_request(f"image {number} cannot be used: {error}", param, "invalid_image") from None


def _from_data_url(url: str, number: int, param: str, what: Literal["image", "film"] = "image") -> bytes:
    """Return what a data URL holds, decoded as forgivingly as browsers do (the Fetch and Infra standards).

    Its base64 may be percent-encoded, hold white space, or lack its padding; the alphabet of URLs is taken as well.

    Raises:
        ApiError: it is no base64.
    """
    kind = "image" if what == "image" else "video"
    code = f"invalid_{kind}"
    head, comma, body = url.partition(",")
    if not comma or not _IS_BASE64.search(head):
        raise bad_request(f"{what} {number}: a data URL must read data:{kind}/...;base64,...", param, code)
    digits = body.encode("utf-8", "replace")
    if b"%" in digits:  # only what base64 has besides letters and digits
        for escape, byte in _PERCENT.items():
            digits = digits.replace(escape, byte).replace(escape.lower(), byte)
    digits = digits.translate(_TO_STANDARD, _WHITE).rstrip(b"=")
    wrong = _NOT_BASE64.search(digits)
    if wrong is not None:
        why = f"a {shown(wrong[0])[1:]} where none can be"
    elif len(digits) % 4 == 1:
        why = f"{len(digits)} digits, which no data has: it is cut off"
    else:
        return base64.b64decode(digits + b"=" * (-len(digits) % 4))
    raise bad_request(f"{what} {number}: the base64 of the data URL has {why}", param, code)
