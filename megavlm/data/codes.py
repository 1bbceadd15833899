"""Pictures as codes in shards: ``megavlm prepare --image-codes`` encodes them once, and training reads tokens.

A shard has the codes of a picture in a member of their own (``codes0`` beside ``img0``, or in its place), as
little-endian integers and nothing else: 16 bits where the codebook allows it, else 32. What they are of lies in
:data:`CARD` beside the shards: the encoder's weights, what became of pictures, how many codes there are. A model reads
codes of its own encoder and of its own image plan alone.

Shape legend: P codes of a picture, T positions of a sample, S of them slots of pictures.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megavlm.config.errors import UserError
from megavlm.config.schema import Recipe
from megavlm.data.batch import IGNORE_INDEX
from megavlm.data.chat import EncodedSample
from megavlm.data.media import ImagePlan, plan_of

CARD = "codes.json"
"""What the codes of a data set are of."""
_VERSION = 1
_REMEDY = "run megavlm prepare --image-codes again"


class CodesError(ValueError):
    """Codes that are not a picture's; the text is a short cause, with the remedy."""


@dataclass(frozen=True)
class CodesCard:
    """What the codes of a data set are of."""

    encoder: str
    """SHA-256 of the encoder: its weights, and how its pixels are normalised (``megavlm.models.codes``)."""
    image: str
    """What becomes of a picture: its plan in words."""
    num_codes: int
    """Rows of the codebook."""
    per_picture: int
    """P."""
    pictures: bool
    """Whether the pictures lie beside their codes."""
    precision: str
    """``training.precision`` that the encoder ran in; for people."""
    version: int = _VERSION

    def to_json(self) -> str:
        """Return the file's text."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


@dataclass(frozen=True)
class PictureCoder:
    """Makes codes of pictures while a data set is prepared."""

    encode: Callable[[bytes], NDArray[np.int64]]
    """[P] codes of an encoded image file; raises an ``ImageError`` where it cannot be decoded."""
    card: CodesCard

    def member(self, picture: bytes) -> bytes:
        """Return the member of a shard that holds a picture's codes."""
        return self.encode(picture).astype(_dtype(self.card.num_codes)).tobytes()


@dataclass(frozen=True)
class PictureTokens:
    """How a model reads codes of shards."""

    first: int
    """Token of code 0; the others follow it."""
    num_codes: int
    per_picture: int
    image: str
    """As :attr:`CodesCard.image`."""
    weight: float
    """What the loss of predicting a picture's token is multiplied by; 0 where none is predicted."""
    encoder: str | None = None
    """As :attr:`CodesCard.encoder`; None where there are no weights to compare with."""

    def read(self, members: Sequence[bytes]) -> NDArray[np.int64]:
        """Return [S] tokens of a sample's pictures, of their members of the shard.

        Raises:
            CodesError: one is damaged.
        """
        width = np.dtype(_dtype(self.num_codes))
        if any(len(one) != self.per_picture * width.itemsize for one in members):
            raise CodesError(f"codes of a picture are not {self.per_picture}; {_REMEDY}")
        codes = np.frombuffer(b"".join(members), width).astype(np.int64)
        if codes.size and not 0 <= int(codes.min()) <= int(codes.max()) < self.num_codes:
            raise CodesError(f"a code of a picture is not from 0 to {self.num_codes - 1}; {_REMEDY}")
        return codes + self.first

    def written(self, sample: EncodedSample, tokens: NDArray[np.int64], slot_id: int) -> EncodedSample:
        """Return a sample with its pictures' tokens in their slots, which are predicted where they have a weight.

        Args:
            sample: with ``slot_id`` in every slot.
            tokens: [S] what :meth:`read` returned.
            slot_id: token of a slot.
        """
        slots = sample.tokens == slot_id
        ids, labels, weights = sample.tokens.copy(), sample.labels.copy(), sample.weights
        ids[slots] = tokens
        labels[slots] = tokens if self.weight else IGNORE_INDEX
        if self.weight not in (0.0, 1.0):
            weights = np.ones(len(ids), np.float32) if weights is None else weights.copy()
            weights[slots] *= self.weight
        return replace(sample, tokens=ids, labels=labels, weights=weights)


def codes_in(files: Mapping[str, Any], count: int) -> list[bytes] | None:
    """Return the codes of a sample's ``count`` pictures; None where a picture has none, or there are no pictures."""
    names = [f"codes{number}" for number in range(count)]
    return [files[name] for name in names] if count and all(name in files for name in names) else None


def picture_tokens(recipe: Recipe, encoder: str | None = None) -> PictureTokens | None:
    """Return how a model reads codes of shards; None where its pictures are features, or several views.

    Args:
        recipe: the run.
        encoder: digest of its encoder; None where its weights are not here.
    """
    model = recipe.model
    if model.language.picture_tokens is None:
        return None
    if not (plan := plan_of(model)).fixed:
        return None
    first, stop = model.language.picture_tokens
    image = image_words(plan, recipe.data.image_alpha)
    return PictureTokens(first, stop - first, plan.tokens_per_view, image, recipe.loss.image_tokens, encoder)


def image_words(plan: ImagePlan, alpha: str) -> str:
    """Return in words what becomes of a picture before it is encoded.

    Args:
        plan: the image plan.
        alpha: ``data.image_alpha``.
    """
    return f"{plan!r}, image_alpha={alpha!r}"


def read_card(directory: str | Path) -> CodesCard | None:
    """Return what the codes of a prepared data set are of; None where it has none.

    Raises:
        UserError: the file is damaged, or of another version.
    """
    path = Path(directory) / CARD
    if not path.is_file():
        return None
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        version = tree.get("version")
        card = CodesCard(**tree) if version == _VERSION else None
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path} is damaged; {_REMEDY}") from None
    if card is None:
        raise UserError(f"{path} is of version {version!r}, this megavlm's is {_VERSION}; {_REMEDY}")
    return card


def check_codes(directory: str | Path, tokens: PictureTokens | None) -> None:
    """Check that a model can read a data set's codes.

    Args:
        directory: of the data set.
        tokens: how the model reads codes; None where pixels are wanted.

    Raises:
        UserError: they are of another encoder, another image plan or another codebook; or pixels are wanted, and the
            data set has codes alone.
    """
    if (card := read_card(directory)) is None:
        return
    path = Path(directory) / CARD
    if tokens is None:
        if not card.pictures:
            raise UserError(
                f"{path}: the data set has codes in the place of pictures (prepare --codes-only), and pixels are"
                " wanted here; prepare it again without --codes-only"
            )
        return
    pairs = {
        "num_codes": (card.num_codes, tokens.num_codes, "model.language.image_tokens"),
        "per_picture": (card.per_picture, tokens.per_picture, "model.vision"),
        "image": (card.image, tokens.image, "model.image, data.image_alpha"),
        "encoder": (card.encoder, tokens.encoder, "the weights of model.vision"),
    }
    for name, (theirs, ours, key) in pairs.items():
        if ours is not None and theirs != ours:
            raise UserError(
                f"{path}: {name} is {theirs}, this run's is {ours} ({key}); {_REMEDY} with this run's checkpoint, or"
                " train the model that the codes are of"
            )


def _dtype(num_codes: int) -> str:
    return "<i2" if num_codes <= 1 << 15 else "<i4"
