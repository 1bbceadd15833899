"""How films become frames: the file of a video processor of Transformers, in and out (``model.video``).

Transformers looks into ``processor_config.json`` (``video_processor``), then for ``video_preprocessor_config.json``,
and takes ``preprocessor_config.json`` where neither is there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megavlm.config.errors import UserError
from megavlm.config.json_object import read_json
from megavlm.config.schema import ModelConfig
from megavlm.config.video import MOST_FRAMES
from megavlm.data.films.plan import film_plan_of
from megavlm.data.films.rules import GlmFilmPlan, RatedFilmPlan
from megavlm.families.common import expect
from megavlm.families.preprocessor import PREPROCESSOR, PROCESSOR
from megavlm.weights.source import Source

Tree = dict[str, Any]
VIDEO_PREPROCESSOR = "video_preprocessor_config.json"
_NESTED = "video_processor"
_COUNTS = ("fps", "num_frames", "min_frames", "max_frames")
_PATCHES = {
    "patch_size": "patch_size",
    "merge_size": "spatial_merge_size",
    "temporal_patch_size": "temporal_patch_size",
}


@dataclass(frozen=True)
class _Kind:
    """What a family's class has where its file says nothing, and how the file's names are called here."""

    processor: str
    """Name of the class."""
    size: tuple[int, int]
    """``shortest_edge`` and ``longest_edge``."""
    most: str
    """What ``longest_edge`` is here."""
    counts: tuple[str, ...]
    """Which of the keys of frames its class looks at."""
    token: bool = True
    """Whether its model has another token at a film's slots than at a picture's (``video_token_id``)."""
    apart: bool = True
    """Whether its model takes frames apart from pictures (``pixel_values_videos``)."""


_KINDS = {
    "qwen2_vl": _Kind("Qwen2VLVideoProcessor", (128 * 28 * 28, 768 * 28 * 28), "max_pixels", _COUNTS),
    "qwen3_vl": _Kind("Qwen3VLVideoProcessor", (128 * 32 * 32, 768 * 32 * 32), "total_pixels", _COUNTS),
    "glm4v": _Kind("Glm4vVideoProcessor", (112 * 112, 28 * 28 * 2 * 30000), "total_pixels", ("fps",), token=False),
    "llava_onevision": _Kind("LlavaOnevisionVideoProcessor", (0, 0), "", ("fps", "num_frames")),
    "internvl": _Kind("InternVLVideoProcessor", (0, 0), "", ("fps", "num_frames"), token=False, apart=False),
}
_VIDEO_TOKENS = {"qwen2_vl": 128_000, "qwen3_vl": 768}
"""``max_video_tokens`` of the classes."""


def film_has_token(kind: str) -> bool:
    """Whether Transformers' model of a film plan has a token of its own at a film's slots (``video_token_id``)."""
    return _KINDS[kind].token


def films_apart(kind: str) -> bool:
    """Whether Transformers' model of a film plan takes frames apart from pictures (``pixel_values_videos``)."""
    return _KINDS[kind].apart


def transformers_films(model: ModelConfig) -> list[str]:
    """Return the keys by which films are as in Transformers 5, where the published code has them otherwise."""
    video, keys = model.video, []
    if video.kind == "qwen2_vl" and video.positions_after == "longest" and model.language.position_axes > 1:
        keys.append("model.video.positions_after=side")
    if video.kind == "qwen3_vl" and not video.outer_marks:
        keys.append("model.video.outer_marks=true")
    return keys


def film_branch(source: Source, vision: Mapping[str, Any], kind: str, **own: Any) -> Tree:
    """Return ``model.video`` as a checkpoint's own files say it.

    Args:
        source: The checkpoint.
        vision: Its tower, with mean and standard deviation of its pictures as far as a file says them.
        kind: The family's film plan.
        own: Keys that ``config.json`` says.

    Raises:
        UserError: Films are treated in a way that is not done here, or the file does not suit the tower.
    """
    where, tree = _file(source)
    known, found = _KINDS[kind], {"kind": kind, **own}
    if not tree:
        return found
    expect(tree, where, do_resize=True, do_convert_rgb=True, do_center_crop=(None, False), do_rescale=True)
    _check_normalisation(tree, vision, where)
    for key in known.counts:
        if tree.get(key) is not None:
            found[key] = _number(tree, key, where)
            if key in ("min_frames", "max_frames", "num_frames") and found[key] > MOST_FRAMES:
                raise UserError(
                    f"{where}: {key} is {found[key]}; at most {MOST_FRAMES} frames of a film are shown here; lower it"
                )
    if found.get("fps") is not None and found.get("num_frames") is not None:
        raise UserError(f"{where}: fps and num_frames are both there; take one of them out")
    if found.get("num_frames") is not None:  # the classes look at neither then
        found.pop("min_frames", None)
        if found.get("max_frames", MOST_FRAMES) < found["num_frames"]:
            del found["max_frames"]
    if known.most:
        found |= _sizes(tree, vision, kind, where)
    if kind == "glm4v" and tree.get("max_duration") is not None:
        found["max_seconds"] = float(_number(tree, "max_duration", where))
    return found


def _sizes(tree: Tree, vision: Mapping[str, Any], kind: str, where: str) -> Tree:
    """Return the budgets of pixels."""
    known = _KINDS[kind]
    for key, ours in _PATCHES.items():
        if tree.get(key) is not None and tree[key] != vision[ours]:
            raise UserError(f"{where}: {key} is {tree[key]!r}, but config.json's tower has {vision[ours]}; correct one")
    size = tree.get("size") if isinstance(tree.get("size"), Mapping) else None
    edges = {"shortest_edge": known.size[0], "longest_edge": known.size[1]} | dict(size or {})
    if kind == "qwen2_vl":  # and no other
        edges |= {
            edge: tree[key]
            for edge, key in (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels"))
            if tree.get(key) is not None
        }
    least, most = (_number(edges, edge, where) for edge in ("shortest_edge", "longest_edge"))
    found = {"min_pixels": least, known.most: most}
    if tree.get("cap_pixels_per_frame"):
        tokens = (
            tree.get("max_video_tokens", _VIDEO_TOKENS[kind])
            * (vision["patch_size"] * vision["spatial_merge_size"]) ** 2
        )
        found |= {"total_pixels": int(tokens * 0.9)} if kind == "qwen2_vl" else {"max_pixels": tokens}
    return found


def _file(source: Source) -> tuple[str, Tree]:
    """Return the file that says what becomes of films, and its settings; empty where there is none."""
    nested = source.directory / PROCESSOR
    tree = read_json(nested).get(_NESTED) if nested.is_file() else None
    if isinstance(tree, Mapping):
        return f"{nested}: {_NESTED}", dict(tree)
    for name in (VIDEO_PREPROCESSOR, PREPROCESSOR):
        path = source.directory / name
        if path.is_file():
            return str(path), dict(read_json(path))
    return str(source.directory / VIDEO_PREPROCESSOR), {}


def _check_normalisation(tree: Mapping[str, Any], vision: Mapping[str, Any], where: str) -> None:
    """Raise UserError where films have another mean or deviation than pictures: the tower here has one of each."""
    for key in ("image_mean", "image_std"):
        there, own = tree.get(key), vision.get(key)
        if there is not None and own is not None and [float(x) for x in there] != [float(x) for x in own]:
            raise UserError(
                f"{where}: {key} is {there}, of pictures it is {list(own)}; films of other colours are not supported: "
                "correct the file, or take it away to train on pictures alone"
            )


def _number(tree: Mapping[str, Any], key: str, where: str) -> Any:
    value = tree.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise UserError(f"{where}: {key} is {str(value)[:40]!r}; it must be a number above 0")
    return value


def write_films(partial: Path, model: ModelConfig) -> list[str]:
    """Bring the file of an export to how films were made frames here; other keys stay as they were.

    Args:
        partial: The directory, with the files that came along.
        model: The model.

    Returns:
        A line for the report; none where the model reads no films, or the file says it already.
    """
    plan: Any = film_plan_of(model)
    if plan is None or model.video.kind not in _KINDS:
        return []
    known, processor = _KINDS[model.video.kind], partial / PROCESSOR
    whole = read_json(processor) if processor.is_file() else {}
    path = partial / VIDEO_PREPROCESSOR
    beside = partial / PREPROCESSOR
    nested, kept = whole.get(_NESTED), read_json(path) if path.is_file() else {}
    old = dict(nested) if isinstance(nested, Mapping) else kept
    base = old or {
        key: value
        for key, value in (read_json(beside) if beside.is_file() else {}).items()
        if key in ("image_mean", "image_std", "do_convert_rgb", "do_normalize", "do_rescale", "rescale_factor")
    }
    tree = {**base, **_written(model, plan, old)}
    if tree == old:
        return []
    if isinstance(nested, Mapping):
        processor.write_text(_text(whole | {_NESTED: tree}), encoding="utf-8")
    else:
        path.write_text(_text(tree), encoding="utf-8")
    return [f"{VIDEO_PREPROCESSOR}: films are sampled and resized as trained ({known.processor})"]


def _written(model: ModelConfig, plan: Any, old: Mapping[str, Any]) -> Tree:
    """Return the keys that say what becomes of a film."""
    video, vision, known = model.video, model.vision, _KINDS[model.video.kind]
    kind = str(old.get("video_processor_type", known.processor))
    filters = {"lanczos": 1, "bilinear": 2, "bicubic": 3}
    tree: Tree = {"video_processor_type": kind, "resample": filters[model.image.resample], "do_sample_frames": True}
    counted = video.num_frames is not None or (video.fps is None and plan.num_frames is not None)
    tree |= {"num_frames": plan.num_frames, "fps": None} if counted else {"fps": plan.fps, "num_frames": None}
    if not isinstance(plan, RatedFilmPlan):
        side = vision.image_size
        return tree | {"size": {"height": side, "width": side}}
    tree |= {key: getattr(vision, ours) for key, ours in _PATCHES.items()}
    if isinstance(plan, GlmFilmPlan):
        del tree["num_frames"]
        tree["max_duration"] = _whole(plan.max_seconds)
    else:
        tree |= {"min_frames": plan.min_frames, "max_frames": plan.max_frames}
    tree["size"] = {"shortest_edge": plan.min_pixels, "longest_edge": getattr(plan, known.most)}
    for key in ("min_pixels", "max_pixels"):
        if key in old:
            tree[key] = getattr(plan, key)
    block = (vision.patch_size * vision.spatial_merge_size) ** 2
    capped = plan.total_pixels if video.kind == "qwen2_vl" else plan.max_pixels
    if video.kind != "glm4v" and capped is not None:
        tokens = capped / block
        if video.kind == "qwen2_vl":
            tokens = -(-capped * 10 // 9) / block
            if int(tokens * block * 0.9) != capped:  # what is read again, in floating point
                tokens = (capped + 0.5) / 0.9 / block
        tree |= {"cap_pixels_per_frame": True, "max_video_tokens": _whole(tokens)}
    elif "cap_pixels_per_frame" in old:
        tree["cap_pixels_per_frame"] = False
    return tree


def _whole(value: float) -> float:
    return int(value) if value == int(value) else value


def _text(tree: Mapping[str, Any]) -> str:
    return json.dumps(tree, indent=2, ensure_ascii=False) + "\n"


def unsaid_films(model: ModelConfig) -> list[str]:
    """Return a line for each thing about films that no file of Transformers says."""
    video, lines = model.video, []
    if video.sample_pixels is not None:
        lines.append("model.video.sample_pixels: Transformers' processors know budgets of one film only")
    if video.kind == "qwen2_vl" and video.positions_after == "longest" and model.language.position_axes > 1:
        lines.append(
            "model.video.positions_after: positions behind a film go on after its largest number, as published; "
            "Transformers from 5.3 goes on after its longer side, which is another one for long films"
        )
    if video.kind == "qwen3_vl" and not video.outer_marks:
        lines.append(
            "model.video.outer_marks: nothing stands around a whole film, as published; Transformers from 5.0 leaves "
            "the chat template's <|vision_start|> and <|vision_end|> there"
        )
    return lines
