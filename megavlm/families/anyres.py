"""What LLaVA-1.6 and LLaVA-OneVision say of their tiles: in ``preprocessor_config.json`` and in ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megavlm.config.errors import UserError
from megavlm.config.json_object import read_json
from megavlm.config.schema import ModelConfig
from megavlm.data.media import plan_of
from megavlm.data.plans_tiles import AnyresPlan
from megavlm.families.preprocessor import (
    GEOMETRY,
    PROCESSOR,
    pinpoints_of,
    processor_files,
    resampling,
)
from megavlm.weights.source import CONFIG, Source

Tree = dict[str, Any]

TILE_PROCESSORS = {"anyres": "LlavaNextImageProcessor", "anyres_max": "LlavaOnevisionImageProcessor"}
"""Of LLaVA-1.6 and of LLaVA-OneVision."""
_DEFAULT_SIDE = {"anyres": 224, "anyres_max": 384}
_DEFAULT_PINPOINTS = {
    "anyres": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "anyres_max": [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)],
}
"""What Transformers' classes take where a file says nothing."""


def anyres_branch(source: Source, image_size: int, kind: str) -> Tree:
    """Return ``model.image`` of a checkpoint whose pictures are cut to tiles; empty where no file says how.

    Args:
        source: the checkpoint.
        image_size: of its tower.
        kind: anyres or anyres_max.

    Raises:
        UserError: the processor's file and config.json do not go together, or pictures are treated in a way that is
            not done here.
    """
    found = [(path, tree) for path, tree in processor_files(source) if any(key in tree for key in GEOMETRY)]
    branches = [_branch_of(source, path, tree, image_size, kind) for path, tree in found]
    if branches and branches[-1] != branches[0]:
        raise UserError(
            f"{found[-1][0]}: pictures become {branches[-1]}, but by {found[0][0]} {branches[0]}; correct one"
        )
    return branches[0] if branches else {}


def _branch_of(source: Source, path: Path, tree: Tree, image_size: int, kind: str) -> Tree:
    """Return ``model.image`` by one file, held against config.json."""
    config = source.directory / CONFIG
    known, named = TILE_PROCESSORS[kind], str(tree.get("image_processor_type", TILE_PROCESSORS[kind]))
    if not named.startswith(known):
        raise UserError(
            f"{path}: image_processor_type is {named!r}, but {config} is of model_type "
            f"{source.config.get('model_type')!r}, whose pictures {known} cuts to tiles; restore the file"
        )
    if tree.get("do_resize") is False:
        raise UserError(f"{path}: do_resize is false; pictures are always resized here: set it to true")
    sides = {key: _side(tree.get(key), _DEFAULT_SIDE[kind]) for key in ("size", "crop_size") if key in tree}
    key, side = next(((key, side) for key, side in sides.items() if side != image_size), ("size", image_size))
    if not sides:
        side = _DEFAULT_SIDE[kind]
    if side != image_size:
        raise UserError(
            f"{path}: makes tiles of {side} pixels ({key}), but the tower of {config} is for {image_size} x "
            f"{image_size}; correct one"
        )
    own = _pinpoints(tree, str(path), kind)
    theirs = _pinpoints(source.config, str(config), kind)
    if sorted(own) != sorted(theirs):
        raise UserError(
            f"{path}: image_grid_pinpoints is {_short(own)}, but {config} says {_short(theirs)}; correct one"
        )
    for height, width in own:
        if height % image_size or width % image_size:
            raise UserError(
                f"{path}: image_grid_pinpoints has {height} x {width}, which is not made of the {image_size} x "
                f"{image_size} pixels that the tower of {config} takes; correct one"
            )
    return {"kind": kind, "resample": resampling(tree, str(path)), "pinpoints": own}


def trained_anyres(model: ModelConfig) -> Tree:
    """Return the keys of ``preprocessor_config.json`` that say how pictures are cut, after a training."""
    side, plan = model.vision.image_size, plan_of(model)
    assert isinstance(plan, AnyresPlan)
    pinpoints, square = [list(one) for one in plan.pinpoints], {"height": side, "width": side}
    own: Tree = {"image_processor_type": TILE_PROCESSORS[model.image.kind], "image_grid_pinpoints": pinpoints}
    if model.image.kind == "anyres_max":
        return {**own, "do_pad": True, "size": square}
    return {**own, "do_center_crop": True, "do_pad": True, "crop_size": square, "size": {"shortest_edge": side}}


def aspect_of(source: Source) -> int:
    """Return the tiles whose features a picture has at most, of ``vision_aspect_ratio``.

    Raises:
        UserError: it is no such limit, or ``processor_config.json`` has another.
    """
    config, path = source.directory / CONFIG, source.directory / PROCESSOR
    said = str(source.config.get("vision_aspect_ratio", "anyres_max_9"))
    processor = read_json(path) if path.is_file() else {}
    other = processor.get("vision_aspect_ratio", said)
    if other != said:
        raise UserError(f"{path}: vision_aspect_ratio is {other!r}, but {config} says {said!r}; correct one")
    limit = said.removeprefix("anyres_max_")
    if limit == said or not limit.isdigit() or not int(limit):
        raise UserError(f"{config}: vision_aspect_ratio is {said[:40]!r}; only anyres_max_N is supported")
    return int(limit)


def _pinpoints(tree: Mapping[str, Any], where: str, kind: str) -> list[list[int]]:
    given = pinpoints_of(tree.get("image_grid_pinpoints"), where).get("pinpoints", _DEFAULT_PINPOINTS[kind])
    if not given:
        raise UserError(f"{where}: image_grid_pinpoints is empty; give at least one [height, width]")
    return [list(one) for one in given]


def _side(size: Any, default: int) -> Any:
    """Return the side of a tile; what makes no square tiles as it stands."""
    if size is None:
        return default
    if isinstance(size, Mapping):
        edges = {size[key] for key in ("shortest_edge", "height", "width") if size.get(key) is not None}
        return edges.pop() if len(edges) == 1 else dict(size)
    return size


def _short(pinpoints: list[list[int]]) -> str:
    shown = ", ".join(f"{height} x {width}" for height, width in pinpoints[:6])
    return shown + (f", .. ({len(pinpoints)})" if len(pinpoints) > 6 else "")
