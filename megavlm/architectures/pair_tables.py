"""Names of the first one of two towers (:mod:`megavlm.architectures.pair`) in published checkpoints."""

from __future__ import annotations

import dataclasses

from megavlm.architectures.towers.vit.tables import TRANSFORMERS_VISION
from megavlm.weights.rules import Row, Table

LOW = "low."


def low_table(table: Table) -> Table:
    """Return a table of a tower for the first one of a pair."""
    rest = tuple(Row(tuple(LOW + name for name in one.ours), one.theirs, one.reshape) for one in table.rest)
    return dataclasses.replace(table, ours=LOW + table.ours, rest=rest)


LOW_TRANSFORMERS_VISION = low_table(TRANSFORMERS_VISION)
"""CLIP's and SigLIP's."""
