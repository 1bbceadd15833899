"""Kinds of plans by name: what recipes call them, and which keys of their branch each looks at.

One registry has the image plans (``model.image``, :mod:`megavlm.data.media`), another the film plans (``model.video``,
:mod:`megavlm.data.films.plan`).
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from megavlm.config.errors import UserError

if TYPE_CHECKING:
    from megavlm.config.schema import ModelConfig

P = TypeVar("P")
"""An image plan, or a film plan."""


@dataclass(frozen=True)
class PlanKind(Generic[P]):
    """A kind of plan that recipes may name."""

    name: str
    plan: type[P]
    build: Callable[[ModelConfig], P]
    """Makes the plan of a model; what is wrong with the keys it says by :class:`UserError`."""
    keys: tuple[str, ...] = ()
    """Keys of the branch that it looks at, besides those that all do."""


@dataclass
class PlanKinds(Generic[P]):
    """The kinds that a branch of ``model`` may name as its ``kind``."""

    branch: str
    """``image`` or ``video``."""
    what: str
    """What messages call such a plan."""
    modules: tuple[str, ...]
    """Those of this package that register kinds."""
    common: tuple[str, ...] = ()
    """Keys that every kind looks at."""
    no_plan: str = ""
    """The kind that is none, and looks at no key; empty where there must be a plan."""
    known: dict[str, PlanKind[P]] = field(default_factory=dict)

    def register(self, name: str, plan: type[P], build: Callable[[ModelConfig], P], keys: Sequence[str] = ()) -> None:
        """Add a kind.

        Raises:
            UserError: The name is taken.
        """
        if name in self.known or name == self.no_plan:
            raise UserError(f"{self.what} {name!r} is registered twice")
        self.known[name] = PlanKind(name, plan, build, tuple(keys))

    def all(self) -> dict[str, PlanKind[P]]:
        """Return the registered kinds by name."""
        for module in self.modules:
            importlib.import_module(module)
        return dict(self.known)

    def chosen(self, model: ModelConfig) -> PlanKind[P] | None:
        """Return the kind that a model names; None for :attr:`no_plan`.

        Raises:
            UserError: There is no such kind, or it does not look at a key that is given; the message starts with the
                key.
        """
        own: Any = getattr(model, self.branch)
        kinds, where = self.all(), f"model.{self.branch}"
        if own.kind not in kinds and own.kind != self.no_plan:
            there = ", ".join(sorted([*kinds, *([self.no_plan] if self.no_plan else [])]))
            raise UserError(f"{where}.kind: no {self.what} {own.kind!r}; there are {there}")
        kind = kinds.get(own.kind)
        used = ("kind",) if kind is None else ("kind", *self.common, *kind.keys)
        defaults = type(own)()
        for one in dataclasses.fields(own):
            if one.name in used or getattr(own, one.name) == getattr(defaults, one.name):
                continue
            takers = [other.name for other in kinds.values() if one.name in (*self.common, *other.keys)]
            others = f" ({', '.join(takers)} {'has' if len(takers) == 1 else 'have'} it)" if takers else ""
            raise UserError(
                f"{where}.{one.name}: {own.kind} does not have this key{others}; leave it out, or set {where}.kind"
            )
        return kind
