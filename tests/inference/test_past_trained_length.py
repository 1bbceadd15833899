"""Answers to prompts shorter and longer than the trained length are those of Qwen v1, written out in plain torch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import qwen_reference
import torch
from test_reference import SMALL, build
from torch import Tensor

from megavlm.config.schema import ParallelConfig
from megavlm.inference.generate import generate
from megavlm.inference.prompt import Prompt
from megavlm.parallel.state import process_groups

TRAINED, NEW = 24, 6
# Within the trained length, past it while the answer grows, past it by half, and far past it.
LENGTHS = (12, 22, 37, 100)


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    """Hold the groups of a single process while the tests run."""
    with process_groups(ParallelConfig(), seed=1234):
        yield


def prompts(generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """[S] ids with an image each, and its [1, 3, H, W] normalised pixels."""
    made = []
    for length in LENGTHS:
        ids = torch.randint(0, SMALL.image_token, (length,), generator=generator)
        ids[1 : 1 + SMALL.queries] = SMALL.image_token
        made.append((ids, torch.randn(1, 3, SMALL.image, SMALL.image, generator=generator)))
    return made


def plain(state: qwen_reference.State, ids: Tensor, pixels: Tensor, trained: int | None) -> list[int]:
    """Greedy answer, the whole sequence anew for each token."""
    features, prompt = qwen_reference.encode(state, SMALL, pixels), len(ids)
    for _ in range(NEW):
        logits = qwen_reference.logits(state, SMALL, ids, features, prompt=prompt, trained=trained)
        ids = torch.cat([ids, logits[-1].argmax()[None]])
    return ids[prompt:].tolist()


def test_answers_are_those_of_the_plain_formulas() -> None:
    # Larger queries and keys: positions matter in every answer, and the best token is clear.
    state = qwen_reference.random_state(SMALL, 7)
    for name in state:
        if name.endswith("c_attn.weight"):
            state[name] *= 2
    model = build(state, SMALL, seq_length=TRAINED, use_dynamic_ntk=True, use_logn_attn=True)
    asked = prompts(torch.Generator().manual_seed(3))
    got = generate(
        [model],
        [Prompt(ids.numpy(), pixels) for ids, pixels in asked],
        max_new_tokens=NEW,
        stop_ids=[],
        vocab_size=SMALL.vocab,
        pack_length=sum(LENGTHS),
    )
    assert got == [plain(state, ids, pixels, TRAINED) for ids, pixels in asked]
    without = [plain(state, ids, pixels, None) for ids, pixels in asked]
    assert got[0] == without[0]
    assert got[2] != without[2] and got[3] != without[3]  # else this would show little
