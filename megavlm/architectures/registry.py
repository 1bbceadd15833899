"""Registers what is in ``towers``, ``connectors`` and ``decoders``: see :mod:`megavlm.config.architecture`."""

from __future__ import annotations

import importlib

from megavlm.config.architecture import (
    CONNECTORS,
    LANGUAGE,
    MODELS,
    VISION,
    Architecture,
    Preset,
    Registry,
    architecture_of,
)

__all__ = [
    "CONNECTORS", "LANGUAGE", "MODELS", "VISION", "Architecture", "Preset", "Registry", "architecture_of",
    "register_architectures",
]  # fmt: skip


def register_architectures() -> None:
    """Register what each folder of the three rooms brings."""
    for room in ("towers", "connectors", "decoders"):
        for folder in importlib.import_module(f"megavlm.architectures.{room}").FOLDERS:
            importlib.import_module(f"megavlm.architectures.{room}.{folder}").register()
