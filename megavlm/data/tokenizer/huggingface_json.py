"""Hugging Face's ``tokenizer.json``. It is data: the ``tokenizers`` library reads it, and nothing in it is executed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megavlm.config.errors import UserError
from megavlm.data.template import Template
from megavlm.data.templates import QWEN_VL
from megavlm.data.tokenizer.base import Tokenizer
from megavlm.data.tokenizer.beside import tokens_beside


class HFTokenizer(Tokenizer):
    """A ``tokenizer.json``, as Qwen2, Llama 3 and LLaVA have it.

    Text is encoded without the post-processor, so no BOS is put in front. Of the files beside it the ids of special
    tokens are read, and they must agree.
    Where the file's rules put a space before text (Llama's do), the library takes it away again when it
    decodes, but only at the very start of the ids: an answer comes back as it was, a whole conversation shows
    a space after its special tokens.
    """

    def __init__(self, path: str | Path, template: Template = QWEN_VL) -> None:
        import tokenizers  # noqa: PLC0415 - only where such a file is read

        path = Path(path)
        text, stated = _read(path)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"tokenizer {path} is not a tokenizer.json: {str(error).splitlines()[0]}") from None
        # A file may carry these from the program that wrote it; text would be cut short silently.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._check(stated, path)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        beside = tokens_beside(path, vocabulary)
        for name, number in sorted(beside.items(), key=lambda item: item[1]):
            if name not in vocabulary:
                self._tokenizer.add_special_tokens([tokenizers.AddedToken(name, normalized=False, special=True)])
                vocabulary[name] = number
        self._check(beside, path)
        special = [token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special]
        tokens = self._take_tokens(vocabulary, max(vocabulary.values()) + 1, path, template, special)
        # Also those that the file has as ordinary pieces: they keep their ids, and become whole tokens.
        whole = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        self._tokenizer.add_special_tokens(
            [tokenizers.AddedToken(name, normalized=False, special=True) for name in tokens if name not in whole]
        )
        self._check(tokens, path)

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def _check(self, wanted: dict[str, int], path: Path) -> None:
        """Refuse ids other than ``wanted``: the library numbers added tokens itself, whatever the file says."""
        for name, number in wanted.items():
            given = self._tokenizer.token_to_id(name)
            if given != number:
                raise UserError(
                    f"tokenizer {path} has gaps in its ids: {name} is {number}, but the tokenizers library makes it"
                    f" {given}; write the file without gaps"
                )


def _read(path: Path) -> tuple[str, dict[str, int]]:
    """The file's text, and the ids that it gives to its added tokens."""
    try:
        text = path.read_text(encoding="utf-8")
        tree: Any = json.loads(text)
        return text, {token["content"]: token["id"] for token in tree.get("added_tokens") or ()}
    except (ValueError, RecursionError) as error:  # not UTF-8, or not JSON
        raise UserError(f"tokenizer {path} is not valid JSON: {error}") from None
    except (AttributeError, KeyError, TypeError):
        raise UserError(f"tokenizer {path} is not a tokenizer.json") from None
