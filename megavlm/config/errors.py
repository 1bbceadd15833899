"""The error that a wrong recipe raises."""

from __future__ import annotations

from collections.abc import Sequence

MAX_LINES = 5


class RecipeError(ValueError):
    """A recipe breaks a rule. Each line of the text names the key, the rule, and what to change."""

    @classmethod
    def of(cls, lines: Sequence[str]) -> RecipeError:
        """Make one error of all ``lines``, and show the first few."""
        shown = list(lines[:MAX_LINES])
        if len(lines) > MAX_LINES:
            shown[-1] += f" (and {len(lines) - MAX_LINES} more)"
        return cls("\n".join(shown))
