"""The mean loss of an option is what the model's own loss says of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import IMAGE_SIZE, IMAGE_TOKEN, TOKENS_PER_IMAGE, tiny_recipe

from megavlm.data.batch import IGNORE_INDEX, Pack
from megavlm.data.device_batch import make_batch
from megavlm.inference.option_losses import option_losses
from megavlm.inference.prompt import Prompt
from megavlm.models.build import build_model, unwrap
from megavlm.parallel.state import process_groups

CAPACITY = 64
OPTIONS = [[[7], [8], [9]], [[5, 6], [5, 7], [11]], [[1, 2, 3], [4]]]


def prompts() -> list[Prompt]:
    rng = np.random.default_rng(1)
    made = []
    for images, length in ((1, 20), (0, 9), (2, 30)):
        tokens = rng.integers(0, IMAGE_TOKEN, size=length)
        tokens[2 : 2 + images * TOKENS_PER_IMAGE] = IMAGE_TOKEN
        pixels = rng.integers(0, 256, size=(images, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
        made.append(Prompt(tokens.astype(np.int64), torch.from_numpy(pixels)))
    return made


def loss_by_labels(model: torch.nn.Module, prompt: Prompt, option: list[int]) -> float:
    """The model's training loss over the option's tokens, of the prompt and the option alone."""
    tokens = np.concatenate([prompt.tokens, option])
    labels = np.concatenate([tokens[1:], [0]])
    pack = Pack(
        tokens=tokens,
        labels=np.full(len(tokens), IGNORE_INDEX),
        position_ids=np.arange(len(tokens)),
        cu_seqlens=np.array([0, len(tokens)], np.int32),
        segment_sources=np.array([0], np.int32),
        images=[],
        sample_keys=[],
    )
    batch = make_batch(pack, prompt.images, torch.device("cpu"))
    with torch.no_grad():
        losses = model(
            tokens=batch.tokens,
            position_ids=batch.position_ids,
            packed_seq_params=batch.packed_seq_params,
            labels=torch.from_numpy(labels)[None],
            images=batch.images,
        )
    start = len(prompt.tokens) - 1
    return float(losses[0, start : start + len(option)].mean())


def test_equals_the_training_loss() -> None:
    recipe = tiny_recipe()
    with process_groups(recipe.parallel, 3):
        chunks = build_model(recipe, IMAGE_TOKEN)
        size = recipe.model.language.vocab_size
        found = option_losses(chunks, prompts(), OPTIONS, vocab_size=size, pack_length=CAPACITY)
        model = unwrap(chunks[0]).eval()
        for prompt, options, losses in zip(prompts(), OPTIONS, found, strict=True):
            expected = [loss_by_labels(model, prompt, option) for option in options]
            assert losses == pytest.approx(expected, abs=1e-5)
            assert max(expected) - min(expected) > 1e-3
        assert option_losses(chunks, [], [], vocab_size=size, pack_length=CAPACITY) == []
        with pytest.raises(ValueError, match="takes 32 positions, a pack has 16"):
            option_losses(chunks, prompts(), OPTIONS, vocab_size=size, pack_length=16)
