"""Tokenizers: Qwen's tiktoken file, Hugging Face's ``tokenizer.json``, and SentencePiece models.

A file's suffix says which it is. Importing this package loads neither torch nor a tokenizer library.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megavlm.config.errors import MissingFileError, UserError
from megavlm.data.tokenizer.base import ROLES, Tokenizer
from megavlm.data.tokenizer.files import TOKENIZER_FILES, check_vocabulary, files_of, find_tokenizer, with_tokenizer
from megavlm.data.tokenizer.huggingface_json import HFTokenizer
from megavlm.data.tokenizer.sentencepiece_model import (
    SENTENCEPIECE_SPECIALS,
    PlainSentencePieceTokenizer,
    SentencePieceTokenizer,
    load_sentencepiece,
    train_sentencepiece,
)
from megavlm.data.tokenizer.tiktoken_file import QWEN_SPECIALS, TiktokenTokenizer

__all__ = [
    "QWEN_SPECIALS",
    "ROLES",
    "SENTENCEPIECE_SPECIALS",
    "TOKENIZER_FILES",
    "HFTokenizer",
    "PlainSentencePieceTokenizer",
    "SentencePieceTokenizer",
    "TiktokenTokenizer",
    "Tokenizer",
    "check_vocabulary",
    "files_of",
    "find_tokenizer",
    "load_tokenizer",
    "train_sentencepiece",
    "with_tokenizer",
]

_KINDS: dict[str, Callable[[Path], Tokenizer]] = {
    ".tiktoken": TiktokenTokenizer,
    ".json": HFTokenizer,
    ".model": load_sentencepiece,
}


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer file by its suffix.

    Args:
        path: ``.tiktoken`` (Qwen v1), ``.json`` (Hugging Face) or ``.model`` (SentencePiece).

    Raises:
        MissingFileError: There is no such file.
        UserError: The suffix is none of these, or the file is broken or has no token that ends a document.
        ImportError: The library that the file needs is not installed.
    """
    path = Path(path)
    if path.suffix not in _KINDS:
        raise UserError(
            f"tokenizer {path} must end in .model (SentencePiece), .json (Hugging Face) or .tiktoken (Qwen)"
        )
    if not path.is_file():
        raise MissingFileError(f"tokenizer {path} does not exist")
    try:
        return _KINDS[path.suffix](path)
    except ModuleNotFoundError as error:
        raise ImportError(f"tokenizer {path} needs the package {error.name}: pip install {error.name}") from None
