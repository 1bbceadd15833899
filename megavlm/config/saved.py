"""Recipes that checkpoints carry: a key that is newer than the checkpoint had its default there.

A save writes every key of its time. One that is missing was not known then, and the model was what the key's own
default describes: neither the preset's value of today nor what a later run wants.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megavlm.config.architecture import BRANCHES, load
from megavlm.config.errors import UserError
from megavlm.config.fields import Meaning, meaning_of
from megavlm.config.schema import ImageConfig, LoraConfig, ModelConfig, VideoConfig
from megavlm.config.video import BY_SECONDS, FPS, GLM_SECONDS, MOST_FRAMES

Tree = dict[str, Any]


def is_saved(recipe: Path) -> bool:
    """Whether a recipe's file is the one that lies in a checkpoint."""
    return recipe.name == "recipe.yaml" and (recipe.parent / "run.json").is_file()


def with_defaults(tree: Mapping[str, Any]) -> Tree:
    """Return a checkpoint's recipe with the defaults of keys that it is older than, where presets could differ.

    Args:
        tree: of a recipe; branches ``model`` and ``lora``, if they are there, are looked at. It is not changed.
    """
    found = dict(tree)
    if isinstance(found.get("model"), Mapping):
        found["model"] = model_with_defaults(found["model"])
    if isinstance(found.get("lora"), Mapping):
        found["lora"] = {**_defaults(LoraConfig), **found["lora"]}
    return found


def model_with_defaults(model: Mapping[str, Any]) -> Tree:
    """Return a checkpoint's model, or some branches of it, with the defaults of keys that it is older than.

    A model that lacks what saves have written from the first version on (keys without a default, init_method_std) was
    written by hand: its presets say what it is.
    """
    classes = {name: _class_of(name, model[name]) for name in BRANCHES if isinstance(model.get(name), Mapping)}
    if not all(found is None or _always(found) <= model[name].keys() for name, found in classes.items()):
        return dict(model)
    filled = {name: {**_defaults(found), **model[name]} for name, found in classes.items() if found is not None}
    image = model.get("image", {})
    if classes.keys() == BRANCHES.keys() and isinstance(image, Mapping):
        filled["image"] = {**_defaults(ImageConfig), **image}  # before there were image plans, all squashed
        video = model.get("video", {})
        if isinstance(video, Mapping):
            kept = _without_idle(video, timed=_has_time(classes["language"], model["language"]))
            filled["video"] = {**_defaults(VideoConfig), **kept}  # and none took films
        filled["template"] = model.get("template", ModelConfig.template)  # and all spoke Qwen-VL's
    return {**model, **filled}


def _has_time(language: Any, values: Mapping[str, Any]) -> bool:
    """Whether a language model's positions have a time, or it cannot be told here."""
    known = language is not None and "rotary_sections" in language.__pydantic_fields__
    return not known or bool(values.get("rotary_sections"))


def _without_idle(video: Mapping[str, Any], *, timed: bool) -> Tree:
    """Return keys of ``model.video`` without those that had no effect when they were saved, and are refused now.

    Args:
        video: the keys.
        timed: whether the language model's positions have a time.
    """
    kind = video.get("kind", VideoConfig.kind)
    kept = dict(video) if kind != VideoConfig.kind else {"kind": kind}
    if kept.get("num_frames") is not None:
        kept["min_frames"] = None
        if (kept.get("max_frames") or MOST_FRAMES) < kept["num_frames"]:
            kept["max_frames"] = None
    for key in ("num_frames", "min_frames", "max_frames"):  # of more, a film was refused
        if kept.get(key) is not None:
            kept[key] = min(kept[key], MOST_FRAMES)
    fps, seconds = kept.get("fps") or FPS, kept.get("max_seconds") or GLM_SECONDS
    if kind in BY_SECONDS and int(seconds * fps) > MOST_FRAMES:
        kept["max_seconds"] = MOST_FRAMES / fps
    if not timed:
        kept.pop("tokens_per_second", None)
        kept.pop("positions_after", None)
    return kept


def _class_of(branch: str, values: Mapping[str, Any]) -> Any:
    """Return the class of a branch's keys; None where its preset is not known here (which is said where it is used)."""
    load()
    try:
        architecture = BRANCHES[branch].find(str(values.get("preset"))).architecture
    except UserError:
        return None
    assert architecture is not None
    return architecture.config


def _always(branch: Any) -> set[str]:
    return {name for name, info in branch.__pydantic_fields__.items() if info.is_required()} | {"init_method_std"}


def _defaults(branch: Any) -> Tree:
    """Return the keys that have a default, as YAML would give them."""
    found = {
        name: info.get_default(call_default_factory=True)
        for name, info in branch.__pydantic_fields__.items()
        if not info.is_required() and meaning_of(branch, name) is not Meaning.NAMES
    }
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}
