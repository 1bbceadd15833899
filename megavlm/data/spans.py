"""Spans of a sample that the layers of a model are told of.

Positions that see each other both ways, by the model's kind of mask (``layers/two_way.py``), or pictures, whose tokens
have weights of their own (``layers/visual_expert.py``).

Of a model whose layers attend to pictures (``layers/cross.py``) the spans say who sees which: one for each picture.

A kind is a row of :data:`KINDS`: what it makes of one sample.

Shape legend: L tokens of a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megavlm.config.errors import UserError
from megavlm.config.schema import ModelConfig
from megavlm.data.template import Template

Span = tuple[int, int]
"""First position, and the one behind the last."""


@dataclass(frozen=True)
class TwoWaySpans:
    """How the spans of a sample follow from its tokens."""

    kind: str
    """Of :data:`KINDS`."""
    slot_id: int
    """Token of the slots of pictures."""

    def of(self, tokens: ArrayLike, prefix: int) -> list[Span]:
        """Return the spans of one sample, ascending.

        Args:
            tokens: [L] ids.
            prefix: how many of them stand in front of the first answer.
        """
        return KINDS[self.kind](np.asarray(tokens) == self.slot_id, prefix)

    def pack(self, samples: Sequence[ArrayLike], prefixes: Sequence[int]) -> NDArray[np.int64]:
        """Return [K, 2] of samples that stand one after the other; padding behind them has none."""
        found: list[Span] = []
        start = 0
        for tokens, prefix in zip(samples, prefixes, strict=True):
            found += [(start + a, start + b) for a, b in self.of(tokens, prefix)]
            start += len(np.asarray(tokens))
        return np.asarray(found, np.int64).reshape(-1, 2)


def _prefix(_slots_L: NDArray[np.bool_], prefix: int) -> list[Span]:
    """Everything in front of the first answer, pictures and words."""
    return [(0, prefix)] if prefix else []


def _images(slots_L: NDArray[np.bool_], _prefix: int) -> list[Span]:
    """Each run of slots: pictures with nothing between them are one, as in Transformers' Gemma 3."""
    changes = np.flatnonzero(np.diff(slots_L.astype(np.int8), prepend=0, append=0))
    return [(int(start), int(stop)) for start, stop in changes.reshape(-1, 2)]


def _cross(slots_L: NDArray[np.bool_], _prefix: int) -> list[Span]:
    """From each picture's token up to the next one's, or to the end of the sample."""
    return [(int(start), int(stop)) for start, stop in pairwise([*np.flatnonzero(slots_L), len(slots_L)])]


KINDS: dict[str, Callable[[NDArray[np.bool_], int], list[Span]]] = {
    "prefix": _prefix, "images": _images, "cross": _cross,
}  # fmt: skip
"""By ``LanguageConfig.spans``: from [L] which tokens are slots, and how many
stand in front of the first answer."""


def spans_of(model: ModelConfig, image_token_id: int) -> TwoWaySpans | None:
    """Return how a model's spans are made; None where its layers need not know of any."""
    kind = model.language.spans
    return None if kind is None else TwoWaySpans(kind, image_token_id)


def check_spans(spans: TwoWaySpans | None, template: Template) -> None:
    """Check that no token is trained on that the position in front of it sees.

    Raises:
        UserError: the template trains what stands in front of an answer.
    """
    if spans is not None and spans.kind == "prefix" and not template.trains_answers_only:
        raise UserError(
            f"model.template: {template.name} trains on tokens in front of an answer, which see each other in this"
            " model (a prefix, or an encoder); name one that trains on answers alone, such as paligemma or pali3"
        )
