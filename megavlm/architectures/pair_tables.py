"""Names of either one of two towers (:mod:`megavlm.architectures.pair`) in published checkpoints."""

from __future__ import annotations

import dataclasses
from typing import Any

from megavlm.architectures.towers.vit.tables import TRANSFORMERS_VISION
from megavlm.weights.rules import Heads, Reshape, Row, Table

LOW, HIGH = "low.", "high."


def low_table(table: Table) -> Table:
    """Return a table of a tower for the first one of a pair."""
    rest = tuple(Row(tuple(LOW + name for name in one.ours), one.theirs, one.reshape) for one in table.rest)
    return dataclasses.replace(table, ours=LOW + table.ours, rest=rest)


def high_table(table: Table, high: Any) -> Table:
    """Return a table of a tower for the second one of a pair: its layers are written out.

    Args:
        table: of the tower where it stands alone.
        high: its keys: it has other heads than the first one, and not as many layers.
    """
    heads = Heads(high.num_attention_heads, high.num_attention_heads, high.hidden_size // high.num_attention_heads)
    rows = [Row(tuple(HIGH + name for name in one.ours), one.theirs, one.reshape) for one in table.rest]
    for number in range(high.num_layers):
        ours, theirs = HIGH + table.ours.format(number), table.theirs.replace("{}", str(number))
        rows += [
            Row(
                tuple(ours + name for name in one.ours),
                tuple(theirs + name for name in one.theirs),
                _of_heads(one.reshape, heads),
            )
            for one in table.layer
        ]
    # What stands behind the layers is counted by those of the first tower.
    aside = tuple(
        dataclasses.replace(one, pattern=one.pattern.replace(r"(\d+)", str(high.num_layers)), behind=False)
        if one.behind
        else one
        for one in table.aside
    )
    return dataclasses.replace(table, ours="", theirs="", layer=(), rest=tuple(rows), aside=aside)


def _of_heads(reshape: Reshape, heads: Heads) -> Reshape:
    return Reshape(reshape.name, lambda x, _: reshape.to_ours(x, heads), lambda x, _: reshape.to_theirs(x, heads))


LOW_TRANSFORMERS_VISION = low_table(TRANSFORMERS_VISION)
"""CLIP's and SigLIP's."""
