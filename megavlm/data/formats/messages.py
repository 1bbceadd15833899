"""Messages: turns of ``role`` and ``content``, the content a text or a list of parts.

Sources (facts): OpenAI's chat format for fine-tuning with pictures (``image_url`` parts, ``weight`` of an answer);
Hugging Face's ``messages`` with ``image`` parts, whose pictures are in the part or, in order, in ``images`` beside the
messages (TRL's vision sets); ms-swift's custom data sets (``docs/source_en/Customization/Custom-dataset.md``:
``messages``, ``images``, ``<image>`` in a text, ``loss`` of a message; also ``conversation`` of ``human`` and
``assistant``); LLaMA-Factory's ShareGPT with ``role`` and ``content`` (``data/README.md``).

A picture of a part, and what stands where ``<image>`` is, becomes ``Picture N: <img>path</img>`` and a line end, which
templates with a form of their own replace; the texts around it are kept to the letter, as Transformers' templates, the
server here and Qwen-VL's own ``from_list_format`` do. Where pictures are given and nothing says where, they stand in
front of the first question, as TRL and ms-swift put them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any, Generic, TypeVar

from megavlm.data.formats.base import Broken, BrokenError, Record, each, field
from megavlm.data.formats.films import CHANGES, MARK, RATES, SAMPLING, check_asked, film, films_beside, marks_in
from megavlm.data.formats.keys import has_roles, is_given
from megavlm.data.formats.llava import placed
from megavlm.data.formats.pictures import picture
from megavlm.data.formats.source import Source
from megavlm.data.schema import FilmName

_ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant",
}  # fmt: skip
_KEYS = ("messages", "conversations", "conversation")
_BESIDE = ("image", "images", "video", "videos")
T = TypeVar("T")
_TEXT = ("text", "input_text", "output_text")
_IMAGE = ("image", "image_url", "input_image")
_VIDEO = ("video", "video_url", "input_video")
_HOLDS = ("image", "image_url", "url", "path", "base64", "bytes")
_FILM_HOLDS = ("video", "video_url", "url", "path", "base64", "bytes", "frames")
_PART_USED = frozenset({"type", "text", "index", *_HOLDS, *_FILM_HOLDS})


def matches(source: Source) -> bool:
    """Whether there are messages, or conversations of roles."""
    return any(is_messages(record) for record in source.head)


def is_messages(record: Record) -> bool:
    """Whether a record is in this form."""
    return isinstance(record.get("messages"), list) or has_roles(record) or _is_pairs(record.get("conversation"))


def read(source: Source) -> Iterator[Record | Broken]:
    """Yield the records.

    Raises:
        UserError: The file holds no list.
    """
    yield from each(source.rows(), lambda entry: convert_one(entry, source), "id")


def convert_one(entry: Any, source: Source) -> Record:
    """Convert one record; the bytes of pictures in it go to ``source.pictures``.

    Raises:
        BrokenError: It cannot be one here.
    """
    given = [key for key in _KEYS if isinstance(entry, dict) and is_given(entry.get(key))]
    if len(given) > 1:
        raise BrokenError("bad record", f"the record has {' and '.join(map(repr, given))}; keep one")
    key = given[0] if given else _KEYS[0]
    messages = field(entry, key, list)
    if key == "conversation":
        messages = _paired(messages)
    taken = _Taken(_beside(entry, source.pictures), "pictures", "<image>")
    films = _Taken(films_beside(entry, source.pictures, source.ignored), "films", MARK)
    turns, unknown = [], set()
    for index, message in enumerate(messages):
        turn, own = _turn(index, message, taken, films, source.pictures)
        turns.append(turn)
        unknown |= own
    for one in (films, taken):
        _put_in_front(turns, one)
    images, shown = taken.all(), films.all()
    rest = {name: value for name, value in entry.items() if name not in (key, *_BESIDE)}
    source.ignored.update(unknown)
    return placed(rest | {"conversations": turns, "images": images}, turns, source.ignored, inline=True, films=shown)


class _Taken(Generic[T]):
    """The pictures of a record in the order in which it shows them, or its films.

    Args:
        beside: Those beside the messages.
        what: What they are called.
        mark: What shows one in a text.
    """

    def __init__(self, beside: list[T], what: str, mark: str) -> None:
        self.what, self.mark = what, mark
        self._beside, self._next = beside, 0
        self._indexed: set[int] = set()
        self._shown: list[T] = []

    def show(self, path: T) -> None:
        """Take one that a part has itself."""
        self._shown.append(path)

    def take(self, where: str, index: Any = None) -> None:
        """Take the next of those beside the messages, or the one that a part names by its index."""
        if index is not None:
            if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(self._beside):
                raise BrokenError(
                    f"{self.what} do not match", f"{where}: index {index!r} names none of the {self.what}"
                )
            self._indexed.add(index)
            self._shown.append(self._beside[index])
            return
        if self._next == len(self._beside):
            raise BrokenError(
                f"{self.what} do not match",
                f"{where} shows more {self.what} than the record has ({len(self._beside)})",
            )
        self._shown.append(self._beside[self._next])
        self._next += 1

    @property
    def unused(self) -> int:
        """How many of those beside the messages were not shown; none where all are, by order or by index."""
        return len(self._beside) - (len(self._indexed) if self._indexed else self._next)

    def all(self) -> list[T]:
        """Return them.

        Raises:
            BrokenError: Some have no place.
        """
        if self.unused > 0:
            raise BrokenError(
                f"{self.what} do not match",
                f"{len(self._beside)} {self.what} beside the messages, but {len(self._beside) - self.unused} are shown",
            )
        return self._shown


def _beside(entry: Record, pictures: MutableMapping[str, bytes]) -> list[str]:
    """Return the paths of the pictures beside the messages."""
    found = [
        [picture(one, pictures) for one in (value if isinstance(value, list) else [value])]
        for value in (entry.get("image"), entry.get("images"))
        if is_given(value)
    ]
    if len(found) == 2 and found[0] != found[1]:
        raise BrokenError("pictures do not match", "'image' and 'images' name different pictures")
    return found[0] if found else []


def _turn(
    index: int, message: Any, taken: _Taken[str], films: _Taken[FilmName], pictures: MutableMapping[str, bytes]
) -> tuple[Record, set[str]]:
    """Return a message in LLaVA's form, and the keys of its parts that nobody looks at."""
    where = f"message {index}"
    if not isinstance(message, dict):
        raise BrokenError("bad record", f"{where} must be an object, not {type(message).__name__}")
    speaker = message.get("role", message.get("from"))
    role = _ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise BrokenError("unsupported role", f"{where}: role {speaker!r} is not supported; user, assistant or system")
    content = message.get("content", message.get("value"))
    if isinstance(content, list):
        text, unknown = _parts(f"{where} ({role})", content, taken, films, pictures)
    elif isinstance(content, str):
        text, unknown = content, set()
        _take_marked(f"{where} ({role})", content, taken, films, asks=role != "assistant")
    else:
        what = "no content" if content is None else f"content of type {type(content).__name__}"
        raise BrokenError("bad record", f"{where} ({role}) has {what}")
    rest = {key: value for key, value in message.items() if key not in ("role", "content", "from", "value")}
    return rest | {"from": role, "value": text}, unknown


def _take_marked(where: str, text: str, taken: _Taken[str], films: _Taken[FilmName], *, asks: bool) -> None:
    """Take the pictures and films that a text shows by their marks; an answer shows no film, it may name the mark."""
    for _ in range(text.count("<image>")):
        taken.take(where)
    for _ in range(marks_in(text) if asks else 0):
        films.take(where)


def _parts(
    where: str, parts: list[Any], taken: _Taken[str], films: _Taken[FilmName], pictures: MutableMapping[str, bytes]
) -> tuple[str, set[str]]:
    text, unknown = "", set()
    for part in parts:
        if not isinstance(part, dict):
            raise BrokenError("bad record", f"{where}: a part must be an object, not {type(part).__name__}")
        kind = _kind(part)
        if kind in _TEXT:
            words = part.get("text")
            if not isinstance(words, str):
                raise BrokenError("bad record", f"{where}: a part of text has no text")
            _take_marked(where, words, taken, films, asks="(assistant)" not in where)
            text += words
        elif kind in _IMAGE:
            if any(is_given(part.get(key)) for key in _HOLDS):
                taken.show(picture({key: value for key, value in part.items() if key != "index"}, pictures))
            else:
                taken.take(where, part.get("index"))
            text += "<image>"
        elif kind in _VIDEO:
            if any(is_given(part.get(key)) for key in _FILM_HOLDS):
                own = {key: value for key, value in part.items() if key != "index"}
                nested = set[str]()
                films.show(film(own, pictures, nested))
                unknown |= {f"{key} (of a film)" for key in nested - own.keys()}
            else:
                check_asked(part, (*CHANGES, *SAMPLING, *RATES))
                films.take(where, part.get("index"))
            text += MARK
        else:
            raise BrokenError("unsupported part", f"{where}: a part of type {kind!r} is not supported")
        used = {*_PART_USED, *RATES} if kind in _VIDEO else _PART_USED
        unknown |= {f"{key} (of a part)" for key, value in part.items() if key not in used and is_given(value)}
        detail = part.get("image_url")
        if isinstance(detail, Mapping):
            unknown |= {f"{key} (of image_url)" for key in detail if key != "url" and is_given(detail[key])}
    return text, unknown


def _kind(part: Record) -> Any:
    """Return a part's type; where it names none, as in lists for Qwen's processors, by what it holds."""
    kind = part.get("type")
    if kind is not None:
        return kind
    return next((key for key in ("text", "image", "image_url", "video", "video_url") if is_given(part.get(key))), None)


def _put_in_front(turns: list[Record], taken: _Taken[Any]) -> None:
    """Put pictures, or films, that nothing places in front of the first question."""
    if any(taken.mark in turn["value"] for turn in turns) or not taken.unused:
        return
    first = next((turn for turn in turns if turn["from"] == "user"), None)
    if first is not None:
        number = taken.unused
        first["value"] = taken.mark * number + first["value"]
        for _ in range(number):
            taken.take("the first question")


def _is_pairs(turns: Any) -> bool:
    return isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and "human" in turns[0]


def _paired(pairs: list[Any]) -> list[Record]:
    """Return ms-swift's ``{"human", "assistant"}`` as messages."""
    found: list[Record] = []
    for pair in pairs:
        own = {key for key, value in pair.items() if is_given(value)} if isinstance(pair, dict) else set()
        if own != {"human", "assistant"}:
            raise BrokenError("bad record", "a turn of 'conversation' must have 'human' and 'assistant' and no more")
        found += [{"role": "user", "content": pair["human"]}, {"role": "assistant", "content": pair["assistant"]}]
    return found
