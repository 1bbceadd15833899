"""Films as records name them: a path of a file, of a folder of frames, a list of frames, a ``data:`` URL, or an object.

Sources (facts): ``video`` and ``videos`` of LLaVA-NeXT's, Qwen2-VL's and LLaMA-Factory's data (``data/README.md``: a
path, or a list of the paths of its frames), of ms-swift's custom data sets; ``video`` parts of qwen-vl-utils' README
(a path, a ``file://`` URL, or a list of frames with ``sample_fps``); ``video_url`` parts as vLLM and SGLang take them;
``bytes`` and ``path`` of the hub's ``Video``.
"""

from __future__ import annotations

import base64
import re
from collections import Counter
from collections.abc import Mapping, MutableMapping, MutableSet, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from megavlm.data.films.container import FRAME_RATE, FRAME_SUFFIXES, in_order, write_frames
from megavlm.data.films.plan import FilmError
from megavlm.data.formats.base import BrokenError, Record
from megavlm.data.formats.keys import is_given
from megavlm.data.formats.pictures import below, picture
from megavlm.data.formats.source import Source
from megavlm.data.machine import is_file
from megavlm.data.schema import FilmName

MARK = "<video>"
"""Where a text shows a film."""
_ELEMENT = re.compile(r"</video\s*>")
_HOLDS = ("frames", "bytes", "base64", "video_url", "video", "url", "path")
"""Where an object has a film, the most exact first."""
_PICTURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"II*\0", b"MM\0*")
"""How files begin that are pictures, and never films (as a GIF may be)."""
RATES = ("sample_fps", "fps", "rate")
"""Frames in a second of frames; of a film file ``fps`` says how to sample it, which the recipe does here."""
SAMPLING = (
    "nframes", "num_frames", "min_frames", "max_frames", "min_pixels", "max_pixels", "total_pixels", "resized_height",
    "resized_width",
)  # fmt: skip
"""Keys of an object that say which frames are shown, and how large (qwen-vl-utils' README): the recipe does here."""
CHANGES = ("video_start", "video_end", "start_time", "end_time", "start", "end", "clip")
"""Keys of an object that show a part of a film."""


def film(value: Any, pictures: MutableMapping[str, bytes] | None, unknown: MutableSet[str] | None = None) -> FilmName:
    """Return a film as the records here name it; bytes that come with the record go into ``pictures``.

    URLs of films stay as they are until :func:`settled_films`. Without ``pictures`` bytes become ``data:`` URLs.

    Args:
        value: What the record has.
        pictures: Gets bytes.
        unknown: Gets keys of an object that nobody looks at.

    Raises:
        BrokenError: It names no film, or asks for frames or sizes of its own.
    """
    if isinstance(value, dict):
        return _of_object(value, pictures, set() if unknown is None else unknown)
    if isinstance(value, list):
        if not value:
            raise BrokenError("bad record", "a film of no frames")
        return FilmName(frames=tuple(_file_of(one, pictures) for one in value))
    if not isinstance(value, str) or not value.strip():
        raise BrokenError("bad record", f"a film must be a path, a URL or a list of frames, not {type(value).__name__}")
    return FilmName(value.strip())


def films_beside(entry: Record, pictures: MutableMapping[str, bytes] | None, ignored: Counter[str]) -> list[FilmName]:
    """Return the films beside a conversation: ``video`` is one or a list of them, and so is ``videos``.

    A list of nothing but pictures under ``video`` is one film of frames, as Qwen's and LLaVA's ``video`` is one film.

    Raises:
        BrokenError: They are no films, or the two keys differ.
    """
    found, unknown = [], set[str]()
    for key in ("video", "videos"):
        value = entry.get(key)
        if not is_given(value):
            continue
        listed = value if isinstance(value, list) else [value]
        if key == "video" and isinstance(value, list) and all(_is_frame(one, pictures or {}) for one in value):
            listed = [value]
        found.append([film(one, pictures, unknown) for one in listed])
    ignored.update(f"{key} (of a film)" for key in unknown)
    if len(found) == 2 and found[0] != found[1]:
        raise BrokenError("films do not match", "'video' and 'videos' name different films")
    return found[0] if found else []


def marks_in(text: str) -> int:
    """Return how many films a text shows; elements of HTML are none."""
    return 0 if _ELEMENT.search(text) else text.count(MARK)


def settled_films(record: Any, bases: Sequence[str], pictures: MutableMapping[str, bytes]) -> Any:
    """Return a record whose films are paths from the image directory, as far as they lie in it.

    Args:
        record: The record, with ``films``; another is returned as it is.
        bases: Names of the image directory.
        pictures: Gets what ``data:`` URLs hold.

    Raises:
        BrokenError: A ``data:`` URL is broken.
    """
    films = record.get("films") if isinstance(record, dict) else None
    if not isinstance(films, list):
        return record

    def at(path: Any) -> Any:
        return below(picture(path, pictures), bases) if isinstance(path, str) and path.strip() else path

    def settled(one: Any) -> Any:
        if isinstance(one, dict) and isinstance(one.get("frames"), list):
            return one | {"frames": list(map(at, one["frames"]))}
        return one | {"path": at(one["path"])} if isinstance(one, dict) and "path" in one else at(one)

    return record | {"films": list(map(settled, films))}


def stored_film(name: FilmName, source: Source, made: Path, *, allow_links: bool) -> bytes | Path:
    """Return a film as shards have it: its file, or its frames as one file.

    Args:
        name: The film.
        source: Where it is from.
        made: Where frames are put together; it is overwritten.
        allow_links: Whether links that lead out of the directory are followed.

    Raises:
        BrokenError: It is not there.
        FilmError: Frames are none, or too large.
    """
    rate = FRAME_RATE if name.rate is None else name.rate
    if name.frames:
        frames = [_file(path, source, "frame", allow_links=allow_links) for path in name.frames]
    else:
        stored = name.path in source.pictures or source.store is not None
        place = None if stored else source.resolved(name.path, "film", allow_links=allow_links)
        if place is None or not place.is_dir():
            if name.rate is not None:
                raise BrokenError(
                    "unsupported key",
                    f"a rate ({', '.join(RATES)}) is that of frames, and film {name.path!r} is a file: how it is "
                    "sampled says model.video of the recipe, for all films; leave the key out",
                )
            return _file(name.path, source, "film", allow_links=allow_links)
        names = in_order([one.name for one in place.iterdir() if not one.name.startswith(".")])
        others = [one for one in names if PurePosixPath(one.lower()).suffix not in FRAME_SUFFIXES]
        if others:
            raise FilmError(
                "not frames", f"its folder holds {others[0]!r}; frames are pictures ({', '.join(FRAME_SUFFIXES)})"
            )
        frames = [_file(f"{name.path}/{one}", source, "frame", allow_links=allow_links) for one in names]
    with made.open("wb") as out:
        write_frames(frames, rate, out)
    return made


def _file(path: str, source: Source, what: str, *, allow_links: bool) -> bytes | Path:
    if path in source.pictures or source.store is not None:
        return source.read_image(path, what)
    found = source.resolved(path, what, allow_links=allow_links)
    if not is_file(found):
        raise BrokenError(f"{what} missing", f"{what} {path!r} is not a file")
    return found


def _of_object(value: Record, pictures: MutableMapping[str, bytes] | None, unknown: MutableSet[str]) -> FilmName:
    check_asked(value, (*CHANGES, *SAMPLING))
    unknown |= {key for key, one in value.items() if is_given(one) and key not in (*_HOLDS, *RATES, *CHANGES, "type")}
    given = [key for key in _HOLDS if is_given(value.get(key))]
    if not given:
        raise BrokenError("bad record", f"a film has none of {', '.join(_HOLDS)}")
    inner = value[given[0]]
    if given[0] in ("bytes", "base64"):
        found = FilmName(_file_of({given[0]: inner}, pictures))
    else:
        found = film(inner, pictures, unknown)
    rates = [value[key] for key in RATES if value.get(key) is not None]  # 0 is one, and refused
    return found._replace(rate=rates[0]) if rates and found.rate is None else found


def check_asked(value: Record, keys: Sequence[str]) -> None:
    """Refuse keys of an object by which it asks for a part of a film, or for frames or sizes of its own.

    Raises:
        BrokenError: There is one of ``keys``.
    """
    asked = next((key for key in keys if is_given(value.get(key))), None)
    if asked in CHANGES:
        raise BrokenError("unsupported key", f"{asked!r} of a film is not supported; cut the film beforehand")
    if asked is not None:
        raise BrokenError(
            "unsupported key",
            f"{asked!r} of a film is not supported: which frames are shown, and how large, says model.video of the "
            "recipe, for all films; leave the key out",
        )


def _file_of(value: Any, pictures: MutableMapping[str, bytes] | None) -> str:
    """Return :func:`picture`, bytes as a ``data:`` URL where nothing takes them."""
    if pictures is not None:
        return picture(value, pictures)
    own: dict[str, bytes] = {}
    name = picture(value, own)
    return f"data:;base64,{base64.b64encode(own[name]).decode()}" if name in own else name


def _is_frame(value: Any, pictures: Mapping[str, bytes]) -> bool:
    if isinstance(value, dict):
        return is_given(value.get("image")) or is_given(value.get("bytes"))
    if not isinstance(value, str):
        return False
    if value in pictures:
        return pictures[value].startswith(_PICTURES)
    name = value.strip().lower()
    return name.startswith("data:image/") or PurePosixPath(name).suffix in FRAME_SUFFIXES
