"""What ``lora.targets`` may name, read off a table of weights."""

from __future__ import annotations

from megavlm.config.lora import LINEARS, Target
from megavlm.weights.rules import Table


def targets_in(table: Table) -> tuple[Target, ...]:
    """Return the linear layers that a language model's table names, in its order.

    Several that are one layer here are its parts: queries, keys and values, or gate and up.
    """
    found = []
    for row in table.layer:
        linear = row.ours[0].removesuffix(".weight")
        if len(row.ours) == 1 and row.ours[0].endswith(".weight") and linear in LINEARS:
            names = [name.removesuffix(".weight") for name in row.theirs]
            found += [Target(name, linear, part, len(names)) for part, name in enumerate(names)]
    return tuple(found)
