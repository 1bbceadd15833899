"""Names of two vision transformers' weights in published checkpoints."""

from __future__ import annotations

import dataclasses

from megavlm.architectures.pair_tables import low_table
from megavlm.architectures.towers.vit.tables import COGVLM_VISION, EVA02_VISION
from megavlm.weights.rules import Row, Table, row

_LOW = low_table(COGVLM_VISION)
COGAGENT_LOW = dataclasses.replace(_LOW, rest=(*_LOW.rest, row("low.feature_embedding", "pos_embed")))
"""CogAgent's first tower: CogVLM's, and the table that is added to its features."""


def _high(table: Table) -> Table:
    """Return a table of a tower for the second one of a pair."""
    rest = tuple(Row(tuple(f"high.{name}" for name in one.ours), one.theirs, one.reshape) for one in table.rest)
    return dataclasses.replace(table, ours="high." + table.ours, rest=rest)


_HIGH = _high(EVA02_VISION)
COGAGENT_HIGH = dataclasses.replace(
    _HIGH, rest=(*_HIGH.rest, row("high.feature_embedding", "{cross}pos_embed")), prefix="model.cross_vision.vit.model."
)
"""Its second one: EVA02's, by the words of its authors, and a table likewise, at ``cross``."""
