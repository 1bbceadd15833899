"""The architectures of this package: the folders that ``towers``, ``connectors`` and ``decoders`` name.

What a registry of them is: :mod:`megavlm.config.architecture`.
"""

from __future__ import annotations

import importlib


def register() -> None:
    """Register what each folder of the three rooms brings."""
    for room in ("towers", "connectors", "decoders"):
        for folder in importlib.import_module(f"megavlm.architectures.{room}").FOLDERS:
            importlib.import_module(f"megavlm.architectures.{room}.{folder}").register()
