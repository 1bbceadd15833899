"""What happens to pixels: Transformers' ``preprocessor_config.json`` (or ``processor_config.json``), in and out.

It says which image plan a checkpoint was trained with (``model.image``: squash, pad, crop or tiles, and the filter),
and mean and standard deviation of ``model.vision``. What is written here is the file of squares; that of tiles, or of
pictures of any size, is a family's own (``Family.trained_pictures``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megavlm.config.errors import UserError
from megavlm.config.json_object import read_json
from megavlm.config.schema import ModelConfig, VisionConfig
from megavlm.families.towers import CLIP_MEAN, CLIP_STD
from megavlm.weights.source import CONFIG, Source

Tree = dict[str, Any]

PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
_FILTERS = {"lanczos": 1, "bilinear": 2, "bicubic": 3}
"""PIL's numbers."""
_PLAN_KEYS = ("do_pad", "image_grid_pinpoints", "aspect_ratio_setting", "crop_to_patches", "min_patches", "max_patches")
_SWITCHES = ("do_resize", "do_rescale", "do_normalize", "do_center_crop", "do_pad", "crop_to_patches")
GEOMETRY = (*_SWITCHES, "image_processor_type", "size", "crop_size", "resample", "image_grid_pinpoints")
_TILING = ("LlavaNext", "LlavaOnevision", "GotOcr2", "DeepseekVL", "VLM", "Idefics3", "SmolVLM")
_KINDS = {True: "CLIPImageProcessor", False: "SiglipImageProcessor"}


def normalisation(source: Source, image_size: int | None) -> Tree:
    """Return mean and standard deviation that a checkpoint's own file says; empty where there is no file.

    Args:
        source: the checkpoint.
        image_size: of its tower, by config.json; None where pictures keep sizes of their own.

    Raises:
        UserError: two files disagree, a value is none, or pixels are treated in a way that is not done here.
    """
    found: Tree = {}
    for path, tree in processor_files(source, areas=image_size is None):
        one = _numbers(tree, str(path))
        for key, value in one.items():
            if found.get(key, value) != value:
                raise UserError(
                    f"{path}: {key} is {list(value)}, but {source.directory / PREPROCESSOR} says {list(found[key])}; "
                    "correct one"
                )
        found |= one
        size = None if image_size is None else _final_size(tree)
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
    if kind.startswith(("CLIP", "Llava", "GotOcr2", "DeepseekVL", "VLM")):
        return CLIP_MEAN if key == "image_mean" else CLIP_STD
    return [0.5] * 3 if kind.startswith(("Siglip", "ViT", "Idefics3", "SmolVLM", "Mllama")) else None


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _final_size(tree: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return height and width of what the file makes; None where it does not say."""
    cropped = tree.get("do_center_crop", "crop_size" in tree)
    size = tree.get("crop_size" if cropped else "size") or {}
    return (size["height"], size["width"]) if "height" in size else None


def image_branch(source: Source, image_size: int, *, clip: bool, tiles: bool = False) -> Tree:
    """Return ``model.image`` as a checkpoint's own files say it; empty where there are none.

    LLaVA's original layout says it in config.json (``image_aspect_ratio``), Transformers in the processor's file.

    Args:
        source: the checkpoint.
        image_size: of its tower.
        clip: whether its tower is CLIP's, whose processor cuts a square out where its file does not say otherwise.
        tiles: whether its processor cuts pictures to InternVL's tiles, whatever the image processor's file says.

    Raises:
        UserError: pictures are treated in a way that is not done here.
    """
    found = [(path, tree) for path, tree in processor_files(source) if tree]
    aspect = source.config.get("image_aspect_ratio")
    if not found and aspect is None:
        return {}
    path, tree = found[0] if found else (source.directory / PREPROCESSOR, {})
    if isinstance(aspect, str) and aspect != "square":
        return {"resample": resampling(tree, str(path)), **_by_aspect(aspect, source)}
    told = [(path, tree) for path, tree in found if any(key in tree for key in GEOMETRY)] or [(path, tree)]
    branches = [_branch_of(tree, str(path), image_size, clip=clip, tiles=tiles) for path, tree in told]
    if branches[-1] != branches[0]:
        raise UserError(
            f"{told[-1][0]}: pictures become {branches[-1]}, but by {told[0][0]} {branches[0]}; correct one"
        )
    return branches[0]


def _branch_of(tree: Tree, where: str, image_size: int, *, clip: bool, tiles: bool) -> Tree:
    """Return ``model.image`` by one file."""
    branch: Tree = {"resample": resampling(tree, where)}
    if tree.get("do_resize") is False:
        raise UserError(f"{where}: do_resize is false; pictures are always resized here: set it to true")
    kind = str(tree.get("image_processor_type", ""))
    if kind.startswith(("LlavaOnevision", "LlavaNext")):
        pinpoints = pinpoints_of(tree.get("image_grid_pinpoints"), where)
        return {**branch, "kind": "anyres_max" if kind.startswith("LlavaOnevision") else "anyres", **pinpoints}
    if tiles or tree.get("crop_to_patches"):
        limits = {"min_tiles": tree.get("min_patches", 1), "max_tiles": tree.get("max_patches", 12)}
        return {**branch, "kind": "dynamic_tiles", **limits}
    size = tree.get("size") or {}
    short, square = size.get("shortest_edge"), (size.get("height"), size.get("width"))
    padded = bool(tree.get("do_pad")) and not kind.startswith(("CLIP", "Siglip"))
    cropped = _crops(tree, clip=clip)
    if "height" in size and square != (image_size, image_size) and cropped:
        raise UserError(
            f"{where}: resizes pictures to {square[0]} x {square[1]} and cuts {image_size} x {image_size} out of that "
            "(size, do_center_crop); not supported"
        )
    if padded and short not in (None, image_size):
        raise UserError(
            f"{where}: resizes padded pictures to {short} (size), but the tower is for {image_size} x {image_size}; "
            "not supported"
        )
    if padded:
        return {**branch, "kind": "pad", "fill": "mean"}
    if cropped and "height" not in size:
        own = {} if short in (None, image_size) else {"short_side": short}
        return {**branch, "kind": "crop", **own}
    if short is not None:
        raise UserError(
            f"{where}: makes pictures that are not square (size {size}, do_center_crop false); not supported"
        )
    return branch


def geometry(source: Source) -> str | None:
    """Return how a tower's own file brings pictures to a square, where that is not how a composed model does it."""
    path = source.directory / PREPROCESSOR
    tree = read_json(path) if path.is_file() else {}
    if tree.get("do_pad"):
        return f"{path} pads pictures to a square; here they are squashed to one (model.image.kind=pad does as it)"
    if tree.get("do_center_crop"):
        return f"{path} cuts a square out of pictures; here they are squashed to one (model.image.kind=crop does as it)"
    return None


def processor_files(source: Source, *, areas: bool = False) -> Iterator[tuple[Path, Tree]]:
    """Yield the image processor's settings in either file.

    Args:
        source: the checkpoint.
        areas: whether pictures keep sizes of their own, so that the edges of ``size`` are numbers of pixels.

    Raises:
        UserError: a value is not of its kind.
    """
    for name in (PREPROCESSOR, PROCESSOR):
        path = source.directory / name
        tree = read_json(path) if path.is_file() else {}
        tree = tree.get("image_processor", {}) if name == PROCESSOR else tree
        if not isinstance(tree, Mapping):
            raise UserError(f"{path}: image_processor is no object; restore the file")
        yield path, _checked(tree, str(path), areas=areas)


def _checked(tree: Mapping[str, Any], where: str, *, areas: bool) -> Tree:
    """Return an image processor's settings with both sizes as objects; what is null is left out.

    Raises:
        UserError: a switch is neither true nor false, or a size is none.
    """
    found = {key: value for key, value in tree.items() if value is not None or key not in _SWITCHES}
    for key in _SWITCHES:
        if not isinstance(found.get(key, False), bool):
            raise UserError(f"{where}: {key} is {str(tree[key])[:40]!r}; it must be true or false")
    for key in ("size", "crop_size"):
        edges = isinstance(tree.get(key), Mapping) and set(tree[key]) <= {"shortest_edge", "longest_edge"}
        if areas and edges and key == "size":
            continue
        if tree.get(key) is not None:
            found[key] = _sides(tree[key], key, where)
        else:
            found.pop(key, None)
    return found


def _sides(value: Any, key: str, where: str) -> dict[str, int]:
    """Return a size as an object; a number is the shorter side, or that of the square that is cut out."""
    if isinstance(value, int):
        value = {"height": value, "width": value} if key == "crop_size" else {"shortest_edge": value}
    if isinstance(value, list) and len(value) == 2:
        value = {"height": value[0], "width": value[1]}
    sides = {name: side for name, side in value.items() if side is not None} if isinstance(value, Mapping) else {}
    known = set(sides) in ({"height", "width"}, {"shortest_edge"})
    if not known or not all(type(side) is int and side > 0 for side in sides.values()):
        raise UserError(
            f"{where}: {key} is {str(value)[:60]!r}; it must be an object of height and width, or of shortest_edge, in "
            "pixels"
        )
    return sides


def _crops(tree: Mapping[str, Any], *, clip: bool) -> bool:
    cropped = tree.get("do_center_crop")
    if cropped is not None:
        return bool(cropped)
    kind = str(tree.get("image_processor_type", ""))
    if kind.startswith(("CLIP", "Llava")) or (clip and not kind):
        return "height" not in tree.get("size", {})
    return "crop_size" in tree


def resampling(tree: Mapping[str, Any], where: str) -> str:
    """Return the filter that a file names by PIL's number.

    Raises:
        UserError: it is none that there is here.
    """
    number = tree.get("resample", _FILTERS["bicubic"])
    names = [name for name, value in _FILTERS.items() if value == number and not isinstance(number, bool)]
    if not names:
        raise UserError(f"{where}: resample is {number!r}; there are {_FILTERS} (PIL's numbers)")
    return names[0]


def _by_aspect(aspect: str, source: Source) -> Tree:
    """Return the plan that LLaVA's own code calls ``image_aspect_ratio``."""
    where = f"{source.directory / CONFIG}: image_aspect_ratio"
    if aspect == "pad":
        return {"kind": "pad", "fill": "mean"}
    if aspect.startswith("anyres"):
        pinpoints = pinpoints_of(source.config.get("image_grid_pinpoints"), where)
        if aspect == "anyres":
            return {"kind": "anyres", **pinpoints}
        limit = aspect.removeprefix("anyres_max_")
        if limit.isdigit() and int(limit):
            return {"kind": "anyres_max", "max_tiles": int(limit), **pinpoints}
    raise UserError(f"{where} is {aspect[:40]!r}; there are square, pad, anyres and anyres_max_N")


def pinpoints_of(value: Any, where: str) -> Tree:
    """Return ``pinpoints`` of ``image_grid_pinpoints``; empty where there are none.

    Raises:
        UserError: they are no resolutions.
    """
    if value is None:
        return {}
    good = isinstance(value, list) and all(
        isinstance(one, list) and len(one) == 2 and all(isinstance(side, int) and side > 0 for side in one)
        for one in value
    )
    if not good:
        raise UserError(f"{where}: image_grid_pinpoints must be a list of [height, width]")
    return {"pinpoints": value}


def llava_processor(vision: VisionConfig, image_token: str) -> Tree:
    """Return what LLaVA's processor of Transformers needs to make slots of an image's token."""
    clip = vision.class_token
    return {
        "image_token": image_token, "num_additional_image_tokens": int(clip), "patch_size": vision.patch_size,
        "processor_class": "LlavaProcessor", "vision_feature_select_strategy": "default" if clip else "full",
    }  # fmt: skip


def trained_preprocessor(model: ModelConfig, old: Mapping[str, Any], pictures: Mapping[str, Any] | None) -> Tree:
    """Return the file for pictures as they are trained here; other keys stay as they were.

    Args:
        model: the model.
        old: the file as it was.
        pictures: ``Family.trained_pictures``: keys of another processor than that of one square a picture.

    Raises:
        UserError: neither can do what is trained here.
    """
    vision, image = model.vision, model.image
    square = {"height": vision.image_size, "width": vision.image_size}
    kinds = _KINDS[bool(getattr(vision, "class_token", False))]
    kept = {key: value for key, value in old.items() if key not in _PLAN_KEYS}
    if str(old.get("image_processor_type")).startswith(_TILING):  # it does so whatever its other keys say
        kept.pop("image_processor_type")
    tree = {
        "image_processor_type": kinds,
        **kept,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(vision.image_mean),
        "image_std": list(vision.image_std),
        "resample": _FILTERS[image.resample],
        "rescale_factor": 1 / 255,
    }
    if pictures is not None:
        own = dict(pictures)
    elif image.kind == "squash":
        own = {"crop_size": square, "do_center_crop": False, "size": square}
        own |= {"do_pad": False} if "do_pad" in old else {}
    elif image.kind == "crop":
        short = {"shortest_edge": image.short_side or vision.image_size}
        own = {"crop_size": square, "do_center_crop": True, "size": short}
        own |= {"do_pad": False} if "do_pad" in old else {}
    elif image.kind == "pad" and image.fill in (None, "mean"):
        own = {"image_processor_type": "LlavaImageProcessor", "do_pad": True, "crop_size": square}
        own |= {"do_center_crop": False, "size": square}
    else:
        raise UserError(f"model.image: {image.kind} has no {PREPROCESSOR} in this family; choose squash, pad or crop")
    return tree | own


def native_sizes(tree: Mapping[str, Any], where: str) -> Tree:
    """Return ``min_pixels`` and ``max_pixels`` of Qwen2-VL's processor: keys of their own, else those of ``size``.

    Raises:
        UserError: one is no number of pixels.
    """
    size, found = tree.get("size") or {}, {}
    for key, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        value = size.get(edge) if tree.get(key) is None else tree[key]
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{where}: {key} is {str(value)[:40]!r}, which is no number of pixels; correct it")
        found[key] = value
    return found
