"""Installed fonts, and which characters each can draw."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from PIL import ImageFont

from megavlm.config.errors import UserError

logger = logging.getLogger(__name__)

FONT_DIRECTORIES = (Path("/usr/share/fonts"), Path("/usr/local/share/fonts"))
"""Where Debian's packages put fonts."""

_SUFFIXES = {".ttf", ".otf", ".ttc", ".otc"}
_PROBE_SIZE = 24
_MOST_FACES = 16
_MISSING = "\U0010ffff"
"""A code point that no font has: what is drawn for it is the sign for a missing glyph."""
_PROBES = {"en": "ABCXYZabcxyz0189.,", "zh": "\u7684\u4e00\u662f\u4e0d\u4e86\u4eba\u6211\u5728\u6709\u4ed6"}
_PACKAGES = {"en": "fonts-dejavu-core fonts-liberation", "zh": "fonts-wqy-zenhei fonts-noto-cjk"}
_NAMES = {"en": "English", "zh": "Chinese"}


@dataclass(frozen=True)
class Face:
    """One font file; of a collection the face for simplified Chinese, or else the first."""

    path: Path
    index: int = 0
    _known: dict[str, bool] = field(default_factory=dict, compare=False, repr=False)

    def missing(self, text: Iterable[str]) -> set[str]:
        """Return the characters that the font cannot draw."""
        return {char for char in set(text) if not char.isspace() and not self._draws(char)}

    def at(self, size: int) -> ImageFont.FreeTypeFont:
        """Return the font at ``size`` pixels."""
        return _load(self.path, size, self.index)

    def _draws(self, char: str) -> bool:
        if char not in self._known:
            font = _load(self.path, _PROBE_SIZE, self.index)
            drawn, blank = font.getmask(char), _missing_glyph(self.path, self.index)
            self._known[char] = drawn.getbbox() is not None and (drawn.size, bytes(drawn)) != blank
        return self._known[char]


def find_fonts(language: str, directories: Sequence[Path] = FONT_DIRECTORIES) -> list[Face]:
    """Return the fonts that can write a language, by their paths.

    Args:
        language: ``en`` or ``zh``.
        directories: Where to look, with all that is below.

    Raises:
        UserError: There is none; the message names a Debian package that has one.
    """
    paths = sorted({path for root in directories if root.is_dir() for path in root.rglob("*")})
    files = [path for path in paths if path.suffix.lower() in _SUFFIXES and path.is_file()]
    faces = [Face(path, _simplified(path)) for path in files]
    found = [face for face in faces if _usable(face, _PROBES[language])]
    if not found:
        where = ", ".join(map(str, directories))
        raise UserError(
            f"no font in {where} can write {_NAMES[language]}; apt install {_PACKAGES[language]}, or name a directory "
            "with --fonts"
        )
    return found


def _usable(face: Face, probe: str) -> bool:
    try:
        return not face.missing(probe)
    except (OSError, ValueError) as error:
        logger.warning("font %s cannot be used: %s", face.path, error)
        return False


def _simplified(path: Path) -> int:
    """The face of a collection whose name says SC: of Noto's, the first draws characters as Japanese has them."""
    for index in range(_MOST_FACES if path.suffix.lower() in (".ttc", ".otc") else 0):
        try:
            family, _ = _load(path, _PROBE_SIZE, index).getname()
        except OSError:  # no more faces; or no font, which shows when it is used
            break
        if family and family.endswith(" SC"):
            return index
    return 0


@lru_cache(maxsize=256)
def _load(path: Path, size: int, index: int) -> ImageFont.FreeTypeFont:
    # The basic layout is the same whether or not Pillow has raqm.
    return ImageFont.truetype(str(path), size, index=index, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=256)
def _missing_glyph(path: Path, index: int) -> tuple[tuple[int, int], bytes]:
    drawn = _load(path, _PROBE_SIZE, index).getmask(_MISSING)
    return drawn.size, bytes(drawn)
