r"""Training records in Qwen-VL's JSON form, checked and turned into plain conversations.

A record is ``{"id": ..., "conversations": [{"from": "user", "value": "Picture 1: <img>a.jpg</img>\n..."}, ...]}``. Its
films are in a list beside the conversation, ``films``, and :data:`FILM_PLACEHOLDER` stands where each is shown.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from megavlm.config.errors import UserError

IMAGE_PLACEHOLDER = "<img></img>"
"""What stands in a turn's text where an image was."""

FILM_PLACEHOLDER = "\0film"
"""What stands in a turn's text where a film is: nobody writes U+0000, and ``<video>`` stands in many a text on HTML."""

CONTROL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<imgpad>")
"""Tokens that text must not contain: they would forge turns or image slots."""

_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_IMAGE = re.compile(r"<img>(.*?)</img>", re.DOTALL)
_IMAGE_TAG = re.compile(r"</?img>")
_BOX_TAG = re.compile(r"</?box>")
_BOX = re.compile(r"<box>\((\d{1,3}),(\d{1,3})\),\((\d{1,3}),(\d{1,3})\)</box>")
_OF_OTHER_FORMS = ("system", "image", "images", "video", "videos", "audio", "audios", "tools")
"""Keys that would be trained on without what they name."""
VISUAL = re.compile(f"{re.escape(IMAGE_PLACEHOLDER)}|{re.escape(FILM_PLACEHOLDER)}")
"""Where a text shows a picture or a film."""
MOST_RATE = 1000.0
"""Frames in a second of a folder of frames, at most."""
MOST_WEIGHT = 100.0
"""Largest weight of an answer."""
WEIGHT_KEYS = ("weight", "loss", "train")
"""Say of a turn how much it counts: OpenAI's, ms-swift's and Axolotl's names for it."""
_URL = re.compile(r"^[a-zA-Z][a-zA-Z0-9+.-]*://")


class UnsafePathError(UserError):
    """The path of an image or film that is a URL, or leaves the image directory."""

    def __init__(self, what: str, reason: str) -> None:
        """Make the error; ``what`` is ``image`` or ``film``."""
        super().__init__(reason)
        self.cause = f"unsafe {what} path"


class FilmName(NamedTuple):
    """A film as a record names it."""

    path: str = ""
    """Of the film's file, or of a folder of its frames; relative to the image directory."""
    frames: tuple[str, ...] = ()
    """Paths of its frames, in the place of :attr:`path`."""
    rate: float | None = None
    """Frames in a second, of frames."""

    def to_tree(self) -> Any:
        """Return it as records have it."""
        if not self.frames and self.rate is None:
            return self.path
        named: dict[str, Any] = {"frames": list(self.frames)} if self.frames else {"path": self.path}
        return named | ({} if self.rate is None else {"rate": self.rate})


@dataclass(frozen=True)
class Turn:
    """One message of a conversation."""

    role: str
    """``system``, ``user`` or ``assistant``."""
    text: str
    """What is said; every image is an :data:`IMAGE_PLACEHOLDER`."""
    weight: float = 1.0
    """Of an answer: what the losses of its tokens are multiplied by; 0 leaves it out of the training."""


@dataclass(frozen=True)
class Conversation:
    """A checked record."""

    id: str
    """The record's id, empty where it has none."""
    turns: tuple[Turn, ...]
    """Perhaps a system turn, then user and assistant in turns; the last is the assistant's."""
    images: tuple[str, ...]
    """Paths of the images, relative to the image directory, in order of appearance."""
    task: str
    """The record's ``task``, empty where it has none."""
    films: tuple[FilmName, ...] = ()
    """Its films, in order of appearance."""

    @property
    def shows(self) -> list[bool]:
        """Of each picture and film, in order of appearance, whether it is a film."""
        return shown_films(self.turns)


def parse_conversation(record: Any, *, answers_show: bool = False) -> Conversation:
    """Check one record.

    Args:
        record: What ``json.load`` gave for it.
        answers_show: Whether answers may show pictures, as they may where these are tokens.

    Returns:
        The conversation, its image paths taken out of the text.

    Raises:
        UserError: The record breaks a rule; the message is one line.
    """
    if not isinstance(record, dict):
        raise UserError(f"a record must be an object, not {type(record).__name__}")
    for key in _OF_OTHER_FORMS:
        if record.get(key):
            raise UserError(f"'{key}' beside the conversation is another format's; run megavlm prepare on the record")
    messages = record.get("conversations")
    if not isinstance(messages, list) or not messages:
        raise UserError("no turns: 'conversations' must be a list that is not empty")
    turns: list[Turn] = []
    images: list[str] = []
    for index, message in enumerate(messages):
        turn, paths = _parse_turn(index, message, answers_show=answers_show)
        turns.append(turn)
        images += paths
    _check_order([turn.role for turn in turns])
    films = _films(record.get("films"))
    if (places := sum(shown_films(turns))) != len(films):
        raise UserError(f"the record has {len(films)} film(s), and places for {places}")
    return Conversation(
        id=_optional_text(record, "id"),
        turns=tuple(turns),
        images=tuple(images),
        task=_optional_text(record, "task"),
        films=films,
    )


def shown_films(turns: Sequence[Turn]) -> list[bool]:
    """Return of each picture and film that turns show, in order, whether it is a film."""
    return [found == FILM_PLACEHOLDER for turn in turns for found in VISUAL.findall(turn.text)]


def _films(given: Any) -> tuple[FilmName, ...]:
    if given is None:
        return ()
    if not isinstance(given, list):
        raise UserError(f"'films' must be a list, not {type(given).__name__}")
    return tuple(_film(one, f"film {number}") for number, one in enumerate(given, 1))


def _film(given: Any, where: str) -> FilmName:
    tree = {"path": given} if isinstance(given, str) else given
    if (
        not isinstance(tree, dict)
        or not set(tree) <= {"path", "frames", "rate"}
        or ("path" in tree) == ("frames" in tree)
    ):
        raise UserError(f"{where} must be a path, or an object of 'path' or 'frames', and perhaps 'rate'")
    frames, rate = tree.get("frames", ()), tree.get("rate")
    if "frames" in tree and (not isinstance(frames, list) or not frames):
        raise UserError(f"{where}: 'frames' must be a list of paths that is not empty")
    if rate is not None and (not isinstance(rate, int | float) or isinstance(rate, bool) or not 0 < rate <= MOST_RATE):
        raise UserError(f"{where}: 'rate' must be a number of frames in a second, above 0 and at most {MOST_RATE:g}")
    paths = frames if frames else [tree["path"]]
    for path in paths:
        if not isinstance(path, str):
            raise UserError(f"{where}: a path must be text, not {type(path).__name__}")
        _check_path(path, where, "film")
    return FilmName("" if frames else paths[0], tuple(frames), None if rate is None else float(rate))


def turn_weight(message: dict[str, Any], where: str, *, answer: bool) -> float:
    """Return what a turn's losses are multiplied by: its ``weight``, ``loss`` or ``train``, a number or true or false.

    Args:
        message: The turn.
        where: What messages call it.
        answer: Whether it is the assistant's; of others only 0 or false may be said, as they are never trained on.

    Raises:
        UserError: It is no such number, or two of the keys differ.
    """
    given = {key: message[key] for key in WEIGHT_KEYS if message.get(key) is not None}
    for key, value in given.items():
        if not isinstance(value, int | float) or not 0 <= value <= MOST_WEIGHT:
            raise UserError(f"{where}: {key!r} must be true, false or a number from 0 to {MOST_WEIGHT:g}")
        if value and not answer:
            raise UserError(f"{where}: {key!r} is {value}, but only answers are trained on; leave it out there")
    if len({float(value) for value in given.values()}) > 1:
        raise UserError(f"{where}: {' and '.join(map(repr, given))} differ; keep one")
    return float(next(iter(given.values()), 1.0))


def check_unicode(text: str, where: str = "text") -> None:
    """Refuse text that no tokenizer takes: with half a surrogate pair, which stands for a byte that was not UTF-8.

    Raises:
        UserError: it is no Unicode text.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where} is not valid Unicode text at character {error.start + 1}; write it as UTF-8"
        ) from None


def check_text(text: str, where: str = "text") -> None:
    """Refuse text that is no Unicode, or would forge turns or image slots.

    Raises:
        UserError: it is such a text, or contains one of :data:`CONTROL_TOKENS`.
    """
    check_unicode(text, where)
    for token in CONTROL_TOKENS:
        if token in text:
            raise UserError(f"{where} contains the control token {token}")


def _optional_text(record: dict[str, Any], key: str) -> str:
    value = record.get(key)
    if value is None:
        return ""
    if not isinstance(value, (str, int)):
        raise UserError(f"'{key}' must be text or a number, not {type(value).__name__}")
    check_unicode(str(value), f"'{key}'")
    return str(value)


def _parse_turn(index: int, message: Any, *, answers_show: bool) -> tuple[Turn, list[str]]:
    where = f"turn {index}"
    if not isinstance(message, dict):
        raise UserError(f"{where} must be an object, not {type(message).__name__}")
    speaker = message.get("from")
    role = _ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise UserError(f"{where}: unknown role {speaker!r}; use user, assistant or system")
    text = message.get("value")
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where} ({role}) has no text")
    check_text(text, f"{where} ({role})")
    _check_boxes(text, where)
    tags = _IMAGE_TAG.findall(text)
    if tags != ["<img>", "</img>"] * (len(tags) // 2):
        raise UserError(f"{where} ({role}) has unbalanced <img> tags")
    if tags and role != "user" and not (answers_show and role == "assistant"):
        raise UserError(f"{where} ({role}) has an image; only user turns may")
    if FILM_PLACEHOLDER in text and role != "user":
        raise UserError(f"{where} ({role}) has a film; only user turns may")
    paths = [path.strip() for path in _IMAGE.findall(text)]
    for path in paths:
        _check_path(path, where)
    weight = turn_weight(message, f"{where} ({role})", answer=role == "assistant")
    return Turn(role, _IMAGE.sub(IMAGE_PLACEHOLDER, text), weight), paths


def _check_order(roles: list[str]) -> None:
    spoken = roles[1:] if roles[0] == "system" else roles
    if not spoken:
        raise UserError("no turns after the system turn")
    if spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise UserError(f"roles must alternate user, assistant and end with assistant, not {', '.join(roles[:8])}")


def _check_boxes(text: str, where: str) -> None:
    boxes = [tuple(map(int, corners)) for corners in _BOX.findall(text)]
    for left, top, right, bottom in boxes:
        if left > right or top > bottom:
            raise UserError(
                f"{where}: <box>({left},{top}),({right},{bottom})</box> ends before it begins; write the upper left "
                "corner first, then the lower right one"
            )
    if 2 * len(boxes) != len(_BOX_TAG.findall(text)):
        raise UserError(f"{where} has a malformed <box>; write <box>(x1,y1),(x2,y2)</box> with integers from 0 to 999")


def _check_path(path: str, where: str, what: str = "image") -> None:
    if not path or "\0" in path or "\n" in path:
        raise UserError(f"{where} has an empty or broken {what} path")
    if _URL.match(path):
        remedy = ", or prepare with --allow-urls" if what == "image" else ""
        raise UnsafePathError(
            what,
            f"{where}: {what} {path!r} is a URL, and none is fetched; download it into the image directory{remedy}",
        )
    if PurePosixPath(path).is_absolute():
        raise UnsafePathError(what, f"{where}: {what} {path!r} is absolute; make it relative to the image directory")
    depth = 0
    for part in PurePosixPath(path).parts:
        depth += -1 if part == ".." else 1
        if depth < 0:
            raise UnsafePathError(what, f"{where}: {what} {path!r} leaves the image directory")
