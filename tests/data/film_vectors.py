"""Makes ``film_vectors.json``: what the published processors make of films. Needs torchvision, which tests have not.

    pip install --no-deps --target DIR torchvision==0.28.0
    PYTHONPATH=DIR python tests/data/film_vectors.py

with torch 2.13 and Transformers 5.23 there. The frames are those of the classes' own ``sample_frames`` and ``resize``
(on tensors without storage), the texts those of ``replace_video_token``, the pixels those of ``preprocess``.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import json
import random
import sys
import types
import zlib
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent / "film_vectors.json"
FILMS = 50
SLOT = "\N{BLACK SQUARE}"
"""Stands for a slot in the texts that are compared."""

CASES: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"kind": "qwen2_vl", "asked": {"fps": 2}},
    "qwen2_vl_published": {"kind": "qwen2_vl", "asked": {"fps": 2}, "size": (3136, 12845056)},
    "qwen2_vl_capped": {
        "kind": "qwen2_vl", "asked": {"fps": 5}, "made": {"cap_pixels_per_frame": True, "max_video_tokens": 4000},
        "video": {"total_pixels": int(4000 * 28 * 28 * 0.9)},
    },
    "qwen2_vl_frames": {"kind": "qwen2_vl", "asked": {"num_frames": 15}},
    "llava_onevision1_5": {"kind": "qwen2_vl", "asked": {"fps": 1}, "made": {"temporal_patch_size": 1}, "temporal": 1},
    "qwen3_vl": {"kind": "qwen3_vl", "asked": {}},
    "qwen3_vl_published": {"kind": "qwen3_vl", "asked": {"fps": 3}, "size": (4096, 25165824)},
    "qwen3_vl_capped": {
        "kind": "qwen3_vl", "asked": {}, "size": (4096, 2516582), "made": {"cap_pixels_per_frame": True},
        "video": {"max_pixels": 768 * 32 * 32},
    },
    "glm4v": {"kind": "glm4v", "asked": {}},
    "glm4v_short": {
        "kind": "glm4v", "asked": {"fps": 3}, "size": (12544, 600000), "made": {"max_duration": 9},
        "video": {"max_seconds": 9},
    },
    "llava_onevision": {"kind": "llava_onevision", "asked": {"num_frames": 32}},
    "llava_onevision_fps": {"kind": "llava_onevision", "asked": {"fps": 1}},
    "internvl": {"kind": "internvl", "asked": {"num_frames": 8}, "made": {"size": {"height": 448, "width": 448}}},
    "internvl_fps": {"kind": "internvl", "asked": {"fps": 2}, "made": {"size": {"height": 448, "width": 448}}},
}  # fmt: skip
"""``asked`` of both; ``made`` of the processor alone, ``video`` of ``model.video`` alone; ``size`` of both."""
CLASSES = {
    "qwen2_vl": ("qwen2_vl", "Qwen2VLVideoProcessor", "Qwen2VLProcessor"),
    "qwen3_vl": ("qwen3_vl", "Qwen3VLVideoProcessor", "Qwen3VLProcessor"),
    "glm4v": ("glm4v", "Glm4vVideoProcessor", "Glm4vProcessor"),
    "llava_onevision": ("llava_onevision", "LlavaOnevisionVideoProcessor", "LlavaOnevisionProcessor"),
    "internvl": ("internvl", "InternVLVideoProcessor", "InternVLProcessor"),
}
RATES = (1.0, 10.0, 12.5, 15.0, 23.976, 24.0, 25.0, 30000 / 1001, 30.0, 50.0, 60.0)


def films(name: str) -> list[tuple[int, int, int, float]]:
    """Return width, height, frames and rate of random films."""
    draw, found = random.Random(name), []
    for _ in range(FILMS):
        rate = draw.choice(RATES) if draw.random() < 0.7 else draw.uniform(1, 60)
        sides = [round(10 ** draw.uniform(1, 3.3)) for _ in range(2)]
        if max(sides) > 8 * min(sides):
            sides[0] = sides[1] * 2
        found.append((*sides, draw.randint(1, 400), rate))
    return found


def pixels(name: str) -> np.ndarray:
    """Return [T, H, W, 3] of a small film, uint8."""
    rng = np.random.default_rng(len(name))
    frames, height, width = 5, 22, 37
    waves = rng.uniform(0.05, 0.5, (3, 3))
    t, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    return np.stack([127 + 120 * np.sin(a * t * 5 + b * y + c * x) for a, b, c in waves], -1).round().astype(np.uint8)


def processors(case: dict[str, Any]) -> tuple[Any, Any]:
    """Return the class's video processor, and its processor's class."""
    folder, video, both = CLASSES[case["kind"]]
    made = importlib.import_module(f"transformers.models.{folder}.video_processing_{folder}")
    text = importlib.import_module(f"transformers.models.{folder}.processing_{folder}")
    size = {"size": dict(zip(("shortest_edge", "longest_edge"), case["size"], strict=True))} if "size" in case else {}
    return getattr(made, video)(**size, **case.get("made", {})), getattr(text, both)


def of_film(case: dict[str, Any], film: tuple[int, int, int, float]) -> dict[str, Any] | None:
    """Return frames, size, text and seconds of a film; None where the processor refuses it."""
    import torch
    from transformers.video_utils import VideoMetadata

    width, height, frames, rate = film
    video, processor = processors(case)
    metadata = VideoMetadata(total_num_frames=frames, fps=rate, duration=frames / rate, width=width, height=height)
    try:
        indices = [int(one) for one in video.sample_frames(metadata, **case["asked"])]
        if max(indices) >= frames:
            return None
        size, temporal = video.size, getattr(video, "temporal_patch_size", 1)
        block = getattr(video, "patch_size", 1) * getattr(video, "merge_size", 1)
        pixels = torch.empty((1, len(indices), 3, height, width), dtype=torch.uint8, device="meta")
        size_dict = video._standardize_kwargs(size=size)["size"]
        more = {"factor": block, "temporal_factor": temporal} if block > 1 else {}
        if getattr(video, "cap_pixels_per_frame", None) is not None:
            more["cap_pixels_per_frame"] = video.cap_pixels_per_frame
        tall, wide = video.resize(pixels, size=size_dict, resample=video.resample, **more).shape[-2:]
    except (ValueError, ZeroDivisionError, RuntimeError) as error:
        print(f"{film}: {error}", file=sys.stderr)
        return None
    found: dict[str, Any] = {"frames": len(indices), "indices": digest(str(indices)), "size": [wide, tall]}
    steps = -(-len(indices) // temporal)
    metadata.frames_indices = list(indices)
    this = types.SimpleNamespace(
        video_processor=video, video_token=SLOT, image_token=SLOT, vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>", num_image_tokens=729, image_seq_length=256, start_image_token="<img>",
        end_image_token="</img>",
    )  # fmt: skip
    for name in ("_calculate_timestamps", "replace_frame_token_id"):
        if hasattr(processor, name):
            setattr(this, name, getattr(processor, name).__get__(this))
    patch = getattr(video, "patch_size", 1)
    given = {
        "video_grid_thw": torch.tensor([[steps, tall // patch, wide // patch]]), "video_metadata": [metadata],
        "pixel_values_videos": [pixels[0]],
    }  # fmt: skip
    text = processor.replace_video_token(this, given, 0)
    found |= {"tokens": text.count(SLOT), "text": digest(text)}
    if case["kind"] == "qwen2_vl":
        metadata.frames_indices = indices
        found["seconds"] = temporal / metadata.sampled_fps
    return found


def digest(text: str) -> str:
    """Return what tells a text from another one."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def packed(values: np.ndarray) -> str:
    """Return numbers of uint8 as text."""
    return base64.b64encode(zlib.compress(values.astype(np.uint8).tobytes(), 9)).decode()


def unpacked(text: str, shape: list[int]) -> np.ndarray:
    """Return what :func:`packed` made of an array of this shape."""
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8).reshape(shape)


def of_pixels(kind: str) -> dict[str, Any]:
    """Return what a processor makes of a small film's pixels, its frames all shown, neither scaled nor normalised."""
    import torch

    own: dict[str, Any] = {"size": {"height": 14, "width": 14}}
    if kind in ("qwen2_vl", "qwen3_vl", "glm4v"):
        least, most = (64, 1024) if kind == "qwen2_vl" else (64, 4096)
        own = {"size": {"shortest_edge": least, "longest_edge": most}, "patch_size": 4, "merge_size": 2}
    video, _ = processors({"kind": kind, "made": own})
    film = torch.from_numpy(pixels(kind)).permute(0, 3, 1, 2)
    made = video.preprocess(
        [film], do_rescale=False, do_normalize=False, do_sample_frames=False, return_tensors="pt"
    )["pixel_values_videos"]  # fmt: skip
    values = made.reshape(-1, made.shape[-1]).numpy() if kind in ("qwen2_vl", "qwen3_vl", "glm4v") else made[0].numpy()
    assert np.array_equal(values, values.round()), "pixels are whole numbers where they are not scaled"
    return {"shape": list(values.shape), "values": packed(values)}


def main() -> None:
    """Write the file."""
    # The wheel's own operators are for another build of torch; none of them is used here.
    sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")
    found = {
        "films": {name: [of_film(case, film) for film in films(name)] for name, case in CASES.items()},
        "pixels": {kind: of_pixels(kind) for kind in CLASSES},
    }
    HERE.write_text(json.dumps(found, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
