"""No tensor of a generation is on the wrong device, which is pretended (``devices``)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from devices import pretended_device
from generate_prompts import VOCABULARY, prompts
from tiny import IMAGE_TOKEN, SEQUENCE_LENGTH, tiny_recipe

from megavlm.inference.generate import generate
from megavlm.inference.sampling import Sampling
from megavlm.models.build import build_model
from megavlm.parallel.state import process_groups


@pytest.mark.skipif(torch.cuda.is_available(), reason="pretends a device where there is none")
def test_greedy_sampled_and_with_a_small_cache() -> None:
    recipe = tiny_recipe()
    drawn = Sampling(temperature=0.7, top_k=20, top_p=0.9, repetition_penalty=1.2, seed=4)
    ways: list[dict[str, Any]] = [{}, {"sampling": drawn}, {"cached_positions": 100}]
    with pretended_device(), process_groups(recipe.parallel, 1):
        chunks = build_model(recipe, IMAGE_TOKEN)
        for way in ways:
            answers = generate(
                chunks, prompts(), max_new_tokens=4, stop_ids=[VOCABULARY - 1], vocab_size=VOCABULARY,
                pack_length=SEQUENCE_LENGTH, **way,
            )  # fmt: skip
            assert len(answers) == len(prompts())
