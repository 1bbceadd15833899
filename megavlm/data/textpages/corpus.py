"""The text of the pages: paragraphs of a file, or sentences made of a small list of words."""

from __future__ import annotations

import logging
import random
import re
from dataclasses import dataclass
from pathlib import Path
from unicodedata import category

from megavlm.config.errors import MissingFileError, UserError

logger = logging.getLogger(__name__)

LANGUAGES = ("en", "zh")

_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff]")
_MARKUP = re.compile(r"</?(?:img|ref|box|quad)>|<\|[a-z_]+\|>|<imgpad>")
_SPACE = re.compile(r"\s+")
_COMMA, _STOP = "\uff0c", "\u3002"


@dataclass(frozen=True)
class Corpus:
    """Paragraphs of one language; without any, sentences are made up."""

    language: str
    paragraphs: tuple[str, ...] = ()

    def draw(self, rng: random.Random, characters: int) -> list[str]:
        """Return paragraphs that follow each other, about ``characters`` long together."""
        drawn: list[str] = []
        at = rng.randrange(len(self.paragraphs)) if self.paragraphs else 0
        while characters > 0:
            if self.paragraphs:
                text = self.paragraphs[at]
                at = (at + 1) % len(self.paragraphs)
            else:
                text = self._make(rng)
            drawn.append(self._cut(text, characters))
            characters -= len(drawn[-1]) + 1
        return [text for text in drawn if text]

    def _make(self, rng: random.Random) -> str:
        sentences = [_sentence(self.language, rng) for _ in range(rng.randint(1, 5))]
        return ("" if self.language == "zh" else " ").join(sentences)

    def _cut(self, text: str, characters: int) -> str:
        if len(text) <= characters:
            return text
        cut = text[:characters]
        if self.language == "en" and " " in text:  # whole words only
            cut = cut[: max(0, text.rfind(" ", 0, characters + 1))]
        return cut.strip()


def read_corpus(path: Path | None, languages: tuple[str, ...]) -> list[Corpus]:
    """Return a corpus for each language: a file's lines, sorted by whether they have Chinese characters.

    Args:
        path: UTF-8 text with a paragraph in each line; None for made-up sentences.
        languages: Of :data:`LANGUAGES`.

    Raises:
        MissingFileError: There is no such file.
        UserError: It is not UTF-8, or has no text in one of the languages.
    """
    if path is None:
        return [Corpus(language) for language in languages]
    if not path.is_file():
        raise MissingFileError(f"corpus {path} does not exist")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"corpus {path} is not UTF-8 text") from None
    lines: dict[str, list[str]] = {language: [] for language in LANGUAGES}
    refused = 0
    for line in text.splitlines():
        # Control and format characters (a byte order mark, joiners) have no picture.
        clean = _SPACE.sub(" ", "".join(char for char in line if category(char) not in ("Cc", "Cf"))).strip()
        if _MARKUP.search(clean):
            refused += 1
        elif clean:
            lines["zh" if _HAN.search(clean) else "en"].append(clean)
    if refused:
        logger.warning(
            "%s: %d lines left out, because they contain markup such as <img> or <|im_start|>", path, refused
        )
    for language in languages:
        if not lines[language]:
            names = {"en": "without", "zh": "with"}
            raise UserError(
                f"corpus {path} has no lines {names[language]} Chinese characters; take another --language, or file"
            )
    return [Corpus(language, tuple(lines[language])) for language in languages]


def _words(language: str) -> tuple[str, ...]:
    cached = _WORDS.get(language)
    if cached is None:
        file = Path(__file__).with_name(f"words_{language}.txt")
        cached = _WORDS[language] = tuple(file.read_text(encoding="utf-8").split())
    return cached


_WORDS: dict[str, tuple[str, ...]] = {}


def _sentence(language: str, rng: random.Random) -> str:
    parts = [rng.choice(_words(language)) for _ in range(rng.randint(4, 14))]
    if rng.random() < 0.3:
        parts.insert(rng.randrange(len(parts)), _figure(rng))
    if language == "zh":
        if len(parts) > 7:
            parts[len(parts) // 2] += _COMMA
        return "".join(parts) + _STOP
    if len(parts) > 8:
        parts[len(parts) // 2] += rng.choice(",,;:")
    text = " ".join(parts) + rng.choice("....?!")
    return text[0].upper() + text[1:]


def _figure(rng: random.Random) -> str:
    """A number as documents have them."""
    return rng.choice(
        (
            str(rng.randint(2, 9999)),
            f"{rng.randint(1, 999)}.{rng.randint(0, 99):02d}",
            f"{rng.randint(1, 100)}%",
            f"{rng.randint(1990, 2030)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}",
            f"No.{rng.randint(10, 99)}/{rng.randint(100, 999)}",
        )
    )
