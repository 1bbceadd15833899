"""What a benchmark is: its questions, its prompt, its metric."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from megavlm.config.errors import UserError
from megavlm.data.schema import IMAGE_PLACEHOLDER

if TYPE_CHECKING:
    from megavlm.data.films.film import Film

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
"""Names of the options of a closed question, in their order."""

NOT_ASKED = "\0"
"""Prediction of a question that could not be asked: no metric counts it as right, as some would an empty one."""


@dataclass(frozen=True)
class StoredPicture:
    """An encoded image in the benchmark's own file, read when it is asked for."""

    name: str
    """Tells it from the others: file, row and column."""
    read: Callable[[], bytes]
    """Returns the encoded image; nothing where the file has none."""


Picture = Path | bytes | StoredPicture
"""A file, or an encoded image that lies in the benchmark's own file."""


@dataclass(frozen=True)
class StoredFilm:
    """A film, opened when it is asked for."""

    name: str
    """Tells it from the others: where it is, or where its frames are, and their rate."""
    read: Callable[[], Film]
    """Returns it with its index, or raises ``FilmError`` where it is none that can be read."""


Shown = Picture | StoredFilm
"""What a question shows."""


def shown_data(one: Shown) -> bytes | Film:
    """Return an encoded image, or a film.

    Raises:
        FilmError: it is no film that can be read.
        OSError: its file cannot be read.
    """
    return one.read() if isinstance(one, StoredFilm) else picture_bytes(one)


def picture_bytes(picture: Picture) -> bytes:
    """Return the encoded image.

    Raises:
        OSError: its file cannot be read.
    """
    if isinstance(picture, bytes):
        return picture
    return picture.read() if isinstance(picture, StoredPicture) else picture.read_bytes()


def shown_name(picture: Shown) -> str:
    """Return what messages call a picture or film."""
    return "in the benchmark's file" if isinstance(picture, bytes) else picture.name


@dataclass(frozen=True)
class Item:
    """One question of a benchmark, as its file has it."""

    id: str
    """Unique in the benchmark."""
    question: str
    """The bare question; pictures that it names itself are placeholders in it."""
    pictures: tuple[Shown, ...]
    """What it shows, in order."""
    answers: tuple[str, ...] = ()
    """References; empty where the benchmark keeps them secret. A closed question has the right letter here."""
    choices: tuple[str, ...] = ()
    """Options of a closed question: it is answered by the lowest loss over their letters, not by generation."""
    hint: str = ""
    """Context that comes with the question."""
    kind: str = "all"
    """Sub-task, for scores of its own."""
    unit: str = ""
    """Questions of one unit are also counted together: right only if all are."""
    box: tuple[float, float, float, float] | None = None
    """Reference box (x1, y1, x2, y2) in pixels."""
    size: tuple[int, int] = (0, 0)
    """Width and height of the picture in pixels, with ``box``."""


@dataclass(frozen=True)
class Scores:
    """What a metric says of a benchmark's predictions."""

    values: dict[str, float]
    """By name; the first is the benchmark's headline figure. In percent, unless the metric says otherwise."""
    each: list[float]
    """Share of its point that each question got, 0 to 1."""
    kinds: dict[str, dict[str, float]] = field(default_factory=dict)
    """The figures of each sub-task, where there are several."""


Metric = Callable[[Sequence[Item], Sequence[str]], Scores]
"""Questions and their predictions, in the same order, to scores."""


@dataclass(frozen=True)
class BenchmarkFiles:
    """Where a benchmark's files lie."""

    data: Path
    """The benchmark's own file, or its folder."""
    images: Path
    """Directory of the pictures."""
    annotations: Path | None = None
    """File of the answers, where they are published apart from the questions."""
    split: str | None = None
    """Part to take of a file that holds several; None for the benchmark's usual one."""
    answers: bool = True
    """Whether answers are needed; a test set has none."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Filled by the reader: questions that it left out, by cause."""


@dataclass(frozen=True)
class Benchmark:
    """How a benchmark is asked and scored."""

    name: str
    read: Callable[[BenchmarkFiles], list[Item]]
    prompt: str
    """Template with ``{pictures}``, ``{question}``, ``{hint}`` and ``{options}``."""
    max_new_tokens: int
    """Longest answer; closed questions are not generated."""
    metric: Metric
    file: str
    """What ``--data`` is, as published; for the help."""
    open_prompt: str = ""
    """Template of questions without options, where they differ."""
    chat: bool = False
    """Whether the prompt is a user's turn of a conversation; otherwise it is plain text to go on with."""
    needs: str = ""
    """Python package that the metric needs."""
    finds: bool = False
    """Whether it asks where things are: models of other notations are asked in their own words
    (:mod:`megavlm.evaluation.benchmarks.own_words`)."""


def render(benchmark: Benchmark, item: Item) -> str:
    """Return the text of a prompt; every picture is an :data:`IMAGE_PLACEHOLDER`.

    Raises:
        UserError: it shows more or fewer pictures than the question has.
    """
    template = benchmark.prompt if item.choices or not benchmark.open_prompt else benchmark.open_prompt
    text = template.format(
        pictures=IMAGE_PLACEHOLDER * len(item.pictures),
        question=item.question,
        hint=item.hint or "N/A",
        options="\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, item.choices, strict=False)),
    )
    shown = text.count(IMAGE_PLACEHOLDER)
    if shown != len(item.pictures):
        raise UserError(f"question {item.id}: its prompt shows {shown} pictures, but it has {len(item.pictures)}")
    return text


def by_kind(items: Sequence[Item], each: Sequence[float]) -> Mapping[str, list[float]]:
    """The scores of each sub-task, by name in alphabetical order."""
    found: dict[str, list[float]] = {kind: [] for kind in sorted({item.kind for item in items})}
    for item, value in zip(items, each, strict=True):
        found[item.kind].append(value)
    return found
