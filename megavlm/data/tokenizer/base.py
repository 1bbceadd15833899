"""What every tokenizer offers, and the special tokens that a conversation needs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

from megavlm.config.errors import UserError

ROLES: dict[str, tuple[str, ...]] = {
    "eos": ("<|endoftext|>", "<|end_of_text|>", "</s>"),
    "im_start": ("<|im_start|>",),
    "im_end": ("<|im_end|>",),
    "img_start": ("<img>", "<|vision_start|>"),
    "img_end": ("</img>", "<|vision_end|>"),
    "imgpad": ("<imgpad>", "<|image_pad|>", "<image>"),
}
"""What a special token is for, and the names it goes by; the first that a file has is taken.

Where a file has none of a role's names, the first is appended after the file's ids, in the order given here.
Only ``eos`` is never appended: a file without one is an error.
"""


class Tokenizer(ABC):
    """Text to token ids and back. Special tokens written in the text become their single ids.

    That holds for the file's own special tokens and for the appended ones. Text that others wrote is to be
    checked for :attr:`control_ids` afterwards, as ``megavlm.data.chat`` does.
    """

    vocab_size: int
    """One more than the largest id, appended tokens included."""
    added: tuple[str, ...]
    """Names of the appended tokens; their ids are the last ones, in this order."""
    control_ids: frozenset[int]
    """Ids of the roles below: text that contains one would forge turns or image slots."""
    eos_id: int
    """Id of the token that ends a document, ``<|endoftext|>`` or ``</s>``."""
    im_start_id: int
    """Id of ``<|im_start|>``."""
    im_end_id: int
    """Id of ``<|im_end|>``."""
    img_start_id: int
    """Id of the token in front of an image, ``<img>`` or ``<|vision_start|>``."""
    img_end_id: int
    """Id of the token behind an image, ``</img>`` or ``<|vision_end|>``."""
    imgpad_id: int
    """Id of the token that fills the slots of an image, ``<imgpad>``, ``<|image_pad|>`` or ``<image>``."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``; nothing is put before or after it."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; special tokens are written out, broken UTF-8 becomes U+FFFD."""

    def _set_roles(self, known: Mapping[str, int], size: int, path: Path) -> dict[str, int]:
        """Take the roles from a file's tokens, append those that it lacks, and set all attributes.

        Args:
            known: Names and ids of the file's tokens.
            size: One more than the file's largest id.
            path: The file, for the error.

        Returns:
            Name and id of each role's token.

        Raises:
            UserError: The file has no token that ends a document.
        """
        found = {role: next((name for name in names if name in known), None) for role, names in ROLES.items()}
        if found["eos"] is None:
            names = ", ".join(ROLES["eos"])
            raise UserError(f"tokenizer {path} has no token that ends a document, which would be one of {names}")
        self.added = tuple(ROLES[role][0] for role, name in found.items() if name is None)
        self.vocab_size = size + len(self.added)
        appended = {name: size + index for index, name in enumerate(self.added)}
        tokens: dict[str, int] = {}
        for role, name in found.items():
            token = ROLES[role][0] if name is None else name
            tokens[token] = appended[token] if name is None else known[token]
            setattr(self, f"{role}_id", tokens[token])
        self.control_ids = frozenset(tokens.values())
        return tokens
