"""Whatever modes a picture may have become 8-bit RGB as a person sees it: over white, and with its own white point."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Alpha = Literal["white", "drop"]
"""What becomes of transparency, see ``data.image_alpha``."""

_WITH_ALPHA = frozenset({"RGBA", "RGBa", "LA", "La", "PA"})
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
_SIGNED = 2
_WHITE_IS_ZERO = 0
_RANGES = (1.0, 255.0, 65535.0)
"""White of numbers that do not say how many bits they had: shares, 8 bits, 16 bits."""


def to_rgb(image: Image.Image, alpha: Alpha = "white") -> Image.Image:
    """Return a loaded image in 8-bit RGB.

    Args:
        image: Of any mode.
        alpha: ``white`` shows what is transparent over white; ``drop`` shows the colours that lie under it, as
            ``convert("RGB")`` does.

    Raises:
        UserError: PIL has no conversion from its mode.
    """
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image)
    if image.mode not in _WITH_ALPHA and "transparency" not in image.info:
        return image if image.mode == "RGB" else image.convert("RGB")
    if alpha == "drop":
        return _without_alpha(image)
    return _on_white(image)


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode != "RGBA":
        _fit_transparent_colour(image)
        image = image.convert("RGBA")
    canvas = Image.new("RGB", image.size, (255, 255, 255))
    canvas.paste(image, mask=image.getchannel("A"))
    return canvas


def _without_alpha(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    image.info.pop("transparency", None)  # PIL would keep it, and warn
    return image.convert("RGB")


def _fit_transparent_colour(image: Image.Image) -> None:
    """A PNG of 16 bits names its transparent colour in 16 bits; PIL keeps the upper 8 of its pixels."""
    colour = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(colour, tuple) and max(colour) > 255:
        image.info["transparency"] = tuple(value >> 8 for value in colour)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Gray of 16 or 32 bits, or of floating point, as ``L``, or ``LA`` where one of its values is transparent."""
    values = np.asarray(image)
    white = _white(image)
    if white is None:
        scaled = _stretched(values)
    else:
        scaled = ((values.clip(0, white).astype(np.uint32) * 255 + white // 2) // white).astype(np.uint8)
    if _tag(image, _PHOTOMETRIC) == _WHITE_IS_ZERO:  # PIL turns these round where they have 8 bits
        scaled = 255 - scaled
    gray = Image.fromarray(scaled)
    transparent = image.info.get("transparency")
    if not isinstance(transparent, int):
        return gray
    return Image.merge("LA", (gray, Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))))


def _white(image: Image.Image) -> int | None:
    """The value of white by the file's own bits; None where it has none that say so."""
    bits = _tag(image, _BITS_PER_SAMPLE)
    if image.mode.startswith("I;16"):
        return 2**bits - 1 if bits is not None and 8 < bits < 16 else 65535
    if image.mode == "I" and image.format in ("PNG", "PPM"):  # PIL stretches those of PPM to 16 bits
        return 65535
    if image.mode == "I" and bits == 16:
        return 32767 if _tag(image, _SAMPLE_FORMAT) == _SIGNED else 65535
    return None


def _stretched(values: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Numbers without a white of their own: the smallest usual range that holds them; else from least to most."""
    found = np.nan_to_num(values.astype(np.float32), copy=False, nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(found.min(initial=0.0)), float(found.max(initial=0.0))
    if low >= 0:
        low, high = 0.0, next((white for white in _RANGES if high <= white), high)
    found -= low
    found *= 255.0 / (high - low)
    return found.round(out=found).clip(0, 255).astype(np.uint8)


def _tag(image: Image.Image, tag: int) -> int | None:
    """The first value of a tag of a TIFF file; None of others."""
    tags = getattr(image, "tag_v2", None)
    value = None if tags is None else tags.get(tag)
    value = value[0] if isinstance(value, tuple) and value else value
    return value if isinstance(value, int) else None
