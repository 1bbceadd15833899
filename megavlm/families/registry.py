"""The families that are registered, by name. Imports no torch: a family's own file is imported when asked for.

Those of this package are named in :mod:`megavlm.families.known`. Another package adds one with ``FAMILIES.register``,
from the function that its ``megavlm.presets`` entry point names.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from megavlm.config import architecture
from megavlm.config.errors import UserError

if TYPE_CHECKING:
    from megavlm.families.family import Family


class Families(Mapping[str, "Family"]):
    """Families by name, in the order in which they were registered, which is the one they are asked in."""

    def __init__(self) -> None:
        self._places: list[str] = []
        self._families: dict[str, Family] = {}

    def register(self, place: str) -> None:
        """Add a family.

        Args:
            place: "module:Class", a :class:`megavlm.families.family.Family`; imported when families are asked for.

        Raises:
            UserError: it is registered already.
        """
        if place in self._places:
            raise UserError(f"family {place!r} is registered twice; remove one of the two")
        self._places.append(place)

    def __getitem__(self, name: str) -> Family:
        return self._loaded()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaded())

    def __len__(self) -> int:
        return len(self._loaded())

    def _loaded(self) -> dict[str, Family]:
        """Return all of them, those imported that were not yet.

        Raises:
            UserError: two have one name.
        """
        architecture.load()
        for place in self._places[len(self._families) :]:
            module, _, name = place.partition(":")
            family: Family = getattr(importlib.import_module(module), name)()
            if family.name in self._families:
                raise UserError(f"family {family.name!r} is registered twice, by {place} too; rename one of the two")
            self._families[family.name] = family
        return self._families


FAMILIES = Families()
