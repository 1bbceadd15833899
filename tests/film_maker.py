"""Films for tests, made with PyAV itself: a few small frames each."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np
from tiny import tiny_recipe

from megavlm.config.schema import Recipe

_STD = {"init_method_std": 0.1}


def film_recipe(image: dict[str, Any] | None = None, language: dict[str, Any] | None = None, **video: Any) -> Recipe:
    """Return a small model of Qwen2.5-VL's kind; ``video`` updates the keys of films, the others their branches."""
    tower = {
        "preset": "qwen2_5_vl_vit", "patch_size": 4, "window_size": 24, "full_attention_layers": [1], "hidden_size": 48,
        "num_layers": 2, "num_attention_heads": 4, "ffn_hidden_size": 64, "image_size": 32, **_STD,
    }  # fmt: skip
    text = {
        "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "num_query_groups": 4, "kv_channels": 16,
        "rotary_sections": [2, 3, 3], **_STD,
    }  # fmt: skip
    frames = {"kind": "qwen2_vl", "min_pixels": 64, "max_pixels": 512, "max_frames": 6, "tokens_per_second": 2.0}
    return tiny_recipe(
        model={
            "preset": "tiny",
            "vision": tower,
            "connector": {"preset": "patch_merger", "normalization": "RMSNorm", **_STD},
            "language": text | (language or {}),
            "image": {"kind": "native", "min_pixels": 64, "max_pixels": 1024} | (image or {}),
            "video": frames | video,
        }
    )


def frame(index: int, width: int = 64, height: int = 48) -> np.ndarray:
    """[H, W, 3]: the upper left quarter is white, the rest gets lighter from frame to frame."""
    pixels = np.full((height, width, 3), 20 + index * 3 % 200, np.uint8)
    pixels[: height // 2, : width // 2] = 255
    return pixels


def film(
    frames: int = 12,
    kind: str = "mp4",
    codec: str = "libx264",
    *,
    size: tuple[int, int] = (64, 48),
    rate: int = 10,
    pixels: str = "yuv420p",
    turn: int = 0,
    times: Sequence[int] | None = None,
    sound: bool = False,
    every_key: int = 5,
) -> bytes:
    """Return a film.

    Args:
        frames: how many; none for sound alone.
        kind: the container.
        codec: how pictures are written.
        size: width and height.
        rate: frames in a second.
        pixels: FFmpeg's name of the pixels.
        turn: degrees by which players turn it, counter-clockwise.
        times: of each frame in milliseconds, for a rate that varies.
        sound: whether there is a track of sound.
        every_key: frames from one key frame to the next.
    """
    file = io.BytesIO()
    with av.open(file, "w", format=kind) as container:
        if frames:
            stream = container.add_stream(codec, rate=rate, options={"g": str(every_key)})
            stream.width, stream.height, stream.pix_fmt = *size, pixels
            stream.codec_context.thread_count = 1  # a forked process that collects it would wait for its threads
            if times is not None:
                stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
            if turn:
                stream.set_display_rotation(turn)
        if sound:
            track = container.add_stream("aac", rate=8000)
            noise = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            noise.sample_rate = 8000
            container.mux(track.encode(noise))
            container.mux(track.encode(None))
        for index in range(frames):
            shown = av.VideoFrame.from_ndarray(frame(index, *size), format="rgb24")
            shown.pts = index if times is None else times[index]
            shown.time_base = Fraction(1, rate) if times is None else Fraction(1, 1000)
            container.mux(stream.encode(shown))
        if frames:
            container.mux(stream.encode(None))
    return file.getvalue()


def decoded(data: bytes) -> list[np.ndarray]:
    """Return all frames of a film, [H, W, 3], as PyAV's own loop gives them."""
    with av.open(io.BytesIO(data)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        return [one.to_ndarray(format="rgb24") for one in container.decode(video=0)]
