"""The choice of an image decoder by its name in a recipe."""

from __future__ import annotations

from megavlm.config.errors import UserError
from megavlm.data import decode
from megavlm.data.decode import ImageDecoder, PilDecoder, SimpleJpegDecoder
from megavlm.data.image_colours import Alpha
from megavlm.parallel.device import current_gpu


def make_decoder(name: str = "auto", *, alpha: Alpha = "white", num_threads: int = 2) -> ImageDecoder:
    """Make a decoder.

    Args:
        name: ``dali``, ``simplejpeg``, ``pil``, or ``auto``: DALI where a GPU and DALI are, else simplejpeg, else PIL.
        alpha: What becomes of transparency, see ``data.image_alpha``.
        num_threads: CPU threads of DALI.

    Raises:
        ImportError: The decoder's library is not installed; the message says how to install it.
        UserError: There is no such decoder.
    """
    gpu = current_gpu()
    if name == "auto":
        if gpu is not None and decode.installed("nvidia.dali"):
            name = "dali"
        else:
            name = "simplejpeg" if decode.installed("simplejpeg") else "pil"
    if name == "pil":
        return PilDecoder(alpha)
    if name == "simplejpeg":
        return SimpleJpegDecoder(alpha)
    if name == "dali":
        decode.require("dali", "nvidia.dali")
        from megavlm.data.decode_dali import DaliDecoder  # noqa: PLC0415 - optional

        return DaliDecoder(gpu, num_threads, alpha)
    raise UserError(f"data.image_decoder must be auto, dali, simplejpeg or pil, not {name!r}")
