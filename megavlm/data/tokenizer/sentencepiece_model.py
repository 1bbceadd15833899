"""SentencePiece models: those that megavlm trains, and plain ones such as Llama's ``tokenizer.model``."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from megavlm.config.errors import UserError
from megavlm.data.template import Template
from megavlm.data.templates import QWEN_VL
from megavlm.data.tokenizer.base import Tokenizer
from megavlm.data.tokenizer.beside import tokens_beside
from megavlm.data.tokenizer.tiktoken_file import QWEN_SPECIALS

SENTENCEPIECE_SPECIALS = tuple(token for token in QWEN_SPECIALS if not token.startswith("<|extra_"))
"""Special tokens of a SentencePiece model that :func:`train_sentencepiece` makes."""

_OWN = {"<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<imgpad>"}
"""By these pieces a model that :func:`train_sentencepiece` made is known."""
_SPACE_MARK = "\u2581"


def load_sentencepiece(path: str | Path, template: Template = QWEN_VL) -> Tokenizer:
    """Load a SentencePiece model: of :func:`train_sentencepiece` where it has Qwen's special tokens, else a plain one.

    Raises:
        UserError: The file is broken, or lacks what such a model needs.
    """
    import sentencepiece  # noqa: PLC0415 - only where such a file is read

    path = Path(path)
    model = sentencepiece.SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(path.read_bytes())
    except RuntimeError:
        raise UserError(f"tokenizer {path} is not a SentencePiece model") from None
    pieces = [model.IdToPiece(i) for i in range(model.GetPieceSize())]
    kind = SentencePieceTokenizer if set(pieces) >= _OWN else PlainSentencePieceTokenizer
    return kind(model, pieces, path, template)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model with byte fallback, as :func:`train_sentencepiece` makes; text survives exactly."""

    def __init__(self, model: Any, pieces: Sequence[str], path: Path, template: Template = QWEN_VL) -> None:
        self._model = model
        own = {piece: i for i, piece in enumerate(pieces)}
        if more := sorted(set(tokens_beside(path, own)) - set(own)):
            raise UserError(f"tokenizer {path}: the files beside it add {more[0]}, which the model itself should have")
        self._take_tokens(own, len(pieces), path, template)
        if self.added:
            raise UserError(
                f"model.template: {template.name} needs the token {self.added[0]}, which tokenizer {path} has not; "
                "train it with that token"
            )
        self._bytes = [
            bytes([int(piece[3:5], 16)]) if model.IsByte(i) else piece.replace(_SPACE_MARK, " ").encode()
            for i, piece in enumerate(pieces)
        ]
        byte_ids = {self._bytes[i]: i for i in range(self.vocab_size) if model.IsByte(i)}
        if len(byte_ids) != 256:
            raise UserError(f"tokenizer {path} has no byte fallback, so it cannot write every text")
        # SentencePiece writes a space as U+2581 and cannot tell it from a real one, and it ends text at U+0000.
        self._escapes = {char: [byte_ids[bytes([b])] for b in char.encode()] for char in (_SPACE_MARK, "\0")}

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``."""
        for char, escape in self._escapes.items():
            if char in text:
                ids: list[int] = []
                for index, part in enumerate(text.split(char)):
                    ids += (escape if index else []) + self.encode(part)
                return ids
        return list(self._model.EncodeAsIds(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``."""
        return b"".join(self._bytes[int(i)] for i in ids).decode("utf-8", errors="replace")


class PlainSentencePieceTokenizer(Tokenizer):
    """A SentencePiece model as it was published, such as Llama's and Vicuna's.

    Its control pieces (``<s>``, ``</s>``), the tokens that the files beside it add and the template's tokens
    are special; each stretch of text between them is encoded by the model as it is. If the model puts a space
    before text (the dummy prefix), it does so for every stretch, and decoding takes one space off the start of
    each: an answer comes back as it was. Stretches that were encoded apart and meet without a special token in
    between, such as a turn's role and its text, decode with that space between them.
    """

    def __init__(self, model: Any, pieces: Sequence[str], path: Path, template: Template = QWEN_VL) -> None:
        self._model = model
        known = {piece: i for i, piece in enumerate(pieces)}
        beside = tokens_beside(path, known)
        size = max([len(pieces) - 1, *beside.values()]) + 1
        control = {piece: i for piece, i in known.items() if model.IsControl(i)}
        tokens = self._take_tokens(known | beside, size, path, template, [*control, *beside])
        self._specials = control | beside | tokens
        self._names = {number: name for name, number in self._specials.items()}
        longest_first = sorted(self._specials, key=len, reverse=True)
        self._pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``."""
        ids: list[int] = []
        # Text and special tokens in turn.
        for index, part in enumerate(self._pattern.split(text)):
            ids += [self._specials[part]] if index % 2 else self._model.EncodeAsIds(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``."""
        parts: list[str] = []
        for special, group in groupby((int(i) for i in ids), self._names.__contains__):
            stretch = list(group)
            parts += [self._names[i] for i in stretch] if special else [self._model.DecodeIds(stretch)]
        return "".join(parts)


def train_sentencepiece(texts: Iterable[str], out_path: str | Path, vocab_size: int) -> None:
    """Train a small SentencePiece model with Qwen's special tokens and write it to ``out_path``.

    Args:
        texts: Training texts; newlines and repeated spaces count.
        out_path: File to write, ending in ``.model``; an existing one is replaced.
        vocab_size: Most pieces wanted, special tokens and 256 bytes included; few texts may give fewer.

    Raises:
        UserError: ``vocab_size`` is too small for the special tokens and the texts, or there are no texts.
    """
    import sentencepiece  # noqa: PLC0415 - only where a model is trained

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=(line for text in texts for line in text.splitlines() if line),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            user_defined_symbols=[*SENTENCEPIECE_SPECIALS, "\n"],
            byte_fallback=True,
            split_digits=True,
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            normalization_rule_name="identity",
            allow_whitespace_only_pieces=True,
            character_coverage=0.9999,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            unk_id=0,
            num_threads=1,
            max_sentence_length=1 << 16,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"cannot train a tokenizer of {vocab_size} pieces: {reason}") from None
    out_path = Path(out_path)
    temporary = out_path.with_name(out_path.name + ".tmp")
    temporary.write_bytes(model.getvalue())
    temporary.replace(out_path)
