"""Tokenizers: Qwen's tiktoken file, Hugging Face's ``tokenizer.json``, and SentencePiece models.

A file's suffix says which it is. Importing this package loads neither torch nor a tokenizer library.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megavlm.config.errors import MissingFileError, UserError
from megavlm.config.schema import Recipe
from megavlm.data.schema import Turn, check_text
from megavlm.data.template import Template, TemplateError
from megavlm.data.templates import QWEN_VL, template_of
from megavlm.data.tokenizer.base import Tokenizer
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
    "image_tokens",
    "load_tokenizer",
    "template_of",
    "tokenizer_of",
    "train_sentencepiece",
    "with_tokenizer",
]

_KINDS: dict[str, Callable[[Path, Template], Tokenizer]] = {
    ".tiktoken": TiktokenTokenizer,
    ".json": HFTokenizer,
    ".model": load_sentencepiece,
}


def tokenizer_of(recipe: Recipe) -> Tokenizer:
    """Load the tokenizer of a recipe, whose ``data.tokenizer`` is a file, for its template.

    Raises:
        UserError: ``model.template`` is unknown, or the file lacks a token that it needs.
        RecipeError: the embedding has fewer rows than the tokenizer has tokens.
        ValueError: the file is broken.
        ImportError: the library that the file needs is not installed.
    """
    assert recipe.data.tokenizer is not None  # the command line found the file
    path = Path(recipe.data.tokenizer)
    tokenizer = load_tokenizer(path, template_of(recipe.model.template, path))
    check_vocabulary(recipe, tokenizer)
    if recipe.data.system_message:
        check_system(tokenizer, recipe.data.system_message)
    return tokenizer


def check_system(tokenizer: Tokenizer, message: str) -> None:
    """Check that a tokenizer's template has a place for the recipe's system message, which is text.

    Raises:
        UserError: it has none, or every sample would be left out as the message contains a control token.
    """
    try:
        check_text(message)
        forged = tokenizer.control_ids.intersection(tokenizer.encode(message))
        if forged:
            raise UserError(f"text contains the control token {tokenizer.decode([min(forged)])}")
    except UserError as error:
        raise UserError(f"data.system_message: {error}; leave it out: the template writes such tokens") from None
    try:
        tokenizer.template.spans([Turn("system", message), Turn("user", "?")], prompt=True)
    except TemplateError as error:
        raise UserError(f"data.system_message: {error}") from None


def image_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Return the ids of ``image``, which fills an image's slots, and of ``image_start`` where there is one."""
    begin = tokenizer.ids.get(tokenizer.template.image[0].strip())
    return {"image": tokenizer.imgpad_id} | ({} if begin is None else {"image_start": begin})


def load_tokenizer(path: str | Path, template: Template = QWEN_VL) -> Tokenizer:
    """Load a tokenizer file by its suffix, for a template.

    Args:
        path: ``.tiktoken`` (Qwen v1), ``.json`` (Hugging Face) or ``.model`` (SentencePiece).
        template: How conversations are written, and which control tokens that takes.

    Raises:
        MissingFileError: There is no such file.
        UserError: The suffix is none of these, or the file is broken, has no token that ends a document, or lacks
            one of the template's.
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
        tokenizer = _KINDS[path.suffix](path, template)
    except ModuleNotFoundError as error:
        raise ImportError(f"tokenizer {path} needs the package {error.name}: pip install {error.name}") from None
    if template.stop_text:
        # Text, so the id that it has behind other text, or the first; none where it would be a part of a longer piece.
        known, whole = tokenizer.encode("a"), tokenizer.encode("a" + template.stop_text)
        if whole[: len(known)] == known and len(whole) > len(known):
            tokenizer.stop_ids = (whole[len(known)], *tokenizer.stop_ids)
    return tokenizer
