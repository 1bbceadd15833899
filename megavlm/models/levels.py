"""Connectors of a deepstack: one for each tower layer whose features are added behind a language layer (Qwen3-VL).

The tower gives the features of its last layer and of those layers side by side. The levels' connectors are children of
the model's connector, and so are frozen, trained, saved and cut over ranks with it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from megavlm.architectures.context import BuildContext
from megavlm.config.architecture import architecture_of
from megavlm.config.schema import ModelConfig

LEVELS = "deepstack"
"""Name of the levels' connectors in the model's."""


def make_connector(model: ModelConfig, context: BuildContext) -> Any:
    """Build a model's connector, with those of its levels."""
    make = architecture_of(model, "connector").make
    connector = make(model, context)
    if model.vision.deepstack:
        level = replace(model, connector=model.connector.level)
        connector.add_module(LEVELS, nn.ModuleList(make(level, context) for _ in range(model.vision.deepstack)))
    return connector


def connect(connector: Any, features: Tensor) -> Tensor:
    """Return what a connector makes of features [.., W], or, with R levels, of [.., (1 + R) * W]: [.., (1 + R) * E]."""
    levels = getattr(connector, LEVELS, None)
    if levels is None:
        found: Tensor = connector(features)
        return found
    parts = features.chunk(1 + len(levels), dim=-1)
    return torch.cat([one(part) for one, part in zip((connector, *levels), parts, strict=True)], dim=-1)
