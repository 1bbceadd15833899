"""The rules between keys, each asked once for all layouts that are alike in what it looks at."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from megavlm.config.checks import rules_of
from megavlm.config.schema import ParallelConfig, Recipe
from megavlm.planning.layout import with_branch

_NAMES = tuple(field.name for field in dataclasses.fields(ParallelConfig))
_SEEN = "_seen"


class Rules:
    """What the rules between keys have against layouts of one recipe on so many GPUs.

    A rule goes by the keys that it reads. What it said once holds for each layout that has the same values of those.
    """

    def __init__(self, gpus: int) -> None:
        self._rules = [AskedRule(rule) for rule in rules_of(gpus)]

    def broken(self, recipe: Recipe) -> list[str]:
        """Return a line for each broken rule, as ``check_recipe`` has it.

        Raises:
            RecipeError: a rule raises it by itself.
        """
        return [line for rule in self._rules for line in rule.lines(recipe)]


class AskedRule:
    """One rule and what it said.

    Args:
        rule: gives its lines for a recipe.
    """

    def __init__(self, rule: Callable[[Recipe], Iterable[str]]) -> None:
        self._rule = rule
        # By the keys that it read, and their values. It reads others where what it read first tells it to.
        self._said: dict[tuple[str, ...], dict[tuple[Any, ...], tuple[str, ...]]] = {}

    def lines(self, recipe: Recipe) -> tuple[str, ...]:
        """Return a line for each time that a recipe breaks it; the recipes differ in ``parallel`` alone."""
        values = vars(recipe.parallel)
        for names, said in self._said.items():
            lines = said.get(tuple([values[name] for name in names]))
            if lines is not None:
                return lines
        seen: set[str] = set()
        watched = object.__new__(_NotedParallel)
        object.__getattribute__(watched, "__dict__").update(values, **{_SEEN: seen})
        lines = tuple(self._rule(with_branch(recipe, parallel=watched)))
        names = tuple(name for name in _NAMES if name in seen)
        self._said.setdefault(names, {})[tuple([values[name] for name in names])] = lines
        return lines


class _NotedParallel(ParallelConfig):
    """A ``parallel`` branch that notes which of its keys are read. Its copies note them in the same place."""

    def __getattribute__(self, name: str) -> Any:
        own = object.__getattribute__(self, "__dict__")
        if _SEEN in own:
            if name == "__dict__":
                own[_SEEN].update(_NAMES)
            elif name in own:
                own[_SEEN].add(name)
        return object.__getattribute__(self, name)

    def __copy__(self) -> _NotedParallel:
        found = object.__new__(_NotedParallel)
        object.__getattribute__(found, "__dict__").update(object.__getattribute__(self, "__dict__"))
        return found

    def __eq__(self, other: object) -> bool:
        return ParallelConfig(**{name: getattr(self, name) for name in _NAMES}) == other

    def __hash__(self) -> int:
        return hash(ParallelConfig(**{name: getattr(self, name) for name in _NAMES}))
