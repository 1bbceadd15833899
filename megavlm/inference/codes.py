"""Models whose pictures are tokens: their encoder alone, for ``megavlm prepare``; and pictures as answers.

Shape legend: P codes of a picture.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from numpy.typing import NDArray

from megavlm.checkpoint.base import base_for
from megavlm.checkpoint.distributed import load
from megavlm.checkpoint.paths import resolve
from megavlm.config import architecture as registry
from megavlm.config.errors import UserError
from megavlm.config.schema import ModelConfig, Recipe
from megavlm.data.codes import CodesCard, PictureCoder, image_words
from megavlm.data.decode import PilDecoder
from megavlm.data.images import ImageError
from megavlm.data.media import plan_of
from megavlm.data.tokenizer import Tokenizer
from megavlm.inference.checkpoint import recipe_at_layout
from megavlm.inference.sampling import Sampling
from megavlm.inference.session import Asked, Session
from megavlm.models.build import build_context
from megavlm.models.codes import encoder_digest
from megavlm.models.front import build_front
from megavlm.parallel.device import local_device
from megavlm.parallel.state import process_groups


class _PictureEncoder(MegatronModule):
    """The tower, under the name that its weights have in the whole model."""

    def __init__(self, vision: Any, config: TransformerConfig) -> None:
        super().__init__(config=config)
        self.vision = vision


@contextlib.contextmanager
def picture_coder(checkpoint: Path, *, pictures: bool) -> Iterator[PictureCoder]:
    """Load the encoder of a checkpoint, and nothing else of it, and yield what makes codes with it.

    Each picture is encoded by itself, decoded by PIL whatever decodes in training, in the checkpoint's
    ``training.precision``: its codes depend on nothing that stands beside it.

    Args:
        checkpoint: a published checkpoint, or a run's directory.
        pictures: whether the pictures will lie beside their codes.

    Raises:
        MissingFileError: there is no such checkpoint.
        UserError: its pictures are features, or become several views.
    """
    path = resolve(checkpoint)
    recipe = recipe_at_layout(path, [])
    card = _card(recipe, checkpoint, pictures=pictures)
    plan, decoder = plan_of(recipe.model), PilDecoder(recipe.data.image_alpha)
    registry.load()
    with process_groups(recipe.parallel, recipe.training.seed):
        vision, _ = build_front(recipe.model, build_context(recipe))
        module = _PictureEncoder(vision.to(local_device()).eval(), vision.config)
        load(base_for(path, recipe.checkpoint.load) or path, modules=[module])

        def encode(picture: bytes) -> NDArray[np.int64]:
            decoded = decoder.decode([picture], plan)
            if decoded.failed:
                raise ImageError(decoded.causes[0])
            with torch.inference_mode():
                codes_P11 = vision(decoded.pixels.to(local_device()))
            found: NDArray[np.int64] = codes_P11.flatten().cpu().numpy()
            return found

        yield PictureCoder(encode, card(encoder_digest(vision, recipe.model)))


def _card(recipe: Recipe, checkpoint: Path, *, pictures: bool) -> Any:
    """Return what makes the card of a checkpoint's codes from its encoder's digest.

    Raises:
        UserError: as :func:`picture_coder`.
    """
    model = recipe.model
    if model.vision.codes is None:
        raise UserError(
            f"--image-codes {checkpoint}: pictures of its tower {model.vision.preset!r} are features, not codes; name a"
            " checkpoint whose pictures are tokens (Chameleon), or leave it out"
        )
    plan, count = plan_of(model), model.vision.codes
    if not plan.fixed:
        raise UserError(
            f"--image-codes {checkpoint}: model.image.kind {model.image.kind} makes several views of a picture, whose"
            " codes are not stored; train from the pictures"
        )

    def made(encoder: str) -> CodesCard:
        image = image_words(plan, recipe.data.image_alpha)
        return CodesCard(encoder, image, count, plan.tokens_per_view, pictures, recipe.training.precision)

    return made


def check_says_pictures(recipe: Recipe, tokenizer: Tokenizer) -> None:
    """Check that a model's answer can be a picture.

    Raises:
        UserError: its pictures are features or several views, or its tokenizer has not their tokens.
    """
    tokens, plan = recipe.model.language.picture_tokens, plan_of(recipe.model)
    if tokens is None or not plan.fixed:
        raise UserError(
            f"--image-tokens: pictures of the tower {recipe.model.vision.preset!r} are no tokens of one view, so that"
            " none can be answered; leave it out"
        )
    if tokenizer.vocab_size < tokens[1]:
        raise UserError(
            f"--image-tokens: the tokenizer has {tokenizer.vocab_size} tokens, and pictures those up to {tokens[1] - 1}"
            " (model.language.image_tokens); name the checkpoint's own tokenizer"
        )


def answer_picture(model: Session, asked: Asked, sampling: Sampling) -> NDArray[np.int64]:
    """Answer a conversation with a picture, and return its [P] codes; a collective over the job.

    The template's token in front of a picture is written, then P tokens of pictures are chosen among these alone.

    Args:
        model: which :func:`check_says_pictures` has passed.
        asked: the conversation; the same on all ranks.
        sampling: how tokens are chosen.

    Raises:
        UserError: the conversation with the picture does not fit the context, or cannot be answered.
    """
    tokens = model.recipe.model.language.picture_tokens
    assert tokens is not None
    known = model.encoded(asked)
    assert known.tokens is not None
    ids, (begin, _) = model.tokenizer.ids, model.tokenizer.template.image
    lead = [ids[begin]] if begin else []
    known = replace(known, tokens=np.append(known.tokens, lead).astype(np.int64))
    count = plan_of(model.recipe.model).tokens_per_view
    said = model.answer(known, max_new_tokens=count, sampling=replace(sampling, only=tokens))
    chosen = [piece.token for piece in said if piece.token is not None]
    assert len(chosen) == count, "an answer of a picture ended early"
    return codes_of(np.asarray(chosen, np.int64), model.recipe.model)


def codes_of(tokens: NDArray[np.int64], model: ModelConfig) -> NDArray[np.int64]:
    """Return the rows of the published codebook that tokens of pictures mean.

    Args:
        tokens: of ``model.language.image_tokens``, in any shape.
        model: the model.
    """
    assert model.language.picture_tokens is not None
    found = tokens - model.language.picture_tokens[0]
    order = getattr(model.vision, "code_order", ())
    return np.argsort(np.asarray(order, np.int64))[found] if order else found
