"""Pictures that are tokens of the vocabulary: which encoder makes them, and whether the model says them itself."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from megavlm.config.schema import ModelConfig, Recipe
from megavlm.data.codes import PictureTokens, picture_tokens
from megavlm.models.build import unwrap


def encoder_digest(vision: torch.nn.Module, model: ModelConfig) -> str:
    """Return the SHA-256 of a tower: its weights as bf16 holds them, and how its pixels are normalised.

    So the same weights in fp32 and in bf16 have the same.
    """
    settings: Any = model.vision
    digest = hashlib.sha256(repr((settings.image_size, settings.image_mean, settings.image_std)).encode())
    if order := getattr(settings, "code_order", ()):
        digest.update(repr(order).encode())
    for name, weight in sorted(vision.named_parameters()):
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().to(torch.bfloat16).contiguous().view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()


def tokens_of(recipe: Recipe, chunk: Any) -> PictureTokens | None:
    """Return how a run reads codes of shards: of its own encoder, where this chunk holds it."""
    if recipe.model.language.picture_tokens is None:
        return None
    vision = unwrap(chunk).vision
    return picture_tokens(recipe, None if vision is None else encoder_digest(vision, recipe.model))


def say_pictures(chunks: Sequence[Any], said: bool) -> None:
    """Let the logits of pictures' tokens be the model's own, or take them out of the softmax (as they are built)."""
    for language in _speakers(chunks):
        language.says_pictures = said


@contextlib.contextmanager
def saying_pictures(chunks: Sequence[Any], said: bool) -> Iterator[None]:
    """Do so inside the block."""
    before = [(language, language.says_pictures) for language in _speakers(chunks)]
    say_pictures(chunks, said)
    try:
        yield
    finally:
        for language, was in before:
            language.says_pictures = was


def _speakers(chunks: Sequence[Any]) -> list[Any]:
    """Return the language models, of chunks that give logits, whose pictures are tokens."""
    found = [unwrap(chunk).language for chunk in chunks]
    return [language for language in found if hasattr(language, "says_pictures")]
