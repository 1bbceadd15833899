"""What ranks do with the package that ``test_outside_package`` installs: they read its entry point as a new process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from megavlm.architectures.context import BuildContext
from megavlm.cli import main
from megavlm.config.load import load_recipe
from megavlm.families.presets import expand_presets
from megavlm.inference.checkpoint import load_for_inference
from megavlm.inference.generate import generate, pack_prompts
from megavlm.inference.loaded import loaded
from megavlm.inference.prompt import Prompt
from megavlm.models.vlm import VisionLanguageModel
from megavlm.parallel import pipeline
from megavlm.parallel.state import process_groups
from megavlm.planning.flops import step_flops
from megavlm.planning.layout import layout_of
from megavlm.planning.parameters import chunk_parameters
from megavlm.training import metrics


def commands(*lines: Sequence[object], peak: float | None = None) -> None:
    """Run ``megavlm`` with each of ``lines``, which must do well.

    Args:
        lines: words of the command line.
        peak: operations per second that the device is said to have, as CPUs have no known number.
    """
    if peak is not None:
        metrics.peak_flops = lambda _precision: peak
    for words in lines:
        assert main([str(word) for word in words]) == 0, words


def counted(recipe: str, *overrides: str) -> tuple[list[int], list[int], int]:
    """Return the sizes of the parameters by plan and as built, and the operations of a step."""
    own = load_recipe(recipe, overrides, expand_presets)
    layout = layout_of(own, 1)
    with process_groups(own.parallel, 1), torch.device("meta"):
        model = VisionLanguageModel(own.model, BuildContext(own.parallel, initialize=False), 0)
        built = sorted(p.numel() for p in model.parameters())
    planned = sorted(p.elements for p in chunk_parameters(own, layout, layout.chunks[0]))
    return planned, built, step_flops(own, tokens=100, squared_lengths=5000, images=3)


def answers(checkpoint: Path, *overrides: str) -> tuple[list[list[int]], list[list[int]]]:
    """Return greedy answers to a text and to a picture with text, by generation and by whole forward passes."""
    own, path, tokenizer = load_for_inference(checkpoint, overrides)
    vocabulary, length, new = own.model.language.vocab_size, 32, 6
    rng = np.random.default_rng(5)
    words = [rng.integers(5, 200, size) for size in (7, 9)]
    slots = np.full(own.model.tokens_per_view, tokenizer.imgpad_id)
    pixels = torch.from_numpy(rng.integers(0, 256, (1, 3, 32, 32), dtype=np.uint8))
    asked = [Prompt(words[0]), Prompt(np.concatenate([words[1][:3], slots, words[1][3:]]), pixels)]
    with loaded(own, path, tokenizer) as chunks:
        found = generate(
            chunks, asked, max_new_tokens=new, stop_ids=[], vocab_size=vocabulary, pack_length=length
        )  # fmt: skip
        plain = [Prompt(one.tokens, one.images) for one in asked]
        with pipeline.evaluating(chunks):
            for _ in range(new):
                for one in plain:
                    logits = chunks[0](**{**pack_prompts([one], len(one)).inputs(), "images": one.images})
                    one.answer.append(int(logits[0, -1, :vocabulary].argmax()))
    return found, [one.answer for one in plain]
