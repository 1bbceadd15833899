"""Models put together of several checkpoints.

A tower that is named and not there, the projector that LLaVA's stage 1 leaves alone, the connector that nobody gives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from megavlm.config.errors import UserError
from megavlm.families.family import Family, Tree, config_file
from megavlm.families.projector import ProjectorFamily
from megavlm.families.towers import taken_layers
from megavlm.weights.source import Source


class OpenedCheckpoint(Protocol):
    """A checkpoint that was opened, and the parts that are taken from it."""

    source: Source
    family: Family
    parts: tuple[str, ...]
    branches: Tree


Opened = TypeVar("Opened", bound=OpenedCheckpoint)


def with_tower(one: Opened, vision: Path | None, open_tower: Callable[[Path, Any], Opened]) -> list[Opened]:
    """Return a checkpoint that was opened for all that it has, and the tower that it only names.

    Args:
        one: the checkpoint.
        vision: where its tower is, if the user says so.
        open_tower: opens a tower for the layer, or layers, whose features are taken.

    Raises:
        UserError: a tower is given to a checkpoint that has one, or none to one that has not.
    """
    found = one.family.tower_apart(one.source, vision)
    if found is None:
        if vision is not None:
            where, title = one.source.path, one.family.title
            raise UserError(f"--vision {vision}: {where} is a {title}; it goes with its own parts, leave it out")
        return [one]
    tower, layer = found
    given = [one, open_tower(tower, layer)]
    width, named = _width(given[1]), one.source.config.get("mm_hidden_size")
    if named is not None and named != width:
        raise UserError(
            f"{config_file(one.source)}: mm_hidden_size is {named!r}, but the features of {tower} are {width} wide; "
            "give the tower that mm_vision_tower names"
        )
    one.branches["image"] = one.family.pictures(one.source, given[1].source, given[1].branches["vision"])
    return given


def _width(tower: OpenedCheckpoint) -> int:
    vision = tower.branches["vision"]
    return int(vision["hidden_size"]) * len(vision.get("feature_layers") or (0,))


def check_stage_1(given: Sequence[OpenedCheckpoint]) -> None:
    """Hold a projector's own config.json, where its trainer left one, against the tower that is to go before it.

    Raises:
        UserError: it was trained on features of other layers, or of another width.
    """
    projector = next((one for one in given if isinstance(one.family, ProjectorFamily)), None)
    tower = next((one for one in given if "vision" in one.parts), None)
    if projector is None or tower is None:
        return
    config, where = projector.source.config, config_file(projector.source)
    width, named = _width(tower), config.get("mm_hidden_size")
    _check_widths(projector, tower, next((one for one in given if "language" in one.parts), None))
    if named is not None and named != width:
        raise UserError(
            f"{where}: mm_hidden_size is {named!r}, but the features of {tower.source.path} are {width} wide; "
            f"give the tower {config.get('mm_vision_tower', 'that the projector was trained with')!r}"
        )
    layer = config.get("mm_vision_select_layer")
    half = tower.source.config.get("vision_config", tower.source.config)
    layers = half.get("num_hidden_layers")
    if layer is None or not isinstance(layers, int):
        return
    vision = tower.branches["vision"]
    there = vision.get("feature_layers") or [vision["num_layers"]]
    if taken_layers(layers, layer, where) != list(there):
        raise UserError(
            f"{where}: mm_vision_select_layer is {layer!r}, but of {tower.source.path} layer "
            f"{', '.join(map(str, there))} of {layers} is taken; give --vision-feature-layer={str(layer).strip('[]')}"
        )


def _check_widths(projector: OpenedCheckpoint, tower: OpenedCheckpoint, language: OpenedCheckpoint | None) -> None:
    """Check that a projector's first layer takes what the tower gives, and its last gives what the other takes."""
    if projector.branches["connector"]["preset"] == "resampler":
        return
    source, numbered = projector.source, [name for name in projector.source.tensors if name.endswith(".weight")]
    numbered.sort(key=lambda name: (len(name), name))
    first, last = source.shape(numbered[0]), source.shape(numbered[-1])
    if first[-1] != _width(tower):
        raise UserError(
            f"{source.path}: {numbered[0]} is for features {first[-1]} wide, but those of {tower.source.path} are "
            f"{_width(tower)} wide; give the projector and the tower that were trained together"
        )
    hidden = language.branches["language"]["hidden_size"] if language is not None else last[0]
    if language is not None and last[0] != hidden:
        raise UserError(
            f"{source.path}: {numbered[-1]} gives tokens {last[0]} wide, but those of {language.source.path} are "
            f"{hidden} wide; give the projector that was trained with this language model"
        )


def fresh_connector(branches: Mapping[str, Any], name: str | None) -> Tree:
    """Return the branch of a connector that is to be initialised.

    Args:
        branches: of tower and language model.
        name: of its preset; None for what usually stands behind such a tower.
    """
    vision, language = branches["vision"], branches["language"]
    qwen = not vision.get("class_token") and not vision.get("conv_bias")
    name = name or ("resampler" if qwen else "mlp2x_gelu")
    if name == "resampler":
        return {"preset": name, "num_queries": 256, "head_dim": min(128, language["hidden_size"])}
    return {"preset": name}
