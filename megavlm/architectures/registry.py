"""Fills the registries of :mod:`megavlm.config.architecture`, and expands a recipe's presets.

What comes with megavlm is in the folders of ``towers``, ``connectors`` and ``decoders``. Other packages add theirs
through the entry-point group ``megavlm.presets``: each entry point names a function that is called without arguments
and registers what it brings.
"""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from typing import Any

from megavlm.config.architecture import (
    BRANCHES,
    CONNECTORS,
    LANGUAGE,
    MODELS,
    VISION,
    Architecture,
    Preset,
    Registry,
    architecture_of,
)
from megavlm.config.errors import UserError
from megavlm.data.media import plan_kinds
from megavlm.data.templates import find_template

__all__ = [
    "CONNECTORS", "LANGUAGE", "MODELS", "VISION", "Architecture", "Preset", "Registry", "architecture_of",
    "expand_presets", "load_presets",
]  # fmt: skip


def load_presets() -> None:
    """Register the presets of this package and of installed packages that bring some (once)."""
    if MODELS.names():
        return
    for room in ("towers", "connectors", "decoders"):
        for folder in importlib.import_module(f"megavlm.architectures.{room}").FOLDERS:
            importlib.import_module(f"megavlm.architectures.{room}.{folder}").register()
    importlib.import_module("megavlm.families.presets").register()  # the whole models
    plan_kinds()
    for entry in entry_points(group="megavlm.presets"):
        entry.load()()


def expand_presets(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the raw recipe ``tree`` with the values of the presets that its ``model`` branch names filled in.

    What the tree sets itself wins over the preset. The input is not changed.

    Raises:
        UserError: an unknown preset; the message starts with the key.
    """
    load_presets()
    model = tree.get("model")
    if not isinstance(model, dict):
        return tree
    if isinstance(model.get("template"), str):
        find_template(model["template"])
    whole: dict[str, Any] = {}
    if isinstance(model.get("preset"), str):
        whole = _find(MODELS, model["preset"], "model.preset").values
    expanded = dict(model)
    for branch, registry in BRANCHES.items():
        own = model.get(branch, {})
        if not isinstance(own, dict):
            continue
        values = {**whole.get(branch, {}), **own}
        if values.get("preset") != whole.get(branch, {}).get("preset"):
            values = dict(own)  # another preset than the whole model's: its adjustments do not apply
        if isinstance(values.get("preset"), str):
            values = {**_find(registry, values["preset"], f"model.{branch}.preset").values, **values}
        expanded[branch] = values
    expanded |= _image(whole.get("image", {}), model)
    return {**tree, "model": expanded}


def _image(whole: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    """Return the image branch: the whole model's adjustments are for its own kind of plan."""
    own = model.get("image", {})
    if not whole or not isinstance(own, dict):
        return {}
    same = own.get("kind", whole.get("kind")) == whole.get("kind")
    return {"image": {**whole, **own} if same else own}


def _find(registry: Registry, name: str, key: str) -> Preset:
    try:
        return registry.find(name)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
