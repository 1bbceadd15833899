"""The text of an answer whose tokens come one by one."""

from __future__ import annotations

from collections.abc import Sequence

from megavlm.data.tokenizer import Tokenizer

_BROKEN = "\ufffd"
"""What the bytes of a character that is not whole yet decode to."""


class AnswerText:
    """Turns tokens into text as they come; what it gives adds up to the text of the whole answer.

    Only the last tokens are decoded, so that a token costs the same however long the answer is. They are decoded
    together with those before them, as text depends on what stands to its left: SentencePiece takes a space off its
    beginning, and a character may be several tokens.

    Args:
        tokenizer: of the tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: list[int] = []
        """The tokens of the last whole text, which has been given."""
        self._new: list[int] = []
        """Tokens since, whose text ends within a character."""
        self._prefix = tokenizer.template.answer_prefix
        """What the template has in front of an answer, until the first text has come."""

    def add(self, token: int) -> str:
        """Return the text that a token completes; it may be empty."""
        self._new.append(token)
        text = self._text(self._new)
        if text.endswith(_BROKEN):
            return ""
        self._known, self._new = self._new, []
        return self._own(text)

    def rest(self) -> str:
        """Return what is left at the answer's end."""
        text = self._text(self._new) if self._new else ""
        self._known, self._new = [*self._known, *self._new], []
        return self._own(text)

    def would_add(self, token: int) -> str:
        """Return the text of a token if it came next, by itself where it completes a character."""
        return self._text([*self._new, token])

    def _own(self, text: str) -> str:
        """Return the answer's own text of what comes next, without what the template has in front of it."""
        if text:
            text, self._prefix = text.removeprefix(self._prefix), ""
        return text

    def _text(self, new: list[int]) -> str:
        before = self._tokenizer.decode(self._known)
        return self._tokenizer.decode([*self._known, *new])[len(before) :]


def answer_text(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """Return the text of a whole answer, without what the template has in front of it."""
    return tokenizer.decode(ids).removeprefix(tokenizer.template.answer_prefix)
