"""Qwen v1's tokenizer file, ``qwen.tiktoken``: a base64 token and its rank on each line."""

from __future__ import annotations

import base64
import binascii
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from megavlm.config.errors import UserError
from megavlm.data.template import Template
from megavlm.data.templates import QWEN_VL
from megavlm.data.tokenizer.base import Tokenizer
from megavlm.data.tokenizer.beside import tokens_beside

QWEN_SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *(f"<|extra_{i}|>" for i in range(205)),
    "<ref>",
    "</ref>",
    "<box>",
    "</box>",
    "<quad>",
    "</quad>",
    "<img>",
    "</img>",
    "<imgpad>",
)
"""Qwen-VL's special tokens; their ids follow the BPE ranks in this order."""

_QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class TiktokenTokenizer(Tokenizer):
    """Qwen v1's tokenizer, from its ``.tiktoken`` file. Text is normalised to NFC, as Qwen does."""

    def __init__(self, path: str | Path, template: Template = QWEN_VL) -> None:
        import tiktoken  # noqa: PLC0415 - only where such a file is read

        path = Path(path)
        ranks = _read_ranks(path)
        specials = {token: len(ranks) + index for index, token in enumerate(QWEN_SPECIALS)}
        self._encoding = tiktoken.Encoding(
            path.name, pat_str=_QWEN_PATTERN, mergeable_ranks=ranks, special_tokens=specials
        )
        if more := sorted(set(tokens_beside(path, specials)) - set(specials)):
            raise UserError(f"tokenizer {path}: the files beside it add {more[0]}, which Qwen's tokenizer has not")
        self._take_tokens(specials, len(ranks) + len(specials), path, template, specials)
        if self.added:
            raise UserError(
                f"model.template: {template.name} needs the token {self.added[0]}, which tokenizer {path} has not; "
                "name the template that this model was made for"
            )

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``."""
        return self._encoding.encode(unicodedata.normalize("NFC", text), allowed_special="all")

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``."""
        return self._encoding.decode(list(ids), errors="replace")


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise UserError(f"tokenizer {path}, line {number}: expected a base64 token and its rank") from None
    if sorted(ranks.values()) != list(range(len(ranks))) or not ranks:
        raise UserError(f"tokenizer {path}: ranks must run from 0 without gaps")
    return ranks
