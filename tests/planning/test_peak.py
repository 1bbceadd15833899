"""The predicted peak of activations and of what passes is that of a real step in the plain-torch layers, to 5 %."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from peak_memory import PeakMemory
from saved_tensors import quantise_random
from tiny import IMAGE_TOKEN, tiny_recipe

from megavlm.data.batch import Pack
from megavlm.data.feed import MicroBatch, micro_batch
from megavlm.parallel.state import process_groups
from megavlm.planning.memory import predict
from megavlm.training.build import build_training
from megavlm.training.step import run_batches

TOKENS, SIDE, SLOTS = 256, 64, 16
LANGUAGE = {"hidden_size": 128, "ffn_hidden_size": 352, "num_attention_heads": 4, "num_query_groups": 4}
LANGUAGE |= {"kv_channels": 32, "num_layers": 4, "vocab_size": 1024}
VISION = {"image_size": SIDE, "patch_size": 8, "hidden_size": 96, "num_layers": 3, "ffn_hidden_size": 384}
VISION |= {"num_attention_heads": 4, "positional_grid": 8}
FROZEN = {"modules": {"vision": {"freeze": True}}}
BF16 = {"training": {"precision": "bf16", "global_batch_size": 2}, "parallel": {"transformer_impl": "torch"}}
LORA: dict[str, Any] = {
    "lora": {"rank": 8, "targets": ("c_attn", "attn.c_proj", "w1", "w2")},
    "modules": {"vision": {"freeze": True}, "connector": {"freeze": True}},
}
CASES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16-large-vocabulary": {**BF16, "language": {"vocab_size": 8192}},
    "recomputed": {"parallel": {"recompute_granularity": "full"}},
    "many-images-frozen-recomputed": {
        "images": 8,
        **FROZEN,
        **BF16,
        "parallel": {"recompute_granularity": "full", "transformer_impl": "torch"},
    },
    "lora": LORA,
    "lora-bf16": {**BF16, **LORA},
    "qlora-bf16": {**BF16, **LORA, "lora": {**LORA["lora"], "quantize": "nf4"}},
    "lora-recomputed": {**LORA, "parallel": {"recompute_granularity": "full"}},
    "lora-head": {**BF16, **LORA, "lora": {**LORA["lora"], "train_embeddings": True, "train_head": True}},
}


def batch_of(images: int) -> MicroBatch:
    """Return a pack of two samples with that many images."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, IMAGE_TOKEN, TOKENS)
    for image in range(images):
        tokens[1 + image * (SLOTS + 2) :][:SLOTS] = IMAGE_TOKEN
    pack = Pack(
        tokens=tokens.astype(np.int64),
        labels=rng.integers(0, IMAGE_TOKEN, TOKENS).astype(np.int64),
        position_ids=np.concatenate([np.arange(TOKENS // 2)] * 2).astype(np.int64),
        cu_seqlens=np.array([0, TOKENS // 2, TOKENS], np.int32),
        segment_sources=np.zeros(2, np.int32),
        images=[b""] * images,
        sample_keys=[],
    )
    pixels = rng.integers(0, 256, (images, 3, SIDE, SIDE), dtype=np.uint8)
    return micro_batch(pack, torch.from_numpy(pixels), torch.device("cpu"))


@pytest.mark.parametrize("name", CASES)
def test_peak_of_a_step(name: str) -> None:
    case = dict(CASES[name])
    images = case.pop("images", 2)
    model = {
        "preset": "tiny",
        "language": {**LANGUAGE, **case.pop("language", {})},
        "vision": VISION,
        "connector": {"num_queries": SLOTS, "head_dim": 32},
    }
    recipe = tiny_recipe(model=model, data={"sequence_length": TOKENS}, **case)
    with process_groups(recipe.parallel, seed=1):
        training = build_training(recipe, IMAGE_TOKEN)
        for module in training.modules:
            quantise_random(module.language)
        known = [p for chunk in training.chunks for p in chunk.parameters()]
        known += [buffer.grad_data for chunk in training.chunks for buffer in chunk.buffers]
        batches = [batch_of(images), batch_of(images)]
        with PeakMemory(known) as memory:
            run_batches(training.chunks, batches, num_sources=1)
    predicted = predict(recipe, 1, images_per_pack=images, most_images=images)[0]
    passing = predicted.activations + predicted.vision + predicted.output + predicted.buffers
    # The batches were there before.
    given = recipe.training.global_batch_size * (TOKENS * 4 * 8 + images * 3 * SIDE**2)
    assert passing - given == pytest.approx(memory.peak, rel=0.05)
