"""What the connector makes of a tower's features, beside what stands alone: levels, and features that go past it.

Connectors of a deepstack: one for each tower layer whose features are added behind a language layer (Qwen3-VL).

The tower gives the features of its last layer and of those layers side by side. The levels' connectors are children of
the model's connector, and so are frozen, trained, saved and cut over ranks with it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
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
    connector.past = math.prod(model.vision.features_past)
    if model.vision.deepstack:
        level = replace(model, connector=model.connector.level)
        connector.add_module(LEVELS, nn.ModuleList(make(level, context) for _ in range(model.vision.deepstack)))
    return connector


def connect(connector: Any, features: Tensor, grid: Tensor | None = None) -> Tensor:
    """Return what a connector makes of features [.., W], or, with R levels, of [.., (1 + R) * W]: [.., (1 + R) * E].

    Where a tower has X more numbers of each of its patches, which layers attend to (``VisionTraits.features_past``),
    they stand behind the connector's, [.., E + X], in the first rows; those that it has beyond the patches get zeros.

    Args:
        connector: the connector; one that ``takes_grid`` gets the grid too.
        features: of the tower.
        grid: [V, 3] int64 on the host, of pictures that have sizes of their own.
    """
    levels = getattr(connector, LEVELS, None)
    past = getattr(connector, "past", 0)
    if past:
        features, beside = features.split([features.size(-1) - past, past], dim=-1)
        made = connector(features.contiguous())  # a view would hold all of them until the backward pass
        missing = made.size(0) - beside.size(0)
        assert missing >= 0, "every patch has a row"
        return torch.cat([made, F.pad(beside, (0, 0, 0, 0, 0, missing))], dim=-1)
    parts = [features] if levels is None else features.chunk(1 + len(levels), dim=-1)
    more = (grid,) if getattr(connector, "takes_grid", False) else ()
    found = [one(part, *more) for one, part in zip((connector, *(levels or ())), parts, strict=True)]
    return found[0] if levels is None else torch.cat(found, dim=-1)
