"""The pictures of a request: data URLs, and remote ones where the server allows them."""

from __future__ import annotations

import asyncio
import base64
import binascii
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from megavlm.data.fetch import FetchError, fetch
from megavlm.data.images import ImageError, decode_with_pil, read_header
from megavlm.inference.server.errors import ApiError, bad_request
from megavlm.inference.server.limits import Limits
from megavlm.inference.server.request import ImagePart

_DATA = "data:"
_FETCHERS = ThreadPoolExecutor(8, thread_name_prefix="fetch")
"""Apart from those that decode, so that slow hosts hold up no one else."""


async def load_images(parts: Sequence[ImagePart], limits: Limits, allow_remote: bool) -> tuple[bytes, ...]:
    """Return the image files that a request's URLs stand for; decoded once, so that what is broken is refused here.

    Args:
        parts: ``data:image/...;base64,...``, or http(s).
        limits: of the server; the remote ones share its bytes and its seconds.
        allow_remote: whether http(s) is fetched.

    Raises:
        ApiError: one is no picture, too large, or not allowed.
    """
    images: list[bytes] = []
    fetched = 0
    deadline = time.monotonic() + limits.seconds
    for number, part in enumerate(parts, 1):
        if part.url[: len(_DATA)].lower() == _DATA:
            data = _from_data_url(part.url, number, part.param)
        else:
            if not allow_remote:
                raise _not_allowed(number, part.param)
            data = await _fetched(part, number, limits.bytes - fetched, deadline)
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
        reason = error if isinstance(error, FetchError) else f"{part.url}: took too long"
        raise bad_request(f"image {number} was not fetched: {reason}", part.param, "remote_image_failed") from None


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


def _from_data_url(url: str, number: int, param: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise bad_request(f"image {number}: a data URL must read data:image/...;base64,...", param, "invalid_image")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise bad_request(f"image {number}: the data URL holds no base64", param, "invalid_image") from None
