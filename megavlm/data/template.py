"""A chat template as data: what stands around the turns of a conversation, and what of it is trained on.

A row (``megavlm.data.templates``) is written in pieces: text that is always the same, and :data:`TEXT` where a turn's
own text goes. ``trained(...)`` marks what the loss counts. Ids come from ``megavlm.data.chat``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar

from megavlm.config.errors import UserError
from megavlm.data.schema import FILM_PLACEHOLDER, IMAGE_PLACEHOLDER, VISUAL, Turn

TEXT = "\0text"
"""In a row: here stands the turn's own text. U+0000 is in no template."""
SYSTEM = "\0system"
"""In the pieces of a first turn: here stands the text of the system turn."""
IMAGES = "\0images"
"""In a row: here stand the images of the turn, and its words are left out."""


_SLOTS = ("<image>", "<imgpad>", "<|image_pad|>")
_PICTURE = re.compile(
    rf"(?:Picture (?:\d+): ?{re.escape(IMAGE_PLACEHOLDER)}|Video (?:\d+): ?{re.escape(FILM_PLACEHOLDER)})\n?"
)
"""How records and prompts (``megavlm prepare``, ``generate``, ``serve``) show a picture or film without a place in the
text."""


class TemplateError(UserError):
    """A conversation that a template has no form for, or a template that does not do."""


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
    weight: float = 1.0
    """What the losses of its tokens are multiplied by, where it is trained."""


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

    renders: ClassVar[bool] = False
    """Whether spans are a rendered text, in which the turns' own cannot be told apart any more."""
    name: str
    """What ``model.template`` calls it."""
    title: str
    """In a few words, for lists."""
    begin: tuple[str, ...] = ()
    """Pieces in front of every conversation, such as the token that begins a document."""
    system: tuple[str, ...] = ()
    """Pieces of a system turn; none where the template has no such turn."""
    user: tuple[str, ...]
    """Pieces of a user's turn."""
    user_with_system: tuple[str, ...] = ()
    """Pieces of the first user's turn behind a system turn, with :data:`SYSTEM`, where that stands inside of it."""
    assistant: tuple[str, ...]
    """Pieces of an answer. A prompt ends with those in front of the first trained piece that leads to the text."""
    last_assistant: tuple[str, ...] = ()
    """Pieces of the last answer and of what a prompt ends with, where they are others."""
    tokens: tuple[ControlToken, ...] = ()
    """Control tokens in the pieces, and around an image."""
    slot: ControlToken = field(default_factory=lambda: ControlToken(_SLOTS, appended=True))
    """The token that fills the slots of an image."""
    image: tuple[str, str] = ("", "")
    """What stands before and behind the slots of an image."""
    picture: str = "{image}\n"
    """How a picture is shown that was given without a place in the text: ``{image}``, and ``{number}`` from 1."""
    gap: str = ""
    """What stands in front of a question that does not begin with a picture, such as the space behind ``User:``."""
    images_first: bool = False
    """Whether all images stand in front of the conversation, wherever its text shows them."""
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
    stop_ids: tuple[int, ...] = ()
    """Ids of others, where a checkpoint says no name."""
    stop_text: str = ""
    """Text that ends an answer, where its tokens are always the same (a newline); of several the first ends it."""
    ends: str = ""
    """Control token that the loss wants behind an answer where the template writes none, in the place of what does
    stand there."""
    default_system: str = ""
    """System turn of conversations that have none, where the recipe names none either."""
    most_exchanges: int | None = None
    """Questions and answers that one conversation may hold; None for any number."""
    boxes: str = ""
    """The notation of boxes that its models are taught (:mod:`megavlm.data.box_words`); none where it is shared by
    models of several, which say it by their family. It changes no token."""
    joined: bool = True
    """Whether text is cut into tokens as one string, as families do that render a conversation first; else piece by
    piece, as Qwen-VL's trainer does."""

    def spans(self, turns: Sequence[Turn], *, prompt: bool = False) -> list[Span]:
        """Return a conversation as spans; a ``prompt`` ends with what leads to an answer.

        Raises:
            TemplateError: the template has no form for such a conversation.
        """
        turns, system = self._checked(list(turns))
        found = [Span(piece) for piece in self.begin]
        if self.images_first:
            shown = "".join(one for turn in turns for one in VISUAL.findall(turn.text))
            found += [Span(shown)] if shown else []
            turns = [replace(turn, text=_words(turn.text)) for turn in turns]
        last = max((i for i, turn in enumerate(turns) if turn.role == "assistant"), default=-1)
        last = -1 if prompt or not self.last_assistant else last
        for i, turn in enumerate(turns):
            pieces = {"system": self.system, "user": self.user, "assistant": self.assistant}[turn.role]
            if i == last:
                pieces = self.last_assistant
            elif i == 0 and system is not None:
                pieces = self.user_with_system
            gap = self.gap if turn.role == "user" and not VISUAL.match(turn.text) else ""
            found += self._written(pieces, turn.text, system or "", turn.weight, gap)
        return found + [Span(piece) for piece in self.lead] if prompt else found

    def check_training(self) -> None:
        """Check that the label mask of any conversation is known, as it is of a row.

        Raises:
            TemplateError: it is not.
        """

    @property
    def fingerprint(self) -> str:
        """Name and a digest of all that decides which tokens a conversation becomes."""
        return self._digest({})

    @property
    def former_fingerprints(self) -> frozenset[str]:
        """What saved states may have as :attr:`fingerprint`, from versions that made it otherwise."""
        return frozenset()

    def _digest(self, instead: Mapping[str, str | None]) -> str:
        """Return name and digest, with other texts for some fields; None leaves one out."""
        texts = {one.name: repr(getattr(self, one.name)) for one in fields(self) if one.name not in instead}
        if not self.gap:  # younger than saved states
            texts.pop("gap", None)
        texts |= {name: text for name, text in instead.items() if text is not None}
        content = {name: text for name, text in texts.items() if name not in ("name", "title", "boxes")}
        return f"{self.name} {hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]}"

    @property
    def lead(self) -> tuple[str, ...]:
        """The pieces in front of an answer, with which a prompt ends."""
        pieces = self.last_assistant or self.assistant
        before = pieces[: pieces.index(TEXT)]
        while before and isinstance(before[-1], Trained):
            before = before[:-1]
        return before

    @property
    def answer_prefix(self) -> str:
        """What a model says in front of an answer's own text, such as the space behind ``ASSISTANT:``."""
        pieces = self.last_assistant or self.assistant
        return "".join(pieces[len(self.lead) : pieces.index(TEXT)])

    @property
    def trains_answers_only(self) -> bool:
        """Whether the first token that the loss counts is the first of an answer."""
        before = (*self.begin, *self.system, *self.user, *self.user_with_system, *self.lead)
        return not any(isinstance(piece, Trained) for piece in before)

    def placed(self, text: str) -> str:
        """Return a turn's text with its pictures as this template shows those that have no place in the text.

        Records and prompts call them ``Picture 1: ``, Qwen-VL's form; a template with a form of its own writes that. So
        it is with films, ``Video 1: ``.
        """
        if "{number}" in self.picture:
            return text
        text, changed = _PICTURE.subn(lambda found: self.picture.format(image=VISUAL.findall(found[0])[0]), text)
        for placeholder in (IMAGE_PLACEHOLDER, FILM_PLACEHOLDER) if changed else ():
            shown = self.picture.format(image=placeholder)
            if text.endswith(shown):
                return text.removesuffix(shown) + shown.rstrip("\n")
        return text

    def question(self, text: str) -> str:
        """Return the last user's own words, of a prompt's text that this template wrote.

        Tokenizers that put a space before text write one behind each special token.
        """
        at = next((i for i, piece in enumerate(self.user) if piece in (TEXT, IMAGES)), len(self.user))
        before, after = self.user[:at] or self.begin, (*self.user[at + 1 :], *self.lead)
        if SYSTEM in self.user_with_system:
            behind = self.user_with_system[self.user_with_system.index(SYSTEM) + 1]
            text = text.rpartition(behind)[2] if behind.strip() and behind in text else text
        starts = [found.end() for found in re.finditer(_spaced(before), text)] if before else []
        text = text[max(starts, default=0) :]
        end = re.search(" ?" + _spaced(after) + r"\s*\Z", text)
        return text[: end.start()] if end else text

    def _checked(self, turns: list[Turn]) -> tuple[list[Turn], str | None]:
        """Return the turns without a system turn that goes into the first user's, and its text.

        Raises:
            TemplateError: the template has no form for them.
        """
        exchanges = sum(turn.role == "user" for turn in turns)
        if self.most_exchanges is not None and exchanges > self.most_exchanges:
            raise TemplateError(
                f"model.template: {self.name} holds {self.most_exchanges} question and answer, the conversation has "
                f"{exchanges}; name another template"
            )
        if not turns or turns[0].role != "system" or self.system:
            return turns, None
        if not self.user_with_system or len(turns) < 2 or turns[1].role != "user":
            raise TemplateError(
                f"model.template: {self.name} has no system turn; leave it out (data.system_message: null), or name "
                "another template"
            )
        return turns[1:], turns[0].text

    def _written(self, pieces: Sequence[str], text: str, system: str, weight: float, gap: str) -> Iterator[Span]:
        own = {TEXT: text, SYSTEM: system, IMAGES: "".join(VISUAL.findall(text))}
        for piece in pieces:
            trained = isinstance(piece, Trained)
            if gap and piece == TEXT:
                yield Span(gap, trained, weight=weight if trained else 1.0)
            yield Span(own.get(piece, piece), trained, piece not in own, weight if trained else 1.0)


def _spaced(pieces: Sequence[str]) -> str:
    """Return a pattern of pieces, between which a space may stand."""
    return " ?".join(re.escape(piece.rstrip(" ")) for piece in pieces) + " ?"


def _words(text: str) -> str:
    """Return a text without its images, and without the white space that stood around them."""
    return VISUAL.sub("", text).strip() if VISUAL.search(text) else text
