"""A chat template as data: what stands around the turns of a conversation, and what of it is trained on.

A row (``megavlm.data.templates``) is written in pieces: text that is always the same, and :data:`TEXT` where a turn's
own text goes. ``trained(...)`` marks what the loss counts. Ids come from ``megavlm.data.chat``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from megavlm.data.schema import Turn

TEXT = "\0text"
"""In a row: here stands the turn's own text. U+0000 is in no template."""


_SLOTS = ("<image>", "<imgpad>", "<|image_pad|>")


class Trained(str):
    """A piece that the loss counts."""

    __slots__ = ()


def trained(*pieces: str) -> tuple[Trained, ...]:
    """Mark pieces as trained on."""
    return tuple(Trained(piece) for piece in pieces)


@dataclass(frozen=True)
class Span:
    """A stretch of a conversation's text."""

    text: str
    trained: bool = False
    """Whether the loss counts it."""
    markup: bool = True
    """Whether the template wrote it; else a turn did, and it must hold no control token."""


@dataclass(frozen=True)
class ControlToken:
    """A token that a template writes, by all names that it goes by."""

    names: tuple[str, ...]
    """The first that a tokenizer has is meant. The very first is what the row's pieces call it."""
    appended: bool = False
    """Whether it is put behind the ids of a tokenizer that has none of these names; else that is an error."""

    @property
    def name(self) -> str:
        """What rows call it."""
        return self.names[0]


@dataclass(frozen=True, kw_only=True)
class Template:
    """How the conversations of a model are written."""

    name: str
    """What ``model.template`` calls it."""
    title: str
    """In a few words, for lists."""
    system: tuple[str, ...]
    """Pieces of a system turn."""
    user: tuple[str, ...]
    """Pieces of a user's turn."""
    assistant: tuple[str, ...]
    """Pieces of an answer. A prompt ends with those in front of the first trained piece that leads to the text."""
    tokens: tuple[ControlToken, ...] = ()
    """Control tokens in the pieces, and around an image."""
    slot: ControlToken = field(default_factory=lambda: ControlToken(_SLOTS, appended=True))
    """The token that fills the slots of an image."""
    image: tuple[str, str] = ("", "")
    """What stands before and behind the slots of an image."""
    picture: str = "{image}\n"
    """How a picture is shown that was given without a place in the text: ``{image}``, and ``{number}`` from 1."""
    eos: tuple[str, ...] = (
        "<|endoftext|>",
        "<|end_of_text|>",
        "</s>",
        "<eos>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
    )
    """Names of the token that ends a document, and fills packs up; the first that a tokenizer has is taken."""
    stops: tuple[str, ...] = ()
    """Control tokens that end an answer, beside the one that ends a document."""
    default_system: str = ""
    """System turn of conversations that have none, where the recipe names none either."""
    joined: bool = True
    """Whether text is cut into tokens as one string, as families do that render a conversation first; else piece by
    piece, as Qwen-VL's trainer does."""

    def spans(self, turns: Sequence[Turn], *, prompt: bool = False) -> list[Span]:
        """Return a conversation as spans; a ``prompt`` ends with what leads to an answer."""
        rows = {"system": self.system, "user": self.user, "assistant": self.assistant}
        found = [_span(piece, turn.text) for turn in turns for piece in rows[turn.role]]
        if prompt:
            found += [_span(piece, "") for piece in self.lead]
        return found

    @property
    def lead(self) -> tuple[str, ...]:
        """The pieces in front of an answer, with which a prompt ends."""
        before = self.assistant[: self.assistant.index(TEXT)]
        while before and isinstance(before[-1], Trained):
            before = before[:-1]
        return before


def _span(piece: str, text: str) -> Span:
    own = piece == TEXT
    return Span(text if own else piece, isinstance(piece, Trained), not own)
