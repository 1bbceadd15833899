"""LLaVA checkpoints in pieces: a tower that is named and not there, and the projector that stage 1 leaves alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megavlm.checkpoint.hf.incoming import SourceOfParts
from megavlm.config.errors import UserError
from megavlm.families.family import config_file
from megavlm.families.llava_original import LlavaApartFamily, pictures, tower_apart
from megavlm.families.projector import ProjectorFamily
from megavlm.families.towers import FeatureLayer, taken_layers


def open_whole(path: Path, vision: Path | None, feature_layer: FeatureLayer) -> list[SourceOfParts]:
    """Open a checkpoint for all that it has, with the tower that it only names.

    Args:
        path: the checkpoint.
        vision: where its tower is, if the user says so.
        feature_layer: of a tower that comes alone.

    Raises:
        UserError: a tower is given to a checkpoint that has one, or none to one that has not.
    """
    one = SourceOfParts.open(path, None, feature_layer)
    if not isinstance(one.family, LlavaApartFamily):
        if vision is not None:
            raise UserError(
                f"--vision {vision}: {path} is a {one.family.title}; it goes with its own parts, leave it out"
            )
        return [one]
    tower, layer = tower_apart(one.source, vision)
    given = [one, SourceOfParts.open(tower, ["vision"], layer)]
    width, named = _width(given[1]), one.source.config.get("mm_hidden_size")
    if named is not None and named != width:
        raise UserError(
            f"{config_file(one.source)}: mm_hidden_size is {named!r}, but the features of {tower} are {width} wide; "
            "give the tower that mm_vision_tower names"
        )
    one.branches["image"] = pictures(one.source, given[1].source, given[1].branches["vision"])
    return given


def _width(tower: SourceOfParts) -> int:
    vision = tower.branches["vision"]
    return int(vision["hidden_size"]) * len(vision.get("feature_layers") or (0,))


def check_stage_1(given: Sequence[SourceOfParts]) -> None:
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


def _check_widths(projector: SourceOfParts, tower: SourceOfParts, language: SourceOfParts | None) -> None:
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
