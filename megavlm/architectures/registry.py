"""Names that a recipe may use for towers, connectors, language models and whole models.

A preset is data: default values for one branch of the recipe, and the module that builds it. This file and
the ``__init__`` files that register presets import neither torch nor Megatron-Core, so that a recipe is
checked, and ``--help`` printed, in an instant.

Other packages add presets through the entry-point group ``megavlm.presets``: each entry point names a
function that is called without arguments and registers what it brings.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from megavlm.config.errors import UserError
from megavlm.data.templates import find_template, is_checkpoint


@dataclass(frozen=True)
class Preset:
    """Default values for one branch of the recipe, and the module with its ``build`` function."""

    name: str
    module: str
    values: dict[str, Any]

    def build(self, *args: Any, **kwargs: Any) -> Any:
        """Call ``build`` of the preset's module, which is imported now."""
        return importlib.import_module(self.module).build(*args, **kwargs)


class Registry:
    """Presets of one kind, by name. A name may be a pattern such as ``mlp<N>x_gelu``."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._presets: dict[str, Preset] = {}

    def register(self, name: str, module: str, **values: Any) -> None:
        """Add a preset. ``<N>`` in ``name`` stands for a positive number.

        Raises:
            UserError: the name is taken.
        """
        if name in self._presets:
            raise UserError(f"{self.kind} preset {name!r} is registered twice")
        self._presets[name] = Preset(name, module, values)

    def names(self) -> list[str]:
        """Return the registered names, sorted."""
        return sorted(self._presets)

    def find(self, name: str) -> Preset:
        """Return the preset called ``name``.

        Raises:
            UserError: there is none; the message lists those that exist.
        """
        for pattern, preset in self._presets.items():
            if re.fullmatch(re.escape(pattern).replace("<N>", "[1-9][0-9]*"), name):
                return preset
        raise UserError(f"no {self.kind} preset {name!r}; there are {', '.join(self.names())}")


VISION = Registry("vision")
CONNECTORS = Registry("connector")
LANGUAGE = Registry("language")
MODELS = Registry("model")

_BRANCHES = {"vision": VISION, "connector": CONNECTORS, "language": LANGUAGE}


def load_presets() -> None:
    """Register the presets of this package and of installed packages that bring some (once)."""
    for room in ("towers", "connectors", "decoders"):
        importlib.import_module(f"megavlm.architectures.{room}")
    if "tiny" not in MODELS.names():
        importlib.import_module("megavlm.families.presets")  # the whole models
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
    if isinstance(model.get("template"), str) and not is_checkpoint(model["template"]):
        find_template(model["template"])
    whole: dict[str, Any] = {}
    if isinstance(model.get("preset"), str):
        whole = _find(MODELS, model["preset"], "model.preset").values
    expanded = dict(model)
    for branch, registry in _BRANCHES.items():
        own = model.get(branch, {})
        if not isinstance(own, dict):
            continue
        values = {**whole.get(branch, {}), **own}
        if values.get("preset") != whole.get(branch, {}).get("preset"):
            values = dict(own)  # another preset than the whole model's: its adjustments do not apply
        if isinstance(values.get("preset"), str):
            values = {**_find(registry, values["preset"], f"model.{branch}.preset").values, **values}
        expanded[branch] = values
    return {**tree, "model": expanded}


def _find(registry: Registry, name: str, key: str) -> Preset:
    try:
        return registry.find(name)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
