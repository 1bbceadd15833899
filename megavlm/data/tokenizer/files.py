"""Which file is the tokenizer: of a Hugging Face directory, of a checkpoint, of a recipe."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from megavlm.config import yaml12
from megavlm.config.errors import RecipeError
from megavlm.config.schema import Recipe
from megavlm.data.tokenizer.base import Tokenizer
from megavlm.data.tokenizer.beside import ID_FILES

TOKENIZER_FILES = (
    "*.tiktoken",
    "tokenizer.json",
    "*.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
)
"""Patterns of the files that go along with a tokenizer when a model is converted. None of them is code."""

CHECKPOINT_FOLDER = "hf"
"""Subdirectory of a checkpoint that holds the tokenizer and its files."""

_KINDS = "*.tiktoken, tokenizer.json or *.model"


def find_tokenizer(directory: Path) -> Path | None:
    """Return the tokenizer file in a directory.

    A ``.tiktoken`` file comes first (Qwen v1 has no other), then ``tokenizer.json``, then ``tokenizer.model``,
    then a ``.model`` file if it is the only one.

    Returns:
        The file, or None where there is none that :func:`megavlm.data.tokenizer.load_tokenizer` reads.
    """
    models = sorted(directory.glob("*.model"))
    candidates = [
        *sorted(directory.glob("*.tiktoken")),
        directory / "tokenizer.json",
        directory / "tokenizer.model",
        *(models if len(models) == 1 else []),
    ]
    return next((path for path in candidates if path.is_file()), None)


def files_of(tokenizer: Path) -> list[Path]:
    """Return a tokenizer's file and those beside it that say ids of its tokens."""
    return [tokenizer, *(path for name in ID_FILES if (path := tokenizer.parent / name).is_file())]


def with_tokenizer(recipe: Recipe, checkpoint: Path | None = None) -> Recipe:
    """Return ``recipe`` with ``data.tokenizer`` as the absolute path of a file.

    Null means the checkpoint's: the file in its ``hf`` directory, else the one that its own recipe names. So does
    the name that stands in the checkpoint's recipe, where that file is gone.

    Args:
        recipe: The recipe; its tokenizer may be a file, a directory or null.
        checkpoint: The checkpoint that null refers to, if there is one.

    Raises:
        RecipeError: There is no such file.
    """
    given = recipe.data.tokenizer
    named = None if checkpoint is None else _named_by(checkpoint)
    found: Path | None = None
    if given is not None:
        found = _file(Path(given))
        if found is None and given != named:
            if Path(given).is_dir():
                raise RecipeError(
                    f"data.tokenizer: {given!r} holds no tokenizer ({_KINDS}); give the path of a tokenizer file"
                )
            raise RecipeError(f"data.tokenizer: no file {given!r}; give the path of a tokenizer file")
    elif checkpoint is None:
        raise RecipeError(
            "data.tokenizer: null takes it from checkpoint.load, and that is null as well; set one of the two"
        )
    if found is None:
        assert checkpoint is not None
        found = find_tokenizer(checkpoint / CHECKPOINT_FOLDER) or (_file(Path(named)) if named else None)
    if found is None:
        also = f", and {named!r}, which its recipe names, is gone" if named else ""
        raise RecipeError(
            f"data.tokenizer: {checkpoint} has no tokenizer ({_KINDS}) in {CHECKPOINT_FOLDER}/{also};"
            " set it to the path of a tokenizer file"
        )
    # Not resolved: a download cache links to files whose names say nothing about their kind.
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, tokenizer=str(found.absolute())))


def _file(path: Path) -> Path | None:
    if path.is_dir():
        return find_tokenizer(path)
    return path if path.is_file() else None


def _named_by(checkpoint: Path) -> str | None:
    """The tokenizer that the checkpoint's recipe names."""
    try:
        tree = yaml12.parse((checkpoint / "recipe.yaml").read_text(encoding="utf-8"))
        name = tree["data"]["tokenizer"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return name if isinstance(name, str) else None


def check_vocabulary(recipe: Recipe, tokenizer: Tokenizer) -> None:
    """Check that the embedding has a row for each token.

    Raises:
        RecipeError: it has not.
    """
    rows = recipe.model.language.vocab_size
    if tokenizer.vocab_size > rows:
        raise RecipeError(
            f"model.language.vocab_size: {rows} rows, but {recipe.data.tokenizer} has {tokenizer.vocab_size} tokens; "
            f"set it to {tokenizer.vocab_size} or more"
        )
