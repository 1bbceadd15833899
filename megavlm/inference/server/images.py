"""The pictures of a request: data URLs, and remote ones where the server allows them."""

from __future__ import annotations

import asyncio
import base64
import binascii

from megavlm.data.fetch import FetchError, fetch
from megavlm.data.images import ImageError, decode_with_pil, read_header
from megavlm.inference.server.errors import bad_request
from megavlm.inference.server.limits import Limits

_DATA = "data:"


async def load_image(url: str, number: int, param: str, limits: Limits, allow_remote: bool) -> bytes:
    """Return the image file that a URL stands for; decoded once, so that what is broken is refused here.

    Args:
        url: ``data:image/...;base64,...``, or http(s).
        number: which of the request's pictures it is, from 1, for messages.
        param: its field.
        limits: of the server.
        allow_remote: whether http(s) is fetched.

    Raises:
        ApiError: it is no picture, too large, or not allowed.
    """
    if url[: len(_DATA)].lower() == _DATA:
        data = _from_data_url(url, number, param)
    elif not allow_remote:
        raise bad_request(
            f"image {number}: this server takes pictures as data URLs only (data:image/png;base64,...); it was "
            "started without --allow-remote-images",
            param,
            "remote_image_refused",
        )
    else:
        try:
            data = await asyncio.to_thread(fetch, url, max_bytes=limits.bytes, timeout=limits.seconds)
        except FetchError as error:
            raise bad_request(f"image {number} was not fetched: {error}", param, "remote_image_failed") from None
    await asyncio.to_thread(check_image, data, number, param, limits)
    return data


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
