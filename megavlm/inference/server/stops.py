"""Stop strings in text that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopScanner:
    """Cuts a text before the first stop string, and holds back what may be the beginning of one.

    Args:
        stops: the strings; none may be empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.held = ""
        self.hit = False

    def feed(self, text: str, last: bool = False) -> str:
        """Return what may be shown now that ``text`` has come; ``last`` releases what was held back."""
        if self.hit:
            return ""
        text = self.held + text
        found = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        if found:
            self.hit, self.held = True, ""
            return text[: min(found)]
        keep = 0 if last else max((self._overlap(text, stop) for stop in self.stops), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Characters at the end of ``text`` with which ``stop`` begins."""
        longest = min(len(text), len(stop) - 1)
        return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
