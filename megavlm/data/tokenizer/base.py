"""What every tokenizer offers, and the control tokens that its template needs."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from megavlm.config.errors import UserError
from megavlm.data.template import Template

# Special tokens that texts are made of, such as boxes: they forge nothing. The unknown token stands for any text.
_IN_TEXTS = re.compile(
    r"</?(ref|box|quad|point|unk)>|<(loc|seg)\d+>|<\|(object_ref|box|quad)_(start|end)\|>|<\|unk\|>|\[UNK\]"
)


class Tokenizer(ABC):
    """Text to token ids and back. Special tokens written in the text become their single ids.

    That holds for the file's own special tokens and for the appended ones. Text that others wrote is to be
    checked for :attr:`control_ids` afterwards, as ``megavlm.data.chat`` does.
    """

    template: Template
    """How conversations are written; its control tokens are in the vocabulary."""
    vocab_size: int
    """One more than the largest id, appended tokens included."""
    added: tuple[str, ...]
    """Names of the appended tokens; their ids are the last ones, in this order."""
    ids: dict[str, int]
    """Ids of the template's control tokens and its slot, by the names that the template calls them."""
    spelled: dict[str, str]
    """What the file calls these, by the same names: decoding an id may write it otherwise."""
    control_ids: frozenset[int]
    """Ids of these, of :attr:`eos_id` and of the file's special tokens: text that contains one would forge turns or
    image slots."""
    eos_id: int
    """Id of the token that ends a document, ``<|endoftext|>`` or ``</s>``."""
    imgpad_id: int
    """Id of the token that fills the slots of an image."""
    stop_ids: tuple[int, ...]
    """Ids that end an answer: the template's, then :attr:`eos_id`."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``; nothing is put before or after it."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; special tokens are written out, broken UTF-8 becomes U+FFFD."""

    def _take_tokens(
        self, known: Mapping[str, int], size: int, path: Path, template: Template, specials: Iterable[str] = ()
    ) -> dict[str, int]:
        """Take the control tokens from a file's tokens, append those that it lacks, and set all attributes.

        What is appended comes after the file's ids, in the order of the template.

        Args:
            known: Names and ids of the file's tokens.
            size: One more than the file's largest id.
            path: The file, for the error.
            template: Whose tokens they are.
            specials: Names of the file's special tokens; those that texts are made of are let through.

        Returns:
            Name and id of each control token.

        Raises:
            UserError: The file has no token that ends a document, or lacks one that the template does not append.
        """
        eos = next((name for name in template.eos if name in known), None)
        if eos is None:
            names = ", ".join(template.eos)
            raise UserError(
                f"tokenizer {path} has no token that ends a document, which would be one of {names} "
                f"(model.template: {template.name})"
            )
        tokens, added, self.ids, self.spelled = {eos: known[eos]}, [], {}, {}
        for token in (*template.tokens, template.slot):
            name = next((name for name in token.names if name in known), None)
            if name is None and not token.appended:
                raise UserError(
                    f"model.template: {template.name} needs the token {' or '.join(token.names)}, which tokenizer "
                    f"{path} has not; name the template that this model was made for"
                )
            if name is None:
                name = token.name
                added.append(name)
            number = known.get(name, size + len(added) - 1)
            tokens[name] = self.ids[token.name] = number
            self.spelled[token.name] = name
        self.template = template
        self.added, self.vocab_size = tuple(added), size + len(added)
        self.eos_id, self.imgpad_id = known[eos], self.ids[template.slot.name]
        named = [self.ids[name] for name in template.stops]
        self.stop_ids = tuple(dict.fromkeys([*named, *template.stop_ids, self.eos_id]))
        guarded = [known[name] for name in specials if name in known and not _IN_TEXTS.fullmatch(name)]
        self.control_ids = frozenset([*tokens.values(), *guarded])
        return tokens
