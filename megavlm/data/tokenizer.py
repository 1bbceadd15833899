"""Tokenizers: Qwen's tiktoken file, or a SentencePiece model with Qwen's special tokens.

Importing this module loads neither torch nor a tokenizer library.
"""

from __future__ import annotations

import base64
import binascii
import io
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path

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

SENTENCEPIECE_SPECIALS = tuple(token for token in QWEN_SPECIALS if not token.startswith("<|extra_"))
"""Special tokens of a SentencePiece model that :func:`train_sentencepiece` makes."""

_QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPACE_MARK = "\u2581"


class Tokenizer(ABC):
    """Text to token ids and back. Special tokens written in the text become their single ids."""

    vocab_size: int
    """One more than the largest id."""
    eos_id: int
    """Id of ``<|endoftext|>``."""
    im_start_id: int
    """Id of ``<|im_start|>``."""
    im_end_id: int
    """Id of ``<|im_end|>``."""
    img_start_id: int
    """Id of ``<img>``."""
    img_end_id: int
    """Id of ``</img>``."""
    imgpad_id: int
    """Id of ``<imgpad>``, which fills the slots of an image."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; special tokens are written out, broken UTF-8 becomes U+FFFD."""

    def _set_specials(self, ids: dict[str, int], path: Path) -> None:
        try:
            self.eos_id = ids["<|endoftext|>"]
            self.im_start_id = ids["<|im_start|>"]
            self.im_end_id = ids["<|im_end|>"]
            self.img_start_id = ids["<img>"]
            self.img_end_id = ids["</img>"]
            self.imgpad_id = ids["<imgpad>"]
        except KeyError as error:
            raise ValueError(f"tokenizer {path} has no special token {error.args[0]}") from None


class TiktokenTokenizer(Tokenizer):
    """Qwen v1's tokenizer, from its ``.tiktoken`` file. Text is normalised to NFC, as Qwen does."""

    def __init__(self, path: str | Path) -> None:
        import tiktoken  # noqa: PLC0415 - optional

        path = Path(path)
        ranks = _read_ranks(path)
        specials = {token: len(ranks) + index for index, token in enumerate(QWEN_SPECIALS)}
        self._encoding = tiktoken.Encoding(
            path.name, pat_str=_QWEN_PATTERN, mergeable_ranks=ranks, special_tokens=specials
        )
        self.vocab_size = len(ranks) + len(specials)
        self._set_specials(specials, path)

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``."""
        return self._encoding.encode(unicodedata.normalize("NFC", text), allowed_special="all")

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``."""
        return self._encoding.decode(list(ids), errors="replace")


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model with byte fallback, as :func:`train_sentencepiece` makes; text survives exactly."""

    def __init__(self, path: str | Path) -> None:
        import sentencepiece  # noqa: PLC0415 - optional

        path = Path(path)
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(path.read_bytes())
        except RuntimeError:
            raise ValueError(f"tokenizer {path} is not a SentencePiece model") from None
        model = self._model
        self.vocab_size = model.GetPieceSize()
        pieces = [model.IdToPiece(i) for i in range(self.vocab_size)]
        self._set_specials({piece: i for i, piece in enumerate(pieces)}, path)
        self._bytes = [
            bytes([int(piece[3:5], 16)]) if model.IsByte(i) else piece.replace(_SPACE_MARK, " ").encode()
            for i, piece in enumerate(pieces)
        ]
        byte_ids = {self._bytes[i]: i for i in range(self.vocab_size) if model.IsByte(i)}
        if len(byte_ids) != 256:
            raise ValueError(f"tokenizer {path} has no byte fallback, so it cannot write every text")
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


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer file by its suffix: ``.model`` (SentencePiece) or ``.tiktoken`` (Qwen v1).

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The suffix is neither, or the file is broken or lacks a special token.
        ImportError: The library that the file needs is not installed.
    """
    path = Path(path)
    kinds: dict[str, type[TiktokenTokenizer] | type[SentencePieceTokenizer]] = {
        ".tiktoken": TiktokenTokenizer,
        ".model": SentencePieceTokenizer,
    }
    if path.suffix not in kinds:
        raise ValueError(f"tokenizer {path} must end in .model (SentencePiece) or .tiktoken (Qwen)")
    if not path.is_file():
        raise FileNotFoundError(f"tokenizer {path} does not exist")
    try:
        return kinds[path.suffix](path)
    except ModuleNotFoundError as error:
        raise ImportError(f"tokenizer {path} needs the package {error.name}: pip install {error.name}") from None


def train_sentencepiece(texts: Iterable[str], out_path: str | Path, vocab_size: int) -> None:
    """Train a small SentencePiece model with Qwen's special tokens and write it to ``out_path``.

    Args:
        texts: Training texts; newlines and repeated spaces count.
        out_path: File to write, ending in ``.model``; an existing one is replaced.
        vocab_size: Most pieces wanted, special tokens and 256 bytes included; few texts may give fewer.

    Raises:
        ValueError: ``vocab_size`` is too small for the special tokens and the texts, or there are no texts.
    """
    import sentencepiece  # noqa: PLC0415 - optional

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
        raise ValueError(f"cannot train a tokenizer of {vocab_size} pieces: {reason}") from None
    out_path = Path(out_path)
    temporary = out_path.with_name(out_path.name + ".tmp")
    temporary.write_bytes(model.getvalue())
    temporary.replace(out_path)


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(f"tokenizer {path}, line {number}: expected a base64 token and its rank") from None
    if sorted(ranks.values()) != list(range(len(ranks))) or not ranks:
        raise ValueError(f"tokenizer {path}: ranks must run from 0 without gaps")
    return ranks
