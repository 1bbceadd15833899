"""Mixes of samples for the benchmarks.

``vs_transformers`` takes tokens, labels and decoded pixels, written once and read by both systems (:func:`make`).
``pipeline_balance`` needs only how long samples are and how many images they have (:func:`shapes`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megavlm.data.batch import IGNORE_INDEX
from megavlm.data.chat import encode_conversation
from megavlm.data.images import decode_with_pil
from megavlm.data.schema import parse_conversation
from megavlm.data.tokenizer import load_tokenizer, train_sentencepiece
from megavlm.quickstart.render import render_dataset

IMAGE_SIZE = 64
TOKENS_PER_IMAGE = 64
VOCABULARY = 4096
IMAGE_TOKEN = VOCABULARY - 1
PAD_TOKEN = 0
SYSTEM_MESSAGE = "You are a helpful assistant."

# LLaVA-1.5's fine-tuning data in small. At full scale an image is 576 tokens and a sample at most 2048; here an
# image is 64 tokens, so every length is divided by 9. 6 % of the samples are text alone (ShareGPT: 40k of 665k).
_SCALE = 576 / TOKENS_PER_IMAGE
_LONGEST = 2048 / _SCALE
_TEXT_ONLY = 0.06

DESCRIPTIONS = {
    "quickstart": "the quickstart's pictures and questions as `render_dataset` makes them",
    "llava-like": "random tokens, all lengths divided by 9 (an image is 64 tokens instead of 576): 94 % of the samples "
    "have one image and log-normal text (median 200, sigma 0.6), 6 % are text alone (median 1100, sigma 0.8), cut at "
    "2048; our approximation of LLaVA-1.5's published mixture, not measured on it",
    "equal lengths": "control without any padding: random tokens, every sample 128 long with one image",
}


@dataclass(frozen=True)
class Sample:
    """One conversation."""

    tokens: NDArray[np.int64]
    """[T] token ids; image slots hold IMAGE_TOKEN."""
    labels: NDArray[np.int64]
    """[T] the position's own token where it is trained on, else IGNORE_INDEX; not shifted."""
    pixels: NDArray[np.uint8]
    """[N, 3, H, W]."""

    def __len__(self) -> int:
        """Tokens."""
        return len(self.tokens)


FULL_IMAGE = 258
"""Tokens of an image with its two borders, at full scale (Qwen-VL's resampler)."""
FULL_LONGEST = 2048
"""Longest sample at full scale, in tokens."""


@dataclass(frozen=True)
class Kind:
    """A part of a full-scale mix."""

    share: float
    """Samples of this kind, in any unit."""
    images: tuple[int, ...]
    """Numbers of images, each as likely."""
    median: float
    """Median of the text in tokens; it is log-normal."""
    sigma: float = 0.6
    """Standard deviation of its logarithm."""


# Shares of stage 2 are Qwen-VL's published numbers of samples, in millions; all lengths are our guesses.
FULL_SCALE = {
    "captions": (Kind(1, (1,), 30, 0.5),),
    "llava-like": (Kind(94, (1,), 200), Kind(6, (0,), 1100, 0.8)),
    "multi-image": (Kind(50, (1,), 150), Kind(30, (2, 3, 4), 150), Kind(20, (0,), 400, 0.8)),
    "qwen-vl stage 2": (
        Kind(19.7, (1,), 25, 0.4),  # captions
        Kind(3.6, (1,), 20, 0.4),  # VQA
        Kind(3.5 + 8.7, (1,), 30, 0.4),  # grounding and referring
        Kind(8.7, (1,), 60, 0.4),  # grounded captions
        Kind(24.8, (1,), 300, 0.8),  # OCR
        Kind(7.8, (0,), 500, 0.9),  # text
    ),
    "long text": (Kind(50, (1,), 60), Kind(50, (0,), 1400, 0.6)),
}
FULL_SCALE_DESCRIPTIONS = {
    "captions": "one image and some 30 tokens: all packs have equally many images by themselves",
    "llava-like": "94 % one image and some 200 tokens, 6 % text of some 1100 (LLaVA-1.5's shares)",
    "multi-image": "50 % one image, 30 % two to four, some 150 tokens each; 20 % text of some 400",
    "qwen-vl stage 2": "Qwen-VL's published shares of captions, VQA, grounding, OCR and text",
    "long text": "half captions of some 60 tokens, half text of some 1400, cut at 2048: many packs hold one text and "
    "little else, whatever the packer does",
}


def shapes(name: str, seed: int) -> Iterator[tuple[int, int]]:
    """Yield (tokens, images) of the samples of a full-scale mix, without end."""
    kinds = FULL_SCALE[name]
    rng = np.random.default_rng(seed)
    shares = np.array([kind.share for kind in kinds]) / sum(kind.share for kind in kinds)
    while True:
        for index in rng.choice(len(kinds), size=1000, p=shares):
            kind = kinds[index]
            images = int(rng.choice(kind.images))
            text = rng.lognormal(np.log(kind.median), kind.sigma)
            yield FULL_IMAGE * images + int(np.clip(text, 8, FULL_LONGEST - FULL_IMAGE * images)), images


def make(name: str, folder: Path, count: int, seed: int = 1) -> list[Sample]:
    """Return the samples of the mix called ``name``."""
    if name == "quickstart":
        return _quickstart(folder / "rendered", count, seed)
    rng = np.random.default_rng(seed)
    if name == "llava-like":
        return [_llava_like(rng) for _ in range(count)]
    return [_random_sample(rng, images=1, text=128 - TOKENS_PER_IMAGE) for _ in range(count)]


def _quickstart(folder: Path, images: int, seed: int) -> list[Sample]:
    data = render_dataset(folder, train_images=images, heldout_images=2, image_size=IMAGE_SIZE, seed=seed)
    records = [parse_conversation(record) for record in json.loads(data.train_json.read_text())]
    texts = [turn.text for record in records for turn in record.turns]
    model = folder / "tokenizer.model"
    train_sentencepiece([*texts, SYSTEM_MESSAGE, "system\nuser\nassistant\n"], model, 512)
    tokenizer = load_tokenizer(model)
    samples = []
    for record in records:
        encoded = encode_conversation(record, tokenizer, [(TOKENS_PER_IMAGE,)] * len(record.images), SYSTEM_MESSAGE)
        tokens = np.where(encoded.tokens == tokenizer.imgpad_id, IMAGE_TOKEN, encoded.tokens)
        pictures = [decode_with_pil((data.images_dir / path).read_bytes()) for path in record.images]
        samples.append(Sample(tokens, encoded.labels, _stack(np.asarray(picture) for picture in pictures)))
    return samples


def _stack(pictures: Iterable[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    stack = [picture.transpose(2, 0, 1) for picture in pictures]
    return np.stack(stack) if stack else np.zeros((0, 3, IMAGE_SIZE, IMAGE_SIZE), np.uint8)


def _llava_like(rng: np.random.Generator) -> Sample:
    text_only = rng.random() < _TEXT_ONLY
    median, sigma = (1100, 0.8) if text_only else (200, 0.6)
    text = rng.lognormal(np.log(median / _SCALE), sigma)
    room = _LONGEST if text_only else _LONGEST - TOKENS_PER_IMAGE
    return _random_sample(rng, images=0 if text_only else 1, text=int(np.clip(text, 4, room)))


def _random_sample(rng: np.random.Generator, *, images: int, text: int) -> Sample:
    """Image slots, then random text; the last 60 % of the text are supervised."""
    slots = images * TOKENS_PER_IMAGE
    tokens = np.concatenate([np.full(slots, IMAGE_TOKEN), rng.integers(1, IMAGE_TOKEN, text)])
    labels = np.where(np.arange(slots + text) < slots + 0.4 * text, IGNORE_INDEX, tokens)
    pixels = rng.integers(0, 256, (images, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
    return Sample(tokens, labels, pixels)


def save(samples: list[Sample], path: Path) -> None:
    """Write samples to ``path`` (.npz)."""
    np.savez(
        path,
        lengths=[len(sample) for sample in samples],
        images=[len(sample.pixels) for sample in samples],
        tokens=np.concatenate([sample.tokens for sample in samples]),
        labels=np.concatenate([sample.labels for sample in samples]),
        pixels=np.concatenate([sample.pixels for sample in samples]),
    )


def load(path: Path) -> list[Sample]:
    """Read what :func:`save` wrote."""
    with np.load(path) as data:
        ends, image_ends = np.cumsum(data["lengths"])[:-1], np.cumsum(data["images"])[:-1]
        parts = zip(
            np.split(data["tokens"], ends),
            np.split(data["labels"], ends),
            np.split(data["pixels"], image_ends),
            strict=True,
        )
        return [Sample(*part) for part in parts]
