"""What happens to pixels: Transformers' ``preprocessor_config.json`` (or ``processor_config.json``), in and out.

Pictures are squashed to a square here (``megavlm.data.decode``), bicubic with antialiasing, made numbers from 0 to 1,
and normalised with mean and standard deviation of ``model.vision``, which come from this file where there is one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megavlm.config.errors import UserError
from megavlm.config.schema import VisionConfig
from megavlm.families.towers import CLIP_MEAN, CLIP_STD
from megavlm.weights.files import read_json
from megavlm.weights.source import Source

Tree = dict[str, Any]

PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
_BICUBIC = 3  # PIL's number
_KINDS = {True: "CLIPImageProcessor", False: "SiglipImageProcessor"}


def normalisation(source: Source, image_size: int) -> Tree:
    """Return mean and standard deviation that a checkpoint's own file says; empty where there is no file.

    Args:
        source: the checkpoint.
        image_size: of its tower, by config.json.

    Raises:
        UserError: two files disagree, a value is none, or pixels are treated in a way that is not done here.
    """
    found: Tree = {}
    for name in (PREPROCESSOR, PROCESSOR):
        path = source.directory / name
        tree = read_json(path) if path.is_file() else {}
        tree = tree.get("image_processor", {}) if name == PROCESSOR else tree
        if not isinstance(tree, Mapping):
            raise UserError(f"{path}: image_processor is no object; restore the file")
        one = _numbers(tree, str(path))
        for key, value in one.items():
            if found.get(key, value) != value:
                raise UserError(
                    f"{path}: {key} is {list(value)}, but {source.directory / PREPROCESSOR} says {list(found[key])}; "
                    "correct one"
                )
        found |= one
        size = _final_size(tree)
        if size is not None and size != (image_size, image_size):
            raise UserError(
                f"{path}: makes pictures of {size[0]} x {size[1]}, but config.json's tower is for {image_size} x "
                f"{image_size}; correct one"
            )
    return found


def _numbers(tree: Mapping[str, Any], where: str) -> Tree:
    """Return ``image_mean`` and ``image_std`` of one file, as far as they are there."""
    scale = tree.get("rescale_factor", 1 / 255)
    if (
        tree.get("do_rescale") is False
        or not isinstance(scale, int | float)
        or not math.isclose(scale * 255, 1, rel_tol=1e-3)
    ):
        raise UserError(
            f"{where}: pixels must be divided by 255 (do_rescale, rescale_factor); others are not supported"
        )
    if tree.get("do_normalize") is False:
        return {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    numbers: Tree = {}
    for key in ("image_mean", "image_std"):
        value = tree.get(key, _of_kind(tree, key))
        if value is None:
            continue
        value = [value] * 3 if isinstance(value, int | float) else value
        good = isinstance(value, list) and len(value) == 3 and all(_number(one) for one in value)
        if not good or (key == "image_std" and min(value) <= 0):
            raise UserError(f"{where}: {key} is {str(value)[:60]}; it must be three numbers, one per colour")
        numbers[key] = [float(one) for one in value]
    return numbers


def _of_kind(tree: Mapping[str, Any], key: str) -> list[float] | None:
    """Return what Transformers' class takes where the file says nothing."""
    kind = str(tree.get("image_processor_type", ""))
    if kind.startswith(("CLIP", "Llava")):
        return CLIP_MEAN if key == "image_mean" else CLIP_STD
    return [0.5] * 3 if kind.startswith(("Siglip", "ViT")) else None


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _final_size(tree: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return height and width of what the file makes; None where it does not say."""
    cropped = tree.get("do_center_crop", "crop_size" in tree)
    size = tree.get("crop_size") if cropped else tree.get("size")
    if isinstance(size, int):
        return (size, size) if cropped else None
    if isinstance(size, Mapping) and isinstance(size.get("height"), int) and isinstance(size.get("width"), int):
        return size["height"], size["width"]
    return None


def geometry(source: Source) -> str | None:
    """Return how a checkpoint's own file brings pictures to a square, if otherwise than here."""
    path = source.directory / PREPROCESSOR
    tree = read_json(path) if path.is_file() else {}
    if tree.get("do_pad"):
        return f"{path} pads pictures to a square; here they are squashed to one"
    if tree.get("do_center_crop"):
        return f"{path} cuts a square out of pictures; here they are squashed to one"
    return None


def trained_preprocessor(vision: VisionConfig, old: Mapping[str, Any]) -> Tree:
    """Return the file for pictures as they are trained here; other keys stay as they were."""
    side = {"height": vision.image_size, "width": vision.image_size}
    kept = {
        key: value
        for key, value in old.items()
        if key not in ("do_pad", "image_grid_pinpoints", "aspect_ratio_setting")
    }
    return {
        "image_processor_type": _KINDS[vision.class_token],
        **kept,
        "crop_size": side,
        "do_center_crop": False,
        "do_convert_rgb": True,
        "do_normalize": True,
        **({"do_pad": False} if "do_pad" in old else {}),
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(vision.image_mean),
        "image_std": list(vision.image_std),
        "resample": _BICUBIC,
        "rescale_factor": 1 / 255,
        "size": side,
    }
