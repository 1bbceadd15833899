"""What a user types and which pictures it shows, as turns of a conversation."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TextIO

from megavlm.config.errors import MissingFileError, UserError
from megavlm.data.films.container import FRAME_RATE, in_order, write_frames
from megavlm.data.films.film import Film
from megavlm.data.films.plan import FilmError
from megavlm.data.films.source import FilePart
from megavlm.data.images import ImageError, read_header
from megavlm.data.schema import (
    CONTROL_TOKENS,
    FILM_PLACEHOLDER,
    IMAGE_PLACEHOLDER,
    Turn,
    check_unicode,
    shown_films,
)

MARK = "<img>"
"""In typed text: here stands the next picture."""
FILM_MARK = "<video>"
"""In typed text: here stands the next film."""
Visual = bytes | Film
"""A picture's file, or a film."""
LARGEST_FILE = 64 << 20
"""Bytes of an image file that are still read."""


def user_turn(text: str, images: int, films: int = 0) -> Turn:
    """Return a user's turn that shows ``images`` pictures and ``films`` films.

    Pictures stand where ``<img>`` is written; without it, in front of the text as "Picture 1: ...", Qwen-VL's form.
    Films stand where ``<video>`` is written; without it, in front of the text, behind the pictures.

    Raises:
        UserError: there are more or fewer ``<img>`` than pictures, or ``<video>`` than films, no text, or it is not
            Unicode.
    """
    check_unicode(text, "the prompt")
    if not text.strip():
        raise UserError("the prompt is empty; write something to be answered")
    if "</img>" in text:
        raise UserError("the prompt holds </img>; write <img> alone where a picture stands")
    marks = text.count(MARK)
    if marks and marks != images:
        raise UserError(f"the prompt has {marks} <img>, and {images} picture(s) are given; they must be equally many")
    here = text.count(FILM_MARK) if films else 0  # a text about HTML may have it
    if here and here != films:
        raise UserError(f"the prompt has {here} {FILM_MARK}, and {films} film(s) are given; they must be equally many")
    text = text.replace(FILM_MARK, FILM_PLACEHOLDER) if here else FILM_PLACEHOLDER * films + text
    if marks:
        return Turn("user", text.replace(MARK, IMAGE_PLACEHOLDER))
    lines = [f"Picture {k + 1}: {IMAGE_PLACEHOLDER}\n" for k in range(images)]
    return Turn("user", "".join(lines) + text)


def in_their_order(turns: Sequence[Turn], images: Sequence[bytes], films: Sequence[Film]) -> tuple[Visual, ...]:
    """Return pictures and films as turns show them.

    Raises:
        UserError: The turns show more or fewer.
    """
    kinds = shown_films(turns)
    if (kinds.count(False), kinds.count(True)) != (len(images), len(films)):
        raise UserError(
            f"the prompt shows {kinds.count(False)} picture(s) and {kinds.count(True)} film(s); {len(images)} and "
            f"{len(films)} are given"
        )
    pictures, rest = iter(images), iter(films)
    return tuple(next(rest) if film else next(pictures) for film in kinds)


def system_turns(message: str | None) -> tuple[Turn, ...]:
    """Return the turn of a system message that was given; None gives none, and the recipe's is taken.

    Raises:
        UserError: it is not Unicode text.
    """
    if message is None:
        return ()
    check_unicode(message, "--system")
    return (Turn("system", message),)


def write_any_text(stream: TextIO) -> None:
    """Let a stream write any answer: what its encoding has not becomes a question mark, and no error."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")


def read_image(path: Path) -> bytes:
    """Return an image file whose header is sound.

    Raises:
        MissingFileError: there is none.
        UserError: it is too large, or no image.
    """
    if not path.is_file():
        raise MissingFileError(f"{path}: no such file or directory")
    if path.stat().st_size > LARGEST_FILE:
        raise UserError(f"{path}: larger than {LARGEST_FILE >> 20} MiB; give a smaller picture")
    data = path.read_bytes()
    try:
        read_header(data)
    except ImageError as error:
        raise UserError(f"{path}: no picture that can be read: {error}") from None
    return data


def read_film(path: Path) -> Film:
    """Return a film: a file, which is read as far as it is needed, or a folder of frames, in the order of their names.

    Raises:
        MissingFileError: There is none.
        UserError: It is no film that can be read.
    """
    if not path.exists():
        raise MissingFileError(f"{path}: no such file or directory")
    try:
        if path.is_dir():
            names = in_order([one.name for one in path.iterdir() if one.is_file() and not one.name.startswith(".")])
            made = io.BytesIO()
            write_frames([path / name for name in names], FRAME_RATE, made)
            film = Film(made.getvalue())
        else:
            film = Film(FilePart(str(path.resolve()), 0, path.stat().st_size))
        return Film(film.data, film.index().to_bytes())
    except FilmError as error:
        raise UserError(f"{path}: no film that can be read: {error}") from None


def without_control_tokens(answer: str, names: Iterable[str] = ()) -> str:
    """Return an answer as a later prompt may hold it: a poor model may write control tokens as text.

    Args:
        answer: what the model said.
        names: further control tokens, of the model's own tokenizer.
    """
    pattern = re.compile("|".join(map(re.escape, (*CONTROL_TOKENS, "<img>", "</img>", FILM_PLACEHOLDER, *names))))
    left = pattern.sub("", answer)
    while left != answer:  # what was around one may make up another
        answer, left = left, pattern.sub("", left)
    return left.strip()
