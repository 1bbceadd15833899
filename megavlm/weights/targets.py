"""What ``lora.targets`` may name, read off a table of weights."""

from __future__ import annotations

from megavlm.config.lora import Target, linear_of
from megavlm.weights.rules import Table


def targets_in(table: Table) -> tuple[Target, ...]:
    """Return the linear layers that a language model's table names, in its order.

    Several that are one layer here are its parts: queries, keys and values, or gate and up. Of experts the number is
    left out.
    """
    found = []
    for row in table.layer:
        linear = linear_of(row.ours[0])
        if len(row.ours) == 1 and linear is not None:
            names = [name.removesuffix(".weight").replace(".{}", "") for name in row.theirs]
            found += [Target(name, linear, part, len(names)) for part, name in enumerate(names)]
    return tuple(found)
